"""Grouped products by Triton: gather, bias, activation, gate, weight and scatter within two launches a layer.

For CUDA devices and dtypes that torch's ``grouped_mm`` does not take. Beside the verb of every kernel, it computes a
whole layer from its routing (``run_routed``) without the host learning how many rows an expert has: tokens are read
through the order of dispatch instead of being gathered, results are weighted and written where their choice is, and
then summed. The plan of that has a fixed shape (:mod:`.blocks`), so a CUDA graph can capture it.

Whatever is said of results here was checked in Triton's interpreter on a CPU, and its code compiled for GPUs of compute
capability 7.5 to 9.0. It has not run on a GPU yet; tests/gpu has the tests for one. The sizes of blocks are settings
that were reasoned, not measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe.kernels.blocks import plan_choices, plan_segments
from fairseq_moe_opt.moe.types import ExpertWave, PackedExperts, RoutedResult, Segment

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS: Mapping[str, int] = {"relu": 1, "gelu": 2, "silu": 3, "gelu_tanh": 4, "relu2": 5}
_IDENTITY = 0

_OLDEST = (7, 5)
_OLDEST_BFLOAT16 = (8, 0)

_SUM_BLOCK = 1024


class _Tiles(NamedTuple):
    """How much one program computes. Large ones read the weights less often, small ones waste fewer rows."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


class TritonKernel:
    """Floating-point experts packed in one tensor a matrix, of any strides."""

    name = "triton"
    needs_packed = True
    activations = frozenset(_ACTIVATIONS)

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Needs triton, floats of at most 32 bits, and CUDA of capability 7.5 (bfloat16: 8.0), or the interpreter."""
        if dtype not in _DTYPES:
            return f"triton computes float32, float16 and bfloat16 experts, not {dtype}; use kernel='loop'"
        if device.type not in ("cuda", "cpu"):
            return f"triton runs on cuda, not {device.type}; use kernel='loop'"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton); use kernel='loop'"
        if device.type == "cpu":
            return None if _interpreted() else "triton compiles for CUDA devices, not for cpu; use kernel='loop'"
        oldest = _OLDEST_BFLOAT16 if dtype == torch.bfloat16 else _OLDEST
        if torch.cuda.get_device_capability(device) < oldest:
            needed = ".".join(map(str, oldest))
            return f"triton needs a GPU of compute capability {needed} or more for {dtype}; use kernel='loop'"
        return None

    def suits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether ``auto`` may take it, where it can run: not for float16 before compute capability 8.0.

        There Triton's code does without the tensor cores that torch's own products use.
        """
        return dtype != torch.float16 or device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Write every segment's result into its slice of ``out``."""
        if any(expert.is_quantized for expert in wave.weights):
            raise KernelError("kernel 'triton' cannot run: it computes no int8 experts; use kernel='loop'")
        packed = wave.packed
        if packed is None:
            raise KernelError("kernel 'triton' needs experts packed in one tensor; this store keeps them apart")
        tiles = _tiles(sum(s.stop - s.start for s in segments), len(segments), rows.dtype)
        call = _Call(packed, plan_segments(segments, tiles.rows, rows.device), tiles, activation)
        hidden = rows.new_empty(rows.shape[0], packed.fc1_weight.shape[1])
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            call.first(rows, hidden)
            call.second(hidden, out)

    def run_routed(
        self, rows: Tensor, expert_index: Tensor, weight: Tensor, packed: PackedExperts, activation: str
    ) -> RoutedResult:
        """A layer's (T, D) output from its tokens and their choices; asks the device nothing."""
        num_tokens, top_k = expert_index.shape
        num_choices, num_experts = expert_index.numel(), packed.num_experts
        tiles = _tiles(num_choices, num_experts, rows.dtype)
        order, blocks, counts = plan_choices(expert_index, num_experts, tiles.rows)
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        if output.numel() == 0:
            return RoutedResult(output, counts)
        call = _Call(packed, blocks, tiles, activation)
        hidden = rows.new_empty(num_choices, packed.fc1_weight.shape[1])
        results = rows.new_empty(num_choices, rows.shape[1])
        grid = (num_tokens, -(-rows.shape[1] // _SUM_BLOCK))
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            call.first(rows, hidden, order, top_k)
            call.second(hidden, results, order, weight.reshape(-1))
            _code().sum_choices[grid](
                results, expert_index.contiguous(), output, rows.shape[1], num_experts, top_k=top_k, block=_SUM_BLOCK
            )
        return RoutedResult(output, counts)


class _Call:
    """Both products of one call."""

    def __init__(self, packed: PackedExperts, blocks: Tensor, tiles: _Tiles, activation: str) -> None:
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise KernelError(
                f"kernel 'triton' cannot run: it computes {known}, not the activation {activation!r}; use kernel='loop'"
            )
        self._packed, self._blocks, self._tiles = packed, blocks, tiles
        self._activation = _ACTIVATIONS[activation]

    def first(self, rows: Tensor, hidden: Tensor, order: Tensor | None = None, top_k: int = 1) -> None:
        """From the sorted ``rows``, or those that ``order`` names, to (N, F)."""
        one = self._packed
        self._launch(
            rows,
            one.fc1_weight,
            one.fc1_bias,
            hidden,
            gate=one.gate_weight,
            gate_bias=one.gate_bias,
            order=order,
            gathers=order is not None,
            top_k=top_k,
            activation=self._activation,
        )

    def second(self, hidden: Tensor, out: Tensor, order: Tensor | None = None, weight: Tensor | None = None) -> None:
        """From (N, F) to the sorted rows of ``out``, or, times ``weight``, to those that ``order`` names."""
        one = self._packed
        self._launch(hidden, one.fc2_weight, one.fc2_bias, out, order=order, scatters=order is not None, weight=weight)

    def _launch(
        self,
        left: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        out: Tensor,
        *,
        gate: Tensor | None = None,
        gate_bias: Tensor | None = None,
        order: Tensor | None = None,
        weight: Tensor | None = None,
        gathers: bool = False,
        scatters: bool = False,
        top_k: int = 1,
        activation: int = _IDENTITY,
    ) -> None:
        tiles, num_blocks, num_outputs = self._tiles, self._blocks.shape[1], matrix.shape[1]
        if left.stride(1) != 1:
            left = left.contiguous()
        if out.stride(1) != 1:
            raise KernelError("kernel 'triton' writes rows whose elements lie side by side")

        def given(tensor: Tensor | None) -> Tensor:
            # Code that would read a tensor that is not there is left out; the argument has to be some tensor.
            return left if tensor is None else tensor

        def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
            return (0,) * count if tensor is None else tensor.stride()

        _code().grouped_product[num_blocks, -(-num_outputs // tiles.outputs)](
            left,
            given(order),
            self._blocks,
            matrix,
            given(bias),
            given(gate),
            given(gate_bias),
            given(weight),
            out,
            strides(matrix, 3),
            strides(bias, 2),
            strides(gate, 3),
            strides(gate_bias, 2),
            left.stride(0),
            out.stride(0),
            matrix.shape[2],
            num_outputs,
            self._packed.num_experts,
            num_blocks,
            top_k=top_k,
            gathers=gathers,
            scatters=scatters,
            weighted=weight is not None,
            has_bias=bias is not None,
            gated=gate is not None,
            has_gate_bias=gate_bias is not None,
            activation=activation,
            widens=left.dtype == torch.bfloat16 and left.device.type == "cpu",
            block_rows=tiles.rows,
            block_outputs=tiles.outputs,
            block_inputs=tiles.inputs,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _tiles(num_rows: int, num_experts: int, dtype: torch.dtype) -> _Tiles:
    """Tiles for so many rows over so many experts: reasoned from shared memory (64 KiB to 99 KiB), not measured."""
    mean = -(-num_rows // max(num_experts, 1))
    if dtype == torch.float32:
        return _Tiles(16, 64, 64, 4, 2) if mean <= 16 else _Tiles(32 if mean <= 32 else 64, 64, 32, 4, 2)
    if mean <= 16:
        return _Tiles(16, 64, 128, 4, 3)
    return _Tiles(32 if mean <= 32 else 64, 64, 64, 4, 3) if mean < 128 else _Tiles(128, 64, 64, 8, 3)


@cache
def _code() -> Any:
    """The device code; importing it is what imports triton."""
    return importlib.import_module("fairseq_moe_opt.moe.kernels.triton_code")


def _interpreted() -> bool:
    """Whether the device code runs in Triton's interpreter, for which a CPU will do: triton's own rule."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
