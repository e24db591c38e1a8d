"""One compiled call for all experts with few rows, at the speed at which memory delivers their weights; CPU only.

See ``native/fused.cpp`` for how, and ``docs/kernels.md`` for how fast. Experts with so many rows that a GEMM of torch's
is faster go to the loop kernel in the same call; how many those are is in :mod:`.limits`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe.kernels.extension import FusedCall, load
from fairseq_moe_opt.moe.kernels.limits import row_limit
from fairseq_moe_opt.moe.kernels.loop import LoopKernel
from fairseq_moe_opt.moe.kernels.workspace import ThreadWorkspace
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment

_DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ROWS = (torch.float32, torch.bfloat16)
_ACTIVATIONS: Mapping[str, int] = {"relu": 0, "gelu": 1, "silu": 2}

_MATRICES = ("fc1_weight", "gate_weight", "fc2_weight")
_SCALES = ("fc1_scale", "gate_scale", "fc2_scale")
_BIASES = ("fc1_bias", "gate_bias", "fc2_bias")
_UNKNOWN = tuple({field.name for field in fields(ExpertWeights)} - {*_MATRICES, *_SCALES, *_BIASES})
"""Fields that the compiled code does not know of: an expert that has one goes to the loop."""


class FusedKernel:
    """Experts with few rows in one compiled call; the others as ``loop`` computes them."""

    name = "fused"
    needs_packed = False
    activations = frozenset(_ACTIVATIONS)

    def __init__(self, loop: LoopKernel) -> None:
        self._loop = loop
        self._workspace = ThreadWorkspace()

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs a CPU, the extension, and float32, bfloat16 or int8 experts."""
        if device.type != "cpu":
            return f"fused runs on cpu, not {device.type}; use kernel='loop'"
        if dtype not in _DTYPES:
            return f"fused computes float32, bfloat16 and int8 experts, not {dtype}; use kernel='loop'"
        extension = load()
        return f"{extension}; use kernel='loop'" if isinstance(extension, str) else None

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Write every segment's result into its slice of ``out``."""
        if rows.dtype == torch.float16 and out.dtype == torch.float16 and wave.weights[0].is_quantized:
            # Sums of codes reach past float16's largest number.
            results = torch.empty(out.shape, dtype=torch.float32)
            self.run(rows.float(), segments, wave, activation, results)
            for segment in segments:
                out[segment.start : segment.stop].copy_(results[segment.start : segment.stop])
            return
        self._refuse_without_extension()
        weights = dict(zip(wave.experts, wave.weights, strict=True))
        fused: list[Segment] = []
        left: list[Segment] = []
        for segment in segments:
            suits = self._suits(rows, weights[segment.expert], segment.stop - segment.start, activation, out)
            (fused if suits else left).append(segment)
        if left:
            self._loop.run(rows, left, wave, activation, out)
        if fused:
            self._fused(rows, fused, weights, activation, out)

    @staticmethod
    def _refuse_without_extension() -> None:
        extension = load()
        if isinstance(extension, str):
            raise KernelError(f"kernel 'fused' cannot run here: {extension}; use kernel='loop'")

    @staticmethod
    def _suits(rows: Tensor, expert: ExpertWeights, num_rows: int, activation: str, out: Tensor) -> bool:
        """Whether the compiled code is to compute an expert: depends on itself and its rows only."""
        weight = expert.fc1_weight
        extension = load()
        if isinstance(extension, str) or rows.dtype not in _ROWS or activation not in _ACTIVATIONS:
            return False
        if not expert.is_quantized and weight.dtype != rows.dtype:
            return False
        if any(getattr(expert, name) is not None for name in _UNKNOWN):
            return False
        if not (rows.is_contiguous() and out.is_contiguous() and all(t.is_contiguous() for t in expert.tensors())):
            return False
        ffn_width, model_width = weight.shape
        return num_rows <= row_limit(weight.dtype, rows.dtype, model_width, ffn_width, extension.level)

    def _fused(
        self,
        rows: Tensor,
        segments: Sequence[Segment],
        weights: Mapping[int, ExpertWeights],
        activation: str,
        out: Tensor,
    ) -> None:
        extension = load()
        if isinstance(extension, str):
            return
        numbers, kept = array("q"), []
        for segment in segments:
            expert = weights[segment.expert]
            biases = [_bias(getattr(expert, name, None), rows.dtype) for name in _BIASES]
            kept.append(biases)
            numbers.extend(_address(getattr(expert, name)) for name in (*_MATRICES, *_SCALES))
            numbers.extend(map(_address, biases))
            numbers.extend((int(rows.dtype == torch.bfloat16), segment.start, segment.stop - segment.start, 0, 0))
        first = weights[segments[0].expert].fc1_weight
        call = FusedCall(
            rows.data_ptr(),
            out.data_ptr(),
            numbers.buffer_info()[0],
            len(segments),
            first.shape[1],
            first.shape[0],
            _DTYPES[rows.dtype],
            _DTYPES[first.dtype],
            _ACTIVATIONS[activation],
            extension.level,
            torch.get_num_threads(),
        )
        scratch = self._workspace.take("fused", 1, extension.scratch_bytes(call), torch.uint8)
        extension.run(call, scratch.data_ptr())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the rows' dtype, in which the compiled code reads it."""
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)
