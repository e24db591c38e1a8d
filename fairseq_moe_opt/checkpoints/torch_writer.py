"""Writes PyTorch's zip checkpoints tensor by tensor, so that memory holds one tensor at a time.

The files are what ``torch.save`` writes: a pickle in which a storage is a persistent id, and one uncompressed member
a storage, its data at a multiple of 64 bytes. ``torch.load`` opens them, and so does this package's own reader.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints.records import TensorRecord, contiguous_stride, read_tensor
from fairseq_moe_opt.checkpoints.writers import Output, bytes_of
from fairseq_moe_opt.errors import CheckpointError

ALIGNMENT = 64
_FOLDER = "archive"
_PROTOCOL = 2
# What torch.save writes as `version`: the number of the zip format's readers, three since PyTorch 1.6.
_VERSION = b"3\n"
_LOCAL_HEADER = 30
# zipfile appends this much to a local header once a member may need 64-bit sizes.
_ZIP64_EXTRA = 20
# The extra field that torch.save pads with: "FB", a length, and that many bytes.
_PADDING = struct.Struct("<2sH")

_STORAGE_TYPES: Mapping[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@final
@dataclass(frozen=True)
class _StorageId:
    """What stands for a storage while pickling: its member's number, its dtype and number of elements."""

    key: str
    dtype: torch.dtype
    numel: int


@final
class _Pickler(pickle.Pickler):
    """Pickles Output and Tensor as references to storages, and collects these in the order of their first use."""

    def __init__(self, stream: BytesIO, path: Path) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        self._path = path
        self._keys: dict[object, str] = {}
        self.storages: list[Output | Tensor] = []

    def persistent_id(self, obj: Any) -> tuple[object, ...] | None:
        """``("storage", type, key, location, numel)`` of a storage, as torch.load reads it."""
        if not isinstance(obj, _StorageId):
            return None
        return "storage", _STORAGE_TYPES[obj.dtype], obj.key, "cpu", obj.numel

    def reducer_override(self, obj: Any) -> Any:
        """A tensor as the call that rebuilds it from its storage; everything else as ever."""
        if isinstance(obj, Output):
            return self._rebuild(obj, _place(obj.record, obj.dtype), obj.record.shape, obj.dtype)
        if isinstance(obj, Tensor):
            return self._rebuild(obj, id(obj), tuple(obj.shape), obj.dtype)
        return NotImplemented

    def _rebuild(
        self, source: Output | Tensor, place: object, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[object, ...]:
        if dtype not in _STORAGE_TYPES:
            raise CheckpointError(self._path, f"a PyTorch checkpoint of fairseq cannot store a tensor as {dtype}")
        if place not in self._keys:
            self._keys[place] = str(len(self.storages))
            self.storages.append(source)
        numel = 1
        for extent in shape:
            numel *= extent
        storage = _StorageId(self._keys[place], dtype, numel)
        hooks: OrderedDict[int, object] = OrderedDict()
        arguments = (storage, 0, shape, contiguous_stride(shape), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


def write_torch(path: Path, content: Any) -> None:
    """Writes ``content`` as ``torch.save`` would, with an :class:`Output` or a tensor wherever one is wanted.

    Outputs of one place in a file (tied weights) share one storage. Each is read, converted and written before the
    next. Raises CheckpointError for a dtype without storage type and for a source that cannot be read.
    """
    stream = BytesIO()
    pickler = _Pickler(stream, path)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, "data.pkl", memoryview(stream.getvalue()))
        _write_member(archive, "byteorder", memoryview(b"little"))
        for key, source in enumerate(pickler.storages):
            tensor = source if isinstance(source, Tensor) else read_tensor(source.record).to(source.dtype)
            _write_member(archive, f"data/{key}", bytes_of(tensor.detach().cpu().contiguous()))
        _write_member(archive, "version", memoryview(_VERSION))


def _place(record: TensorRecord, dtype: torch.dtype) -> tuple[object, ...]:
    return record.path, record.offset, record.shape, record.stride, record.dtype, dtype


def _write_member(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """One stored member whose data begin at a multiple of ``ALIGNMENT``."""
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    info.file_size = data.nbytes
    large = data.nbytes * 1.05 > zipfile.ZIP64_LIMIT
    header = _LOCAL_HEADER + len(info.filename) + _PADDING.size + (_ZIP64_EXTRA if large else 0)
    gap = -(cast(Any, archive).start_dir + header) % ALIGNMENT
    info.extra = _PADDING.pack(b"FB", gap) + b"Z" * gap
    with archive.open(info, "w", force_zip64=large) as stream:
        stream.write(data)
