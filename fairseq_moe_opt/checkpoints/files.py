"""Small things every reader needs: a file's state, a folder's weight map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fairseq_moe_opt.errors import CheckpointError


def require_file(path: Path) -> int:
    """The size in bytes of a non-empty regular file; anything else is a CheckpointError."""
    if not path.exists():
        raise CheckpointError(path, "no such file")
    if not path.is_file():
        raise CheckpointError(path, "is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(path, "is empty (0 bytes)")
    return size


def read_start(path: Path, count: int) -> bytes:
    """The first ``count`` bytes of a file, fewer when it is shorter."""
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """A JSON file's content; broken text is a CheckpointError."""
    require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from error


def read_weight_map(index_file: Path) -> dict[str, Path]:
    """Tensor name to shard file, from a Hugging Face ``*.index.json``; every shard must exist beside it."""
    content = read_json(index_file)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index_file, "has no weight_map: not the index of a sharded checkpoint")
    shards: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(index_file, f"weight_map[{name!r}] is not the name of a file beside it")
        shards[name] = index_file.parent / shard
    for shard_path in dict.fromkeys(shards.values()):
        if not shard_path.is_file():
            raise CheckpointError(index_file, f"shard {shard_path.name} is missing")
    return shards
