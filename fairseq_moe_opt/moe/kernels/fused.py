"""One compiled call for all experts with few rows, at the speed at which memory delivers their weights; CPU only.

See ``native/fused.cpp`` for how, and ``docs/kernels.md`` for how fast. Experts with so many rows that a GEMM of torch's
is faster go to the loop kernel in the same call; how many those are is in :mod:`.limits`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe.activations import clamped_swiglu
from fairseq_moe_opt.moe.kernels.extension import Extension, FusedCall, load
from fairseq_moe_opt.moe.kernels.limits import ALWAYS, row_limit, transposed_limit
from fairseq_moe_opt.moe.kernels.loop import LoopKernel
from fairseq_moe_opt.moe.kernels.workspace import ThreadWorkspace
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment

_DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ROWS = (torch.float32, torch.bfloat16)
_ACTIVATIONS: Mapping[str, int] = {"relu": 0, "gelu": 1, "silu": 2}

_CLAMPED_SWIGLU = 3

_NUMBERS = 17
"""That describe an expert to the compiled code."""


NO_LAYOUT = "fused does not read experts whose tensors lie so in memory; use kernel='loop'"


def no_activation(activation: str) -> str:
    """That the compiled code does not have it."""
    known = f"{', '.join(_ACTIVATIONS)} and clamped SwiGLU"
    return f"fused computes {known}, not the activation {activation!r}; use kernel='loop'"


class FusedKernel:
    """Experts with few rows in one compiled call; the others as ``loop`` computes them.

    Args:
        loop: computes the others.
        always: take any number of rows, which is how the limits are measured.
    """

    name = "fused"
    needs_packed = False
    activations = frozenset(_ACTIVATIONS)

    def __init__(self, loop: LoopKernel, *, always: bool = False) -> None:
        self._loop = loop
        self._always = always
        self._workspace = ThreadWorkspace()

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs a CPU, the extension, and float32, bfloat16 or int8 experts."""
        if device.type != "cpu":
            return f"fused runs on cpu, not {device.type}; use kernel='loop'"
        if dtype not in _DTYPES:
            return f"fused computes float32, bfloat16 and int8 experts, not {dtype}; use kernel='loop'"
        extension = load()
        return f"{extension}; use kernel='loop'" if isinstance(extension, str) else None

    @staticmethod
    def computes(activation: str) -> bool:
        """Whether it has that activation."""
        return activation in _ACTIVATIONS or clamped_swiglu(activation) is not None

    @staticmethod
    def reads(expert: ExpertWeights) -> bool:
        """Whether it reads an expert whose tensors lie so in memory."""
        return _addresses(expert, expert.fc1_weight.dtype, []) is not None

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Write every segment's result into its slice of ``out``."""
        if rows.dtype == torch.float16 and out.dtype == torch.float16 and wave.weights[0].is_quantized:
            # Sums of codes reach past float16's largest number.
            results = torch.empty(out.shape, dtype=torch.float32)
            self.run(rows.float(), segments, wave, activation, results)
            for segment in segments:
                out[segment.start : segment.stop].copy_(results[segment.start : segment.stop])
            return
        extension = self._loaded()
        weights = dict(zip(wave.experts, wave.weights, strict=True))
        if not self.computes(activation):
            raise KernelError(f"kernel 'fused' cannot run: {no_activation(activation)}")
        suits = rows.dtype in _ROWS and rows.is_contiguous() and out.is_contiguous()
        numbers, converted, left = array("q"), list[Tensor](), list[Segment]()
        for segment in segments:
            expert, num_rows = weights[segment.expert], segment.stop - segment.start
            if not suits or num_rows > self._most_rows(expert, rows.dtype, extension.level):
                left.append(segment)
                continue
            addresses = _addresses(expert, rows.dtype, converted)
            if addresses is None:
                raise KernelError(f"kernel 'fused' cannot run: {NO_LAYOUT}")
            numbers.extend(addresses)
            numbers.extend((int(rows.dtype == torch.bfloat16), segment.start, num_rows))
        if left:
            self._loop.run(rows, left, wave, activation, out)
        if numbers:
            self._fused(extension, rows, numbers, wave.weights[0].fc1_weight, activation, out)

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(T, in) ``rows`` times (out, in) ``weight``, plus ``bias``, as one call with nothing but a first layer.

        All contiguous and of one dtype, float32 or bfloat16.
        """
        out = torch.empty((len(rows), len(weight)), dtype=rows.dtype)
        bias_at = 0 if bias is None else bias.data_ptr()
        is_bf16 = int(rows.dtype == torch.bfloat16)
        expert = (weight.data_ptr(), 0, 0, 0, 0, 0, bias_at, 0, 0, 0, 0, 0, 1, 1, is_bf16, 0, len(rows))
        self._fused(self._loaded(), rows, array("q", expert), weight, "relu", out)
        return out

    @staticmethod
    def _loaded() -> Extension:
        extension = load()
        if isinstance(extension, str):
            raise KernelError(f"kernel 'fused' cannot run here: {extension}; use kernel='loop'")
        return extension

    def _most_rows(self, expert: ExpertWeights, rows: torch.dtype, level: int) -> int:
        """How many rows of an expert the compiled code takes: depends on this expert only; 0 if it cannot at all."""
        weight = expert.fc1_weight
        if weight.dtype != (torch.int8 if expert.is_quantized else rows):
            return 0
        ffn_width, model_width = weight.shape
        if self._always:
            return ALWAYS
        if not weight.is_contiguous():
            return transposed_limit(weight.dtype, level)
        return row_limit(weight.dtype, rows, model_width, ffn_width, level)

    def _fused(
        self, extension: Extension, rows: Tensor, numbers: array[int], first: Tensor, activation: str, out: Tensor
    ) -> None:
        """Compute the experts that ``numbers`` describes; ``first`` is any one's ``fc1_weight``."""
        clamped = clamped_swiglu(activation)
        call = FusedCall(
            rows.data_ptr(),
            out.data_ptr(),
            numbers.buffer_info()[0],
            len(numbers) // _NUMBERS,
            first.shape[1],
            first.shape[0],
            _DTYPES[rows.dtype],
            _DTYPES[first.dtype],
            _ACTIVATIONS[activation] if clamped is None else _CLAMPED_SWIGLU,
            extension.level,
            torch.get_num_threads(),
            *(() if clamped is None else (clamped.alpha, clamped.limit, clamped.offset)),
        )
        scratch = self._workspace.take("fused", 1, extension.scratch_bytes(call), torch.uint8)
        extension.run(call, scratch.data_ptr())


def _addresses(expert: ExpertWeights, rows: torch.dtype, converted: list[Tensor]) -> list[int] | None:
    """Where an expert's tensors lie, in the compiled code's order, 0 for none; None if it cannot read one of them.

    Asked anew in each call, as tensors may move between two. ``converted`` keeps biases in the rows' dtype alive.
    """
    matrices = _matrices(expert)
    if matrices is None:
        return None
    pointers, steps = matrices
    for scale in (expert.fc1_scale, expert.gate_scale, expert.fc2_scale):
        pointers.append(0 if scale is None else scale.data_ptr())
    for bias in (expert.fc1_bias, expert.gate_bias, expert.fc2_bias):
        if bias is None:
            pointers.append(0)
            bias_step = 1
        else:
            if bias.dtype != rows:
                bias = bias.to(rows)
                converted.append(bias)
            pointers.append(bias.data_ptr())
            bias_step = bias.stride(0)
        steps.append(bias_step)
    if steps.pop() != 1:
        return None
    return pointers + steps


def _matrices(expert: ExpertWeights) -> tuple[list[int], list[int]] | None:
    """Addresses of ``fc1``, the gate and ``fc2``; and of how they are transposed, three numbers.

    These are the elements from one input to the next of the first matrices and of the second, 0 where nothing is
    transposed; and whether gate and ``fc1`` take turns in one matrix.
    """
    first, gate, second = expert.fc1_weight, expert.gate_weight, expert.fc2_weight
    interleaved, gate_reads_alike = False, True
    step = _step(first)
    if gate is not None:
        if step is None and expert.joined is not None and expert.joined.interleaved:
            step, interleaved = _transposed_step(expert.joined.matrix), True
        else:
            gate_reads_alike = _step(gate) == step
    second_step = _step(second)
    if step is None or second_step is None or not gate_reads_alike:
        return None
    if expert.is_quantized and (step or second_step):
        return None
    pointers = [first.data_ptr(), 0 if gate is None else gate.data_ptr(), second.data_ptr()]
    return pointers, [step, second_step, int(interleaved)]


def _step(matrix: Tensor) -> int | None:
    """0 for rows one after the other; of a transposed matrix, from one column to the next; None for anything else."""
    return 0 if matrix.is_contiguous() else _transposed_step(matrix)


def _transposed_step(matrix: Tensor) -> int | None:
    step = matrix.stride(1)
    return step if matrix.stride(0) == 1 and step >= matrix.shape[0] else None
