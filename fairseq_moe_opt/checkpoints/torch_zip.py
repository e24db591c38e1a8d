"""PyTorch's zip checkpoints (``.pt``, ``.bin``): the pickle, and the byte range of each tensor's storage.

``torch.save`` stores every member uncompressed, so that a tensor is a byte range of the file like any other.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from fairseq_moe_opt.checkpoints.files import read_start, require_file
from fairseq_moe_opt.checkpoints.records import TensorRecord, span_elements
from fairseq_moe_opt.checkpoints.restricted import TensorSlot, load_restricted
from fairseq_moe_opt.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
# A pickled protocol-2 integer: torch.serialization.MAGIC_NUMBER, with which each non-zip file begins.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@final
@dataclass(frozen=True)
class TorchZip:
    """An opened checkpoint: ``content`` is the unpickled object with TensorSlot where tensors were."""

    path: Path
    content: Any
    prefix: str
    members: dict[str, zipfile.ZipInfo] = field(repr=False)


def is_legacy(path: Path) -> bool:
    """Whether a file is of the format that torch wrote before 1.6, which has no byte ranges."""
    return path.is_file() and read_start(path, len(LEGACY_MAGIC)) == LEGACY_MAGIC


def open_torch_zip(path: Path) -> TorchZip:
    """Reads a file's directory and pickle, no tensor; raises CheckpointError for any other kind of file."""
    require_file(path)
    _require_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            prefix = _prefix(path, members)
            _require_stored(path, members)
            _require_little_endian(path, archive, prefix)
            data = archive.read(f"{prefix}data.pkl")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(path, f"is truncated or damaged: {error}") from error
    return TorchZip(path, load_restricted(data, path), prefix, members)


def tensor_records(archive: TorchZip, tensors: dict[str, TensorSlot]) -> dict[str, TensorRecord]:
    """Byte ranges of the named tensors; each storage is looked up once, however many tensors view it."""
    starts: dict[str, tuple[int, int]] = {}
    records: dict[str, TensorRecord] = {}
    with archive.path.open("rb") as stream:
        for name, slot in tensors.items():
            key = slot.storage.key
            if key not in starts:
                starts[key] = _member_range(stream, archive, key, name)
            records[name] = _record(archive.path, name, slot, *starts[key])
    return records


def only_tensors(mapping: Any) -> dict[str, TensorSlot]:
    """The entries of a state dict that are tensors, in their order."""
    return {str(name): value for name, value in dict(mapping).items() if isinstance(value, TensorSlot)}


def _require_zip(path: Path) -> None:
    start = read_start(path, len(LEGACY_MAGIC))
    if start == LEGACY_MAGIC:
        raise CheckpointError(
            path,
            "is in PyTorch's old non-zip format, which has no byte ranges; rewrite it with "
            "`moe-opt convert SRC DST` (--to fairseq for a fairseq checkpoint)",
        )
    if not start.startswith(_ZIP_MAGIC):
        raise CheckpointError(path, "is not a PyTorch checkpoint (neither a zip nor the old format)")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(path, "is truncated: it begins as a zip file but has no directory at its end")


def _prefix(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder inside the zip, with its slash, under which torch.save put everything."""
    found = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(path, "is a zip file but not a PyTorch checkpoint: it has no data.pkl")
    return found[0][: -len("data.pkl")]


def _require_stored(path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                path,
                f"member {info.filename} is compressed, so tensors have no byte ranges; load it with "
                "torch.load and write it again with torch.save",
            )


def _require_little_endian(path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
    name = f"{prefix}byteorder"
    if name in archive.namelist() and archive.read(name).strip() != b"little":
        raise CheckpointError(path, "was written on a big-endian machine; only little-endian is supported")


def _member_range(stream: Any, archive: TorchZip, key: str, tensor: str) -> tuple[int, int]:
    """First byte and length of a storage's data; the local header's own name and extra lengths decide."""
    info = archive.members.get(f"{archive.prefix}data/{key}")
    if info is None:
        raise CheckpointError(archive.path, f"lacks member data/{key}, which holds tensor {tensor!r}")
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
        raise CheckpointError(archive.path, f"is damaged: no zip header for member data/{key}")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length, info.file_size


def _record(path: Path, name: str, slot: TensorSlot, start: int, length: int) -> TensorRecord:
    """A tensor as a byte range of the file, checked against the storage it views."""
    itemsize, span = slot.dtype.itemsize, span_elements(slot.shape, slot.stride)
    fits = len(slot.shape) == len(slot.stride) and min((*slot.shape, *slot.stride, slot.offset, 0)) >= 0
    if not fits or (span > 0 and (slot.offset + span) * itemsize > length):
        raise CheckpointError(path, f"tensor {name!r} of shape {slot.shape} reaches past its storage of {length} bytes")
    return TensorRecord(
        name, slot.dtype, slot.shape, slot.stride, path, start + slot.offset * itemsize, span * itemsize
    )
