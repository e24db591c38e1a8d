"""Where a tensor lies in a file, and how to read it from there without reading anything else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch

from fairseq_moe_opt.checkpoints.ranges import memory_of, read_range
from fairseq_moe_opt.errors import CheckpointError


@final
@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint: a byte range of a file, and how to look at it.

    ``shape`` and ``stride`` are in elements, ``offset`` is the byte in ``path`` of the element with index
    ``(0, ..., 0)`` and ``nbytes`` is the length of the byte range that holds every element. For a contiguous
    tensor ``nbytes`` is ``numel * itemsize``; for a strided one the range has gaps or overlaps.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps, so that they can be read in place."""
        return self.numel == 0 or _without_unit_dims(self.shape, self.stride) == _without_unit_dims(
            self.shape, contiguous_stride(self.shape)
        )


@final
@dataclass(frozen=True, eq=False)
class CheckpointIndex(Mapping[str, TensorRecord]):
    """The tensors of a checkpoint by name, from headers alone.

    ``format`` is ``safetensors``, ``hf-bin`` or ``fairseq``; ``path`` is what the user gave; ``metadata`` is
    whatever else the headers say (for fairseq: ``cfg`` as plain dicts).
    """

    records: Mapping[str, TensorRecord]
    format: str
    path: Path
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __getitem__(self, name: str) -> TensorRecord:
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __deepcopy__(self, memo: dict[int, object]) -> CheckpointIndex:
        return self  # nothing in it ever changes

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds a tensor, in order of first use."""
        return tuple(dict.fromkeys(record.path for record in self.records.values()))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The row-major stride, in elements, of a tensor of this shape."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def span_elements(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many storage elements lie from the first to the last element of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def read_tensor(record: TensorRecord, out: torch.Tensor | None = None) -> torch.Tensor:
    """Reads one tensor by its byte range.

    With ``out`` (same shape) the bytes go straight into its memory when it is a contiguous CPU tensor of the
    record's dtype; otherwise they are read beside it and copied, which converts dtype and moves device.
    Without ``out`` a new contiguous CPU tensor of the record's dtype is returned. Raises CheckpointError
    naming the tensor and the file when the shape differs or the file ends too early.
    """
    if out is not None and tuple(out.shape) != record.shape:
        raise CheckpointError(
            record.path, f"tensor {record.name!r} has shape {record.shape}, wanted {tuple(out.shape)}"
        )
    if out is None:
        out = torch.empty(record.shape, dtype=record.dtype)
    if readable_in_place(record, out):
        _fill(record, out)
        return out
    with torch.no_grad():
        return out.copy_(_read_beside(record))


def equal_tensors(first: TensorRecord, other: TensorRecord) -> bool:
    """Whether two records hold the same numbers; those of one place are not read."""
    if (first.path, first.offset, first.shape, first.stride) == (other.path, other.offset, other.shape, other.stride):
        return True
    return first.shape == other.shape and torch.equal(read_tensor(first), read_tensor(other))


def _read_beside(record: TensorRecord) -> torch.Tensor:
    """Reads the byte range into fresh memory and views it with the record's stride."""
    span = span_elements(record.shape, record.stride)
    buffer = torch.empty(span, dtype=record.dtype)
    _fill(record, buffer)
    return buffer.as_strided(record.shape, record.stride)


def readable_in_place(record: TensorRecord, out: torch.Tensor) -> bool:
    """Whether the record's bytes can be written directly into this tensor's memory."""
    return record.is_contiguous and out.device.type == "cpu" and out.dtype == record.dtype and out.is_contiguous()


def _fill(record: TensorRecord, out: torch.Tensor) -> None:
    """Reads ``record.nbytes`` bytes into the memory of a contiguous CPU tensor of exactly that size."""
    if record.nbytes == 0:
        return
    try:
        descriptor = os.open(record.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(record.path, f"cannot be opened to read {record.name!r}: {error.strerror}") from error
    try:
        done = read_range(descriptor, [memory_of(out, record.nbytes)], record.offset)
    except OSError as error:
        raise CheckpointError(record.path, f"reading {record.name!r} failed: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if done < record.nbytes:
        raise CheckpointError(
            record.path,
            f"is truncated: tensor {record.name!r} needs {record.nbytes} bytes at {record.offset}, found {done}",
        )


def _without_unit_dims(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of the dimensions that have more than one element: the only ones that matter."""
    return tuple(step for size, step in zip(shape, stride, strict=True) if size != 1)
