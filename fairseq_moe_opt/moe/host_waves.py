"""Computing waves whose weights are in main memory, while the device computes other waves of the same forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache

import torch
from torch import Tensor

from fairseq_moe_opt.moe.protocols import ExpertKernel
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment


class HostWaves:
    """Runs waves ``on_host`` for one forward with (R, D) ``rows``, which are on the device.

    Made before anything is computed with the rows: fetching some of them does not wait for what the device is asked
    for after that. Computes in the calling thread with ``kernel``, as the device works on behind its back.
    """

    def __init__(self, rows: Tensor, kernel: ExpertKernel) -> None:
        self._rows, self._kernel = rows, kernel
        self._ready = _event(rows.device) if rows.is_cuda else None

    def run(self, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Write ``expert(rows[segment])`` into ``out[segment]`` for every segment; ``out`` is (R, D), on the device."""
        weights = dict(zip(wave.experts, wave.weights, strict=True))
        rows = self._fetch(segments)
        results = torch.empty_like(rows, pin_memory=out.is_cuda)
        start = 0
        for segment in segments:
            here = slice(start, start + segment.stop - segment.start)
            self._compute(rows[here], weights[segment.expert], activation, results[here])
            out[segment.start : segment.stop].copy_(results[here], non_blocking=True)
            start = here.stop

    def _compute(self, rows: Tensor, expert: ExpertWeights, activation: str, out: Tensor) -> None:
        """One expert a call, so that each gets all cores, as it had when it was timed."""
        wave = ExpertWave((0,), (_in_dtype(expert, rows.dtype),))
        self._kernel.run(rows, (Segment(0, 0, rows.shape[0]),), wave, activation, out)

    def _fetch(self, segments: Sequence[Segment]) -> Tensor:
        """The segments' rows, one after the other, in main memory."""
        pieces = [self._rows[segment.start : segment.stop] for segment in segments]
        if self._ready is None:
            return torch.cat(pieces)
        stream = _stream(self._rows.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            gathered = torch.cat(pieces)
            rows = torch.empty(gathered.shape, dtype=gathered.dtype, device="cpu", pin_memory=True)
            rows.copy_(gathered, non_blocking=True)
        stream.synchronize()
        return rows


def host_ffn(kernel: ExpertKernel, rows: Tensor, expert: ExpertWeights) -> Tensor:
    """(r, D) rows on a device through one expert in main memory, and back; with relu, to be timed."""
    out = torch.empty_like(rows)
    wave = ExpertWave((0,), (expert,), on_host=True)
    HostWaves(rows, kernel).run((Segment(0, 0, rows.shape[0]),), wave, "relu", out)
    return out


def _in_dtype(expert: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """What a slot would hold of an expert that is stored in another floating-point dtype; int8 stays as it is."""
    if expert.is_quantized or expert.fc1_weight.dtype == dtype:
        return expert
    tensors = {field.name: getattr(expert, field.name) for field in fields(expert)}
    return replace(expert, **{name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None})


def _event(device: torch.device) -> torch.cuda.Event:
    """Behind what was asked of ``device`` so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which rows are fetched: one a device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
