"""Values that travel through one Mixture-of-Experts layer.

Shape legend, used in every file of this room:

====  =====================================================================
T     tokens: rows of the layer's input, padding included (the paper's S)
D     model width (the paper's TD)
F     width of an expert's hidden layer (the paper's HD)
E     experts of the layer
K     experts a token chooses
N     routed rows, T * K
R     rows an expert FFN really computes: N less the dropped ones, or those that arrived from all ranks
W     ranks that share the experts
====  =====================================================================

A choice that must not be computed (padding, over capacity, second expert not sampled) has ``expert_index == E`` and
weight 0: it sorts to the tail and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "silu", "gelu_tanh", "relu2")
"""Names of the expert activations this engine computes; ``gelu`` is the exact (erf) form, ``relu2`` is squared ReLU.

Gates with numbers of their own have names as well: see ``moe.activations.ClampedSwiglu``."""


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    Attributes:
        expert_index: (T, K) int64; ``num_experts`` marks a choice that is not computed.
        weight: (T, K) in the model's dtype; 0 where the choice is not computed.
        num_experts: E.
        capacity: rows an expert may serve; None when nothing is ever dropped.
        slot: (T, K) int64, place of the choice in its expert's buffer, ``capacity`` or more for a dropped one;
            None unless the router was asked for it (only the static baseline needs it when nothing is dropped).
        dropped: 0-dim int64, choices lost to capacity; None when nothing can be.
        aux_loss: 0-dim, the load-balancing loss ``l_aux`` of GShard; None unless asked for.
    """

    expert_index: Tensor
    weight: Tensor
    num_experts: int
    capacity: int | None = None
    slot: Tensor | None = None
    dropped: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class SortedChoices:
    """Choices grouped by expert, before anything is known on the host.

    Attributes:
        source: (N,) int64, the token each choice is read from, sorted by expert; those not computed are the tail.
        position: (T, K) int64, place of each choice in that order.
        sizes: (E + 1,) int64, choices of each expert, then those not computed; one number more where choices were lost
            to capacity: how many.
    """

    source: Tensor
    position: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Dispatch:
    """The plan that groups routed rows by expert.

    Attributes:
        source: (R,) int64, the token each sorted row is read from.
        position: (T, K) int64, the sorted row that holds each choice's result; R for a choice not computed.
        counts: rows of each expert, length E, on the host (this is the layer's one device-to-host copy).
        dropped: choices lost to capacity, on the host with the same copy.
    """

    source: Tensor
    position: Tensor
    counts: tuple[int, ...]
    dropped: int = 0

    @property
    def num_rows(self) -> int:
        """R."""
        return self.source.shape[0]


@dataclass(frozen=True)
class Arrival:
    """Rows at the rank that computes them.

    Attributes:
        rows: (R, D), sorted by local slot.
        counts: rows of each local slot, on the host.
        sizes: the sender's ``SortedChoices.sizes``, on the host with the same copy.
        state: what the exchange needs to send results back; nobody else opens it.
    """

    rows: Tensor
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    state: object


@dataclass(frozen=True)
class Segment:
    """Rows ``start:stop`` of the sorted rows, all of one expert; never empty."""

    expert: int
    start: int
    stop: int


class JoinedHalves(NamedTuple):
    """Two (..., F, D) matrices as a ``matrix`` (..., 2F, D): one behind the other, or row by row if ``interleaved``.

    One product with both reads them in one go, and is the only way to multiply by interleaved ones without a copy.
    """

    matrix: Tensor
    interleaved: bool

    def split(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (r, 2F) times the matrix as the two (r, F) views of the halves' own."""
        if self.interleaved:
            return products[:, ::2], products[:, 1::2]
        half = products.shape[1] // 2
        return products[:, :half], products[:, half:]


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: ``fc2(act(fc1 x))``, or ``fc2(act(gate x) * fc1 x)`` when ``gate`` is there.

    Attributes:
        fc1_weight: (F, D); fc1_bias: (F,) or None.
        fc2_weight: (D, F); fc2_bias: (D,) or None.
        gate_weight: (F, D) or None; gate_bias: (F,) or None.
        fc1_scale: (F,) float32 when ``fc1_weight`` is int8, whose row ``i`` then stands for itself times
            ``fc1_scale[i]``; else None. fc2_scale: (D,), gate_scale: (F,), the same.

    All matrices are int8, or none; biases never are.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    gate_weight: Tensor | None = None
    fc1_scale: Tensor | None = None
    fc2_scale: Tensor | None = None
    gate_scale: Tensor | None = None
    gate_bias: Tensor | None = None

    @cached_property
    def joined(self) -> JoinedHalves | None:
        """Gate and ``fc1`` as the one matrix that they lie in; None where they lie apart, or there is no gate."""
        return None if self.gate_weight is None else _join(self.gate_weight, self.fc1_weight)

    @property
    def is_quantized(self) -> bool:
        """Whether the matrices are int8."""
        return self.fc1_scale is not None

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are there, in field order."""
        weights = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, self.gate_weight)
        scales = (self.fc1_scale, self.fc2_scale, self.gate_scale)
        return tuple(tensor for tensor in (*weights, *scales, self.gate_bias) if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @classmethod
    def empty(
        cls,
        model_width: int,
        ffn_width: int,
        *,
        dtype: torch.dtype,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        bias: bool = True,
        gated: bool = False,
        gate_bias: bool = False,
    ) -> ExpertWeights:
        """Uninitialised storage for one expert of D ``model_width`` and F ``ffn_width``.

        With int8 as ``dtype`` it has scales, and biases of ``bias_dtype`` (float32 if not given); otherwise biases are
        of ``dtype`` unless ``bias_dtype`` says so.
        """
        quantized = dtype == torch.int8
        float_dtype = bias_dtype or (torch.float32 if quantized else dtype)

        def vector(width: int, wanted: bool, kind: torch.dtype) -> Tensor | None:
            return torch.empty(width, dtype=kind, device=device) if wanted else None

        return cls(
            torch.empty(ffn_width, model_width, dtype=dtype, device=device),
            vector(ffn_width, bias, float_dtype),
            torch.empty(model_width, ffn_width, dtype=dtype, device=device),
            vector(model_width, bias, float_dtype),
            torch.empty(ffn_width, model_width, dtype=dtype, device=device) if gated else None,
            vector(ffn_width, quantized, torch.float32),
            vector(model_width, quantized, torch.float32),
            vector(ffn_width, quantized and gated, torch.float32),
            vector(ffn_width, gate_bias, float_dtype),
        )


class ExpertKey(NamedTuple):
    """One expert of a model: its layer's name, and its number there."""

    layer: str
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of {self.layer}"


@dataclass(frozen=True)
class ExpertRead:
    """What it took to fetch one expert: the ``tier`` it came from (``file``, ``host`` ...) and the bytes read there."""

    tier: str
    nbytes: int


@dataclass(frozen=True)
class PackedExperts:
    """All experts of a layer in one floating-point tensor a matrix; expert ``e`` is row ``e`` of each.

    Attributes:
        fc1_weight: (E, F, D); fc1_bias: (E, F) or None.
        fc2_weight: (E, D, F); fc2_bias: (E, D) or None.
        gate_weight: (E, F, D) or None; gate_bias: (E, F) or None.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None

    @cached_property
    def joined(self) -> JoinedHalves | None:
        """Gate and ``fc1`` as the one tensor that they lie in, as of one expert."""
        return None if self.gate_weight is None else _join(self.gate_weight, self.fc1_weight)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.fc1_weight.shape[0]

    def expert(self, index: int) -> ExpertWeights:
        """Views of expert ``index``; nothing is copied."""
        return ExpertWeights(
            self.fc1_weight[index],
            None if self.fc1_bias is None else self.fc1_bias[index],
            self.fc2_weight[index],
            None if self.fc2_bias is None else self.fc2_bias[index],
            None if self.gate_weight is None else self.gate_weight[index],
            gate_bias=None if self.gate_bias is None else self.gate_bias[index],
        )

    @classmethod
    def empty(
        cls,
        num_experts: int,
        model_width: int,
        ffn_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        bias: bool = True,
    ) -> PackedExperts:
        """Uninitialised storage for ``num_experts`` ungated experts (D ``model_width``, F ``ffn_width``)."""

        def new(*shape: int) -> Tensor:
            return torch.empty(num_experts, *shape, dtype=dtype, device=device)

        return cls(
            new(ffn_width, model_width),
            new(ffn_width) if bias else None,
            new(model_width, ffn_width),
            new(model_width) if bias else None,
        )


class RoutedResult(NamedTuple):
    """What a kernel made of a whole layer: its (T, D) ``output``, and the (E,) ``counts`` of rows, on the device."""

    output: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ExpertWave:
    """Experts that are in one place together, for a kernel to compute.

    Attributes:
        experts: ids in this wave, in the order of ``weights``.
        weights: the weights of ``experts[i]`` at place i.
        packed: the same as one stack over all E experts, when the store keeps it so; kernels that need it say so.
        on_host: the weights are in main memory instead of on the device, and to be computed there.
    """

    experts: tuple[int, ...]
    weights: tuple[ExpertWeights, ...]
    packed: PackedExperts | None = None
    on_host: bool = False


def _join(first: Tensor, second: Tensor) -> JoinedHalves | None:
    """The tensor that both lie in, if they do so without a gap."""
    alike = first.shape == second.shape and first.stride() == second.stride() and first.dtype == second.dtype
    if not alike or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    *outer, step, inner = first.stride()
    rows, distance = first.shape[-2], second.storage_offset() - first.storage_offset()
    shape = (*first.shape[:-2], 2 * rows, first.shape[-1])
    if distance == rows * step:
        return JoinedHalves(first.as_strided(shape, first.stride(), first.storage_offset()), False)
    if 2 * distance == step:
        return JoinedHalves(first.as_strided(shape, (*outer, distance, inner), first.storage_offset()), True)
    return None
