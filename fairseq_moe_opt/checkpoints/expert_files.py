"""Experts read one at a time from the files of a checkpoint: an expert source for buffering."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints.ranges import drop_pages, expect_scattered_reads, memory_of, read_range
from fairseq_moe_opt.checkpoints.records import TensorRecord, readable_in_place, span_elements
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights

TIER = "file"
ExpertRecords = Mapping[str, TensorRecord]
"""Field of ``ExpertWeights`` to where it lies."""

_Target = tuple[TensorRecord, Tensor]


class ExpertFiles:
    """Reads experts by byte range, straight into the memory they are wanted in.

    Tensors that are strided, of another dtype or on another device go through a scratch space, one a thread, that is
    kept between calls.

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
        self._scratch_bytes = max(
            (record.nbytes for expert in records.values() for record in expert.values()), default=0
        )
        files = {record.path for expert in records.values() for record in expert.values()}
        self._sizes = {path: path.stat().st_size for path in files}
        self._scratches = threading.local()

    @property
    def scratch_bytes(self) -> int:
        """The most that one thread's scratch space takes."""
        return self._scratch_bytes

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        """Read one expert; CheckpointError names it and the file that is missing, failing, cut or replaced."""
        try:
            records = self._records[key]
        except KeyError:
            raise CheckpointError("checkpoint", f"has no {key}") from None
        targets = sorted(
            ((record, getattr(into, name)) for name, record in records.items()),
            key=lambda target: (str(target[0].path), target[0].offset),
        )
        for path, part in groupby(targets, key=lambda target: target[0].path):
            self._read_file(key, path, list(part))
        return ExpertRead(TIER, sum(record.nbytes for record in records.values()))

    def _read_file(self, key: ExpertKey, path: Path, targets: Sequence[_Target]) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(path, f"cannot be opened to read {key}: {error.strerror}") from error
        try:
            self._check_size(key, path, os.fstat(descriptor).st_size)
            if not self._keep_pages:
                expect_scattered_reads(descriptor)
            for run in _adjacent(targets):
                self._read_run(descriptor, key, run)
        except OSError as error:
            raise CheckpointError(path, f"reading {key} failed: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _check_size(self, key: ExpertKey, path: Path, size: int) -> None:
        if size != self._sizes[path]:
            raise CheckpointError(
                path, f"has {size} bytes, had {self._sizes[path]} when it was opened: {key} cannot be read from it"
            )

    def _read_run(self, descriptor: int, key: ExpertKey, run: Sequence[_Target]) -> None:
        """Read tensors that lie one after the other: at once where they go straight to their places."""
        first, last = run[0][0], run[-1][0]
        wanted = last.offset + last.nbytes - first.offset
        buffers = [memory_of(out, record.nbytes) for record, out in run if readable_in_place(record, out)]
        if not buffers:
            ((record, out),) = run
            scratch = self._scratch()
            done = read_range(descriptor, [memory_of(scratch, record.nbytes)], record.offset)
        else:
            done = read_range(descriptor, buffers, first.offset)
        if done < wanted:
            raise CheckpointError(
                first.path, f"is truncated: {key} needs {wanted} bytes at {first.offset}, found {done}"
            )
        if not buffers:
            _copy_strided(scratch, record, out)
        if not self._keep_pages:
            drop_pages(descriptor, first.offset, wanted)

    def _scratch(self) -> Tensor:
        scratch: Tensor | None = getattr(self._scratches, "memory", None)
        if scratch is None:
            scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._scratches.memory = scratch
        return scratch


def _adjacent(targets: Sequence[_Target]) -> list[list[_Target]]:
    """Runs of tensors that lie one after the other and are read in place; any other tensor is a run of its own."""
    runs: list[list[_Target]] = []
    for target in targets:
        if runs and _follows(runs[-1][-1], target):
            runs[-1].append(target)
        else:
            runs.append([target])
    return runs


def _follows(before: _Target, after: _Target) -> bool:
    adjacent = before[0].offset + before[0].nbytes == after[0].offset
    return adjacent and readable_in_place(*before) and readable_in_place(*after)


def _copy_strided(scratch: Tensor, record: TensorRecord, out: Tensor) -> None:
    """Copy what was read for ``record`` to where it is wanted, changing layout, dtype and device."""
    span = span_elements(record.shape, record.stride)
    stored = scratch[: record.nbytes].view(record.dtype)[:span]
    out.copy_(stored.as_strided(record.shape, record.stride))
