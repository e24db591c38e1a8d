"""The expert FFN itself, and stores that keep all experts on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.moe.activations import activate, apply_gate
from fairseq_moe_opt.moe.quantization import dequantize
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, PackedExperts


def compute_dtype(experts: torch.dtype, rows: torch.dtype) -> torch.dtype:
    """What experts with matrices of dtype ``experts`` compute rows of another dtype in: their own, unless int8."""
    return experts if experts.is_floating_point else rows


@dataclass(frozen=True)
class ExpertDropout:
    """Dropout inside an expert in training, as fairseq's ``FeedForwardNetwork`` applies it.

    Attributes:
        hidden: probability after the activation.
        output: probability after ``fc2``.
    """

    hidden: float = 0.0
    output: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.hidden > 0 or self.output > 0


NO_DROPOUT = ExpertDropout()


def expert_ffn(rows: Tensor, expert: ExpertWeights, activation: str, dropout: ExpertDropout = NO_DROPOUT) -> Tensor:
    """``fc2(act(fc1 x))`` of (r, D) rows, gated when the expert has a gate matrix. Differentiable.

    An int8 expert is computed from the floats of the rows' dtype that it stands for: gradients flow through its
    matrices, never into them.
    """
    if expert.is_quantized:
        expert = dequantize(expert, rows.dtype)
    hidden = functional.linear(rows, expert.fc1_weight, expert.fc1_bias)
    if expert.gate_weight is None:
        hidden = activate(activation, hidden)
    else:
        hidden = apply_gate(activation, functional.linear(rows, expert.gate_weight, expert.gate_bias), hidden)
    if dropout.hidden > 0:
        hidden = functional.dropout(hidden, dropout.hidden)
    output = functional.linear(hidden, expert.fc2_weight, expert.fc2_bias)
    return functional.dropout(output, dropout.output) if dropout.output > 0 else output


class ResidentExperts:
    """All experts of a layer as separate tensors on the device; holds references, never copies.

    ``load`` is called for the weights at each use, so an update of the parameters is seen at once.
    """

    def __init__(self, num_experts: int, load: Callable[[int], ExpertWeights]) -> None:
        self._num_experts = num_experts
        self._load = load

    @property
    def num_experts(self) -> int:
        """E."""
        return self._num_experts

    @property
    def dtype(self) -> torch.dtype:
        """Of the first expert's matrices, which is that of all."""
        return self._load(0).fc1_weight.dtype

    @property
    def trainable(self) -> bool:
        """Whether any weight of any expert takes gradients."""
        experts = (self._load(expert) for expert in range(self._num_experts))
        return any(tensor.requires_grad for weights in experts for tensor in weights.tensors())

    @property
    def transient(self) -> bool:
        """False: the weights stay."""
        return False

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """One wave with everything asked for."""
        yield ExpertWave(tuple(needed), tuple(self._load(expert) for expert in needed))


class ResidentPackedExperts:
    """All experts of a layer as one stack a matrix on the device."""

    def __init__(self, packed: PackedExperts) -> None:
        self._packed = packed

    @property
    def num_experts(self) -> int:
        """E."""
        return self._packed.num_experts

    @property
    def packed(self) -> PackedExperts:
        """The stack itself."""
        return self._packed

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self._packed.fc1_weight.dtype

    @property
    def trainable(self) -> bool:
        """Whether any weight takes gradients."""
        return any(tensor.requires_grad for tensor in self._packed.expert(0).tensors())

    @property
    def transient(self) -> bool:
        """False: the weights stay."""
        return False

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """One wave with everything asked for, and the stack."""
        weights = tuple(self._packed.expert(expert) for expert in needed)
        yield ExpertWave(tuple(needed), weights, self._packed)
