"""Reader of Hugging Face's ``pytorch_model.bin``, single or sharded (``pytorch_model.bin.index.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fairseq_moe_opt.checkpoints.files import read_weight_map
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord
from fairseq_moe_opt.checkpoints.torch_zip import only_tensors, open_torch_zip, tensor_records
from fairseq_moe_opt.errors import CheckpointError

FORMAT = "hf-bin"
SINGLE_NAME = "pytorch_model.bin"
INDEX_NAME = "pytorch_model.bin.index.json"


def supports_path(path: Path) -> bool:
    """Whether ``path`` is a ``.bin`` file or a folder that holds ``pytorch_model.bin`` or its index."""
    if path.is_dir():
        return (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file()
    return path.is_file() and path.suffix == ".bin"


def read_index(path: Path) -> CheckpointIndex:
    """The index of a file or folder, from zip directories and pickles; raises CheckpointError if amiss."""
    if not path.is_dir():
        return CheckpointIndex(_read_file(path), FORMAT, path)
    if (path / SINGLE_NAME).is_file():
        return CheckpointIndex(_read_file(path / SINGLE_NAME), FORMAT, path)
    return CheckpointIndex(_read_shards(path), FORMAT, path)


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights of a path this reader supports."""
    if not path.is_dir():
        return (path,)
    if (path / SINGLE_NAME).is_file():
        return (path / SINGLE_NAME,)
    return tuple(dict.fromkeys(read_weight_map(path / INDEX_NAME).values()))


def _read_shards(folder: Path) -> dict[str, TensorRecord]:
    weight_map = read_weight_map(folder / INDEX_NAME)
    shards = {shard: _read_file(shard) for shard in dict.fromkeys(weight_map.values())}
    records: dict[str, TensorRecord] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(shard, f"lacks tensor {name!r}, which {INDEX_NAME} places there")
        records[name] = shards[shard][name]
    return records


def _read_file(path: Path) -> dict[str, TensorRecord]:
    archive = open_torch_zip(path)
    if not isinstance(archive.content, Mapping):
        raise CheckpointError(path, "holds no state dict (a table of tensors)")
    tensors = only_tensors(archive.content)
    if not tensors:
        raise CheckpointError(path, "holds no state dict: none of its entries is a tensor")
    return tensor_records(archive, tensors)
