"""Experts read one at a time from the files of a checkpoint: an expert source for buffering."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints.ranges import drop_pages, expect_scattered_reads, memory_of, read_range
from fairseq_moe_opt.checkpoints.records import TensorRecord, readable_in_place, span_elements
from fairseq_moe_opt.errors import CheckpointError, OptionError
from fairseq_moe_opt.moe.quantization import quantize_rows_into
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights

TIER = "file"
ExpertRecords = Mapping[str, TensorRecord]
"""Field of ``ExpertWeights`` to where it lies."""


@dataclass(frozen=True)
class _Target:
    """A tensor in a file, where it is wanted, and where its scales are when it has to be quantised on the way."""

    record: TensorRecord
    out: Tensor
    scale: Tensor | None = None

    @property
    def converts(self) -> bool:
        """Whether the numbers change their dtype on the way."""
        return self.record.dtype != self.out.dtype

    @property
    def in_place(self) -> bool:
        """Whether the file's bytes are what is wanted, where they are wanted."""
        return readable_in_place(self.record, self.out)


class ExpertFiles:
    """Reads experts by byte range, straight into the memory they are wanted in.

    Tensors that are strided, of another dtype or on another device go through a scratch space, one a thread, that is
    kept between calls; floats that are wanted as int8 are quantised from it.

    Args:
        records: where each expert's tensors lie.
        keep_pages: leave what was read in the system's page cache. Without it, memory holds one copy of an expert.
        pinned: scratch space in page-locked memory, for slots on a GPU.
    """

    def __init__(
        self, records: Mapping[ExpertKey, ExpertRecords], *, keep_pages: bool = False, pinned: bool = False
    ) -> None:
        self._records = records
        self._keep_pages, self._pinned = keep_pages, pinned
        self._scratch_bytes = max((_largest_span(expert.values()) for expert in records.values()), default=0)
        files = {record.path for expert in records.values() for record in expert.values()}
        self._sizes = {path: path.stat().st_size for path in files}
        self._scratches = threading.local()

    def scratch_bytes_for(self, wanted: Mapping[str, ExpertWeights], *, on_cpu: bool) -> int:
        """The most that one thread takes beside the memory it reads into.

        ``wanted`` has an expert of each layer as ``load`` is going to be asked for it, its storage left out; it will be
        in main memory if ``on_cpu``. Quantising holds a matrix in float32 twice, beside the scratch space.
        """
        targets = [
            _target(name, record, wanted[key.layer])
            for key, records in self._records.items()
            for name, record in records.items()
        ]
        floats = max((8 * target.record.numel for target in targets if target.scale is not None), default=0)
        direct = on_cpu and all(target.record.is_contiguous and not target.converts for target in targets)
        return 0 if direct else self._scratch_bytes + floats

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        """Read one expert; CheckpointError names it and the file that is missing, failing, cut or replaced."""
        try:
            records = self._records[key]
        except KeyError:
            raise CheckpointError("checkpoint", f"has no {key}") from None
        targets = sorted(
            (_target(name, record, into) for name, record in records.items()),
            key=lambda target: (str(target.record.path), target.record.offset),
        )
        nbytes = 0
        for path, part in groupby(targets, key=lambda target: target.record.path):
            nbytes += self._read_file(key, path, list(part))
        return ExpertRead(TIER, nbytes)

    def _read_file(self, key: ExpertKey, path: Path, targets: Sequence[_Target]) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(path, f"cannot be opened to read {key}: {error.strerror}") from error
        try:
            self._check_size(key, path, os.fstat(descriptor).st_size)
            if not self._keep_pages:
                expect_scattered_reads(descriptor)
            return sum(self._read_run(descriptor, key, run) for run in _runs(targets))
        except OSError as error:
            raise CheckpointError(path, f"reading {key} failed: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _check_size(self, key: ExpertKey, path: Path, size: int) -> None:
        if size != self._sizes[path]:
            raise CheckpointError(
                path, f"has {size} bytes, had {self._sizes[path]} when it was opened: {key} cannot be read from it"
            )

    def _read_run(self, descriptor: int, key: ExpertKey, run: Sequence[_Target]) -> int:
        """Read tensors that lie together at once, straight to their places or through the scratch space; the bytes."""
        first = run[0].record
        wanted = max(_end(target.record) for target in run) - first.offset
        scratch = None if run[0].in_place else self._scratch()
        if scratch is None:
            buffers = [memory_of(target.out, target.record.nbytes) for target in run]
        else:
            buffers = [memory_of(scratch, wanted)]
        done = read_range(descriptor, buffers, first.offset)
        if done < wanted:
            raise CheckpointError(
                first.path, f"is truncated: {key} needs {wanted} bytes at {first.offset}, found {done}"
            )
        if scratch is not None:
            for target in run:
                _copy_converted(key, scratch[target.record.offset - first.offset :], target)
        if not self._keep_pages:
            drop_pages(descriptor, first.offset, wanted)
        return wanted

    def _scratch(self) -> Tensor:
        scratch: Tensor | None = getattr(self._scratches, "memory", None)
        if scratch is None:
            scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._scratches.memory = scratch
        return scratch


def _runs(targets: Sequence[_Target]) -> list[list[_Target]]:
    """Tensors, sorted by place, that one read serves.

    Those that lie one after the other and are read in place, and strided ones that share bytes, such as interleaved
    halves of a matrix; any other tensor is a run of its own.
    """
    runs: list[list[_Target]] = []
    for target in targets:
        if runs and (_follows(runs[-1][-1], target) or _shares(runs[-1], target)):
            runs[-1].append(target)
        else:
            runs.append([target])
    return runs


def _follows(before: _Target, after: _Target) -> bool:
    return _end(before.record) == after.record.offset and before.in_place and after.in_place


def _shares(run: Sequence[_Target], after: _Target) -> bool:
    if after.in_place or run[0].in_place or after.record.dtype != run[0].record.dtype:
        return False
    return after.record.offset < max(_end(target.record) for target in run)


def _end(record: TensorRecord) -> int:
    return record.offset + record.nbytes


def _largest_span(records: Iterable[TensorRecord]) -> int:
    """Bytes of the longest stretch of a file that records of it cover without a gap between those that overlap."""
    largest, start, end, where = 0, 0, 0, None
    for record in sorted(records, key=lambda record: (str(record.path), record.offset)):
        if record.path != where or record.offset >= end:
            start, end, where = record.offset, record.offset, record.path
        end = max(end, _end(record))
        largest = max(largest, end - start)
    return largest


def _target(name: str, record: TensorRecord, into: ExpertWeights) -> _Target:
    out: Tensor = getattr(into, name)
    quantized = out.dtype == torch.int8 and record.dtype.is_floating_point
    return _Target(record, out, getattr(into, name.replace("_weight", "_scale")) if quantized else None)


def _copy_converted(key: ExpertKey, scratch: Tensor, target: _Target) -> None:
    """Copy what was read for ``target`` to where it is wanted, changing layout, dtype and device."""
    record = target.record
    span = span_elements(record.shape, record.stride)
    stored = scratch[: record.nbytes].view(record.dtype)[:span].as_strided(record.shape, record.stride)
    if target.scale is None:
        target.out.copy_(stored)
        return
    try:
        quantize_rows_into(stored, target.out, target.scale)
    except OptionError:
        raise CheckpointError(
            record.path, f"{record.name!r} of {key} has weights that are infinite or not a number: no int8 for them"
        ) from None
