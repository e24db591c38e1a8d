"""Writes safetensors tensor by tensor, so that memory holds one tensor however large the checkpoint is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from fairseq_moe_opt.checkpoints.records import TensorRecord, read_tensor
from fairseq_moe_opt.checkpoints.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME
from fairseq_moe_opt.errors import CheckpointError

SHARD_BYTES = 4_000_000_000
_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@final
@dataclass(frozen=True)
class Output:
    """One tensor to write: its new name, where to read it, and the dtype to store."""

    name: str
    record: TensorRecord
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.record.numel * self.dtype.itemsize


def float_dtype(record: TensorRecord, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to store: only floating tensors are ever converted."""
    return wanted if wanted is not None and record.dtype.is_floating_point else record.dtype


def write_safetensors(folder: Path, outputs: Sequence[Output], shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes ``outputs`` into ``folder`` as Transformers names them: one file, or shards with an index."""
    shards = plan_shards(outputs, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_NAME, shards[0])
        return [folder / SINGLE_NAME]
    weight_map: dict[str, str] = {}
    paths = []
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(path, shard)
        weight_map.update({output.name: path.name for output in shard})
        paths.append(path)
    index = {"metadata": {"total_size": sum(o.nbytes for o in outputs)}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)
    return paths


def plan_shards(outputs: Sequence[Output], shard_bytes: int) -> list[list[Output]]:
    """Cuts the list, in its order, into runs of at most ``shard_bytes`` (a larger tensor stands alone)."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_file(path: Path, outputs: Sequence[Output]) -> None:
    """One safetensors file: header length, header padded to 8 bytes, then the tensors without gaps."""
    with path.open("wb") as stream:
        header = _header(path, outputs)
        stream.write(len(header).to_bytes(8, "little") + header)
        for output in outputs:
            tensor = read_tensor(output.record).to(output.dtype).contiguous()
            stream.write(bytes_of(tensor))


def _header(path: Path, outputs: Sequence[Output]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for output in outputs:
        if output.dtype not in _CODES:
            raise CheckpointError(path, f"safetensors cannot store {output.name!r} as {output.dtype}")
        end = begin + output.nbytes
        shape = list(output.record.shape)
        entries[output.name] = {"dtype": _CODES[output.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, whatever its dtype (numpy has no bfloat16); the view keeps it alive."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
