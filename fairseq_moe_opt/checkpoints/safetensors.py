"""Reader of safetensors: a file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json``.

The header is parsed here (8 bytes little-endian length, JSON, then data), because a header-only index needs
byte offsets, which the safetensors library does not give out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_opt.checkpoints.files import read_start, read_weight_map, require_file
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord, contiguous_stride
from fairseq_moe_opt.errors import CheckpointError

FORMAT = "safetensors"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PREFIX = 8
# The library itself refuses headers over 100 MB; a larger number means that this is another kind of file.
_MAX_HEADER = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def supports_path(path: Path) -> bool:
    """Whether ``path`` is a ``.safetensors`` file or a folder that holds one (or its index)."""
    if path.is_dir():
        return (path / INDEX_NAME).is_file() or (path / SINGLE_NAME).is_file()
    return path.is_file() and path.suffix == ".safetensors"


def read_index(path: Path) -> CheckpointIndex:
    """The index of a file or folder, from its headers; raises CheckpointError for anything amiss."""
    if not path.is_dir():
        records, metadata = _read_file(path)
        return CheckpointIndex(records, FORMAT, path, metadata)
    if (path / SINGLE_NAME).is_file():
        records, metadata = _read_file(path / SINGLE_NAME)
        return CheckpointIndex(records, FORMAT, path, metadata)
    return _read_shards(path)


def _read_shards(folder: Path) -> CheckpointIndex:
    """Joins the shards that the index file names, and checks that each holds what the index says."""
    weight_map = read_weight_map(folder / INDEX_NAME)
    headers = {shard: _read_file(shard)[0] for shard in dict.fromkeys(weight_map.values())}
    records: dict[str, TensorRecord] = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(shard, f"lacks tensor {name!r}, which {INDEX_NAME} places there")
        records[name] = headers[shard][name]
    return CheckpointIndex(records, FORMAT, folder)


def _read_file(path: Path) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    """One file's records and ``__metadata__``; checks that the file is as long as the header says."""
    size = require_file(path)
    header, data_start = _read_header(path, size)
    metadata = header.pop("__metadata__", {})
    records = {name: _record(name, entry, path, data_start) for name, entry in header.items()}
    end = max((record.offset + record.nbytes for record in records.values()), default=data_start)
    if end > size:
        raise CheckpointError(path, f"is truncated: {size} bytes, but its header describes {end}")
    return records, dict(metadata)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the byte where data begin."""
    length = int.from_bytes(read_start(path, _PREFIX), "little")
    if size < _PREFIX or not 2 <= length <= _MAX_HEADER:
        raise CheckpointError(path, "is not a safetensors file: it does not begin with a header length")
    if _PREFIX + length > size:
        raise CheckpointError(path, f"is truncated: {size} bytes, but its header alone needs {_PREFIX + length}")
    try:
        header = json.loads(read_start(path, _PREFIX + length)[_PREFIX:].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(path, "is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(path, "is not a safetensors file: its header is not a table of tensors")
    return header, _PREFIX + length


def _record(name: str, entry: Any, path: Path, data_start: int) -> TensorRecord:
    """One header entry as a record; offsets in the header count from the start of the data."""
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"header entry of tensor {name!r} cannot be understood") from error
    numel = 1
    for extent in shape:
        numel *= extent
    if begin < 0 or end - begin != numel * dtype.itemsize:
        raise CheckpointError(path, f"tensor {name!r}: {end - begin} bytes for shape {shape} of {dtype}")
    return TensorRecord(name, dtype, shape, contiguous_stride(shape), path, data_start + begin, end - begin)
