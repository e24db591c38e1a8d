"""Routers: gate logits to a :class:`Routing`.

The rules are those of fairseq's ``nllb`` and ``moe`` branches (``top2gate.py``, ``top1gate.py``) and, for
``SoftmaxTopKRouter``, of Mixtral-style models. They are pure: no weights, no state but torch's random generator where a
policy draws (``sampling`` and ``random`` draw at evaluation too, as in fairseq).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_opt.errors import MoEError, OptionError
from fairseq_moe_opt.moe.types import Routing

SECOND_EXPERT_POLICIES = ("all", "sampling", "random")


@dataclass(frozen=True)
class CapacityRule:
    """How many rows an expert may serve, as the checkpoint's options say it.

    Attributes:
        eval_token_fraction: at evaluation, C = ceil(fraction * T); zero or less means the training formula.
        fixed: used in place of the training formula when given (Transformers' ``expert_capacity``).
        eval_length: when given, C = ceil(fraction * eval_length) instead of ceil(fraction * T)
            (fairseq's ``moe_eval_capacity_max_seqlen``: maximal positions times batch).
        per_sequence: every sequence of a batch has C rows of each expert to itself (Switch Transformers); T is then
            its length.
    """

    eval_token_fraction: float = 1.0
    fixed: int | None = None
    eval_length: int | None = None
    per_sequence: bool = False

    def capacity(self, num_tokens: int, num_experts: int, top_k: int, *, training: bool) -> int:
        """C for ``num_tokens`` rows, padding included. Training formula: K * ceil(T / E)."""
        if not training and self.eval_token_fraction > 0:
            return math.ceil(self.eval_token_fraction * (self.eval_length or num_tokens))
        if self.fixed is not None:
            return self.fixed
        return top_k * math.ceil(num_tokens / num_experts)


def first_come_slots(expert_index: Tensor, num_experts: int, row_order: Tensor | None = None) -> Tensor:
    """Place of every choice in its expert's buffer: all first choices before all second ones, rows in ``row_order``.

    ``expert_index`` is (T, K) with ``num_experts`` for choices not routed; ``row_order`` is a permutation (T,) or None
    for row order. Returns (T, K) int64. The same numbers as a cumulative sum over one-hot masks, without the masks.
    """
    num_tokens, top_k = expert_index.shape
    ordered = expert_index if row_order is None else expert_index[row_order]
    queue = ordered.t().reshape(-1)
    order = torch.argsort(queue, stable=True)
    counts = torch.bincount(queue, minlength=num_experts + 1)
    starts = torch.cumsum(counts, 0) - counts
    slots = torch.empty_like(queue)
    slots[order] = torch.arange(queue.numel(), device=queue.device) - starts[queue[order]]
    slots = slots.view(top_k, num_tokens).t()
    if row_order is None:
        return slots.contiguous()
    by_row = torch.empty_like(slots)
    by_row[row_order] = slots
    return by_row


def load_balancing_loss(probabilities: Tensor, first_choice: Tensor) -> Tensor:
    """GShard's ``l_aux`` = E^2 * mean_e(mean_t g[t, e] * mean_t [e1(t) = e]); means run over all T rows.

    ``probabilities`` is (T, E); ``first_choice`` (T,) holds E for padding. Capacity plays no part.
    """
    num_tokens, num_experts = probabilities.shape
    counts = torch.bincount(first_choice, minlength=num_experts + 1)[:num_experts]
    share = counts.to(probabilities.dtype) / max(num_tokens, 1)
    return (probabilities.mean(dim=0) * share).mean() * num_experts * num_experts


@dataclass(frozen=True)
class _Served:
    """What is left of (T, K) choices under a capacity; the fields are those of :class:`Routing`."""

    index: Tensor
    capacity: int | None
    slot: Tensor | None
    dropped: Tensor | None


def _serve(
    rule: CapacityRule | None,
    index: Tensor,
    num_experts: int,
    *,
    training: bool,
    with_slots: bool,
    sequences: int | None = None,
    row_order: Callable[[], Tensor | None] = lambda: None,
) -> _Served:
    """Give every choice a slot in its expert's buffer, and send those beyond the capacity to expert E.

    Slots are computed only where they are wanted or can matter: a token's experts differ, so none is asked for more
    than T rows, and a capacity of T or more drops nothing.
    """
    if rule is not None and rule.per_sequence and sequences is not None and sequences > 1:
        return _serve_apart(
            rule,
            index,
            num_experts,
            training=training,
            with_slots=with_slots,
            sequences=sequences,
            row_order=row_order,
        )
    num_tokens, top_k = index.shape
    capacity = None if rule is None else rule.capacity(num_tokens, num_experts, top_k, training=training)
    can_bind = capacity is not None and capacity < num_tokens
    if not (with_slots or can_bind):
        return _Served(index, capacity, None, None)
    slots = first_come_slots(index, num_experts, row_order())
    if capacity is None:
        return _Served(index, None, slots, None)
    over = (slots >= capacity) & (index != num_experts)
    return _Served(index.masked_fill(over, num_experts), capacity, slots, over.sum())


def _serve_apart(
    rule: CapacityRule,
    index: Tensor,
    num_experts: int,
    *,
    training: bool,
    with_slots: bool,
    sequences: int,
    row_order: Callable[[], Tensor | None],
) -> _Served:
    """``_serve`` with C rows an expert for every one of so many ``sequences`` of equal length.

    An expert's buffer has a part of C slots for each of them.
    """
    num_tokens, top_k = index.shape
    length = num_tokens // sequences
    capacity = rule.capacity(length, num_experts, top_k, training=training)
    if not (with_slots or capacity < length):
        return _Served(index, capacity * sequences, None, None)
    sequence = torch.arange(sequences, device=index.device).repeat_interleave(length).unsqueeze(1)
    # Each sequence's experts as if they were experts of their own, the one for choices not routed among them.
    apart = index + sequence * (num_experts + 1)
    slots = first_come_slots(apart, sequences * (num_experts + 1) - 1, row_order())
    full = slots >= capacity
    over = full & (index != num_experts)
    slots = torch.where(full, capacity * sequences, slots + sequence * capacity)
    return _Served(index.masked_fill(over, num_experts), capacity * sequences, slots, over.sum())


def _normalised(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    denominator = (first + second).clamp_min(torch.finfo(first.dtype).eps)
    return first / denominator, second / denominator


@dataclass(frozen=True)
class GShardTop2Router:
    """Top-2 routing of GShard as fairseq's branches compute it.

    Attributes:
        num_experts: E, at least 2.
        capacity: the dropping rule, or None: nothing is ever dropped.
        second_expert_policy: ``all`` keeps the second expert; ``random`` keeps it when 2 * g2 > U(0, 1); ``sampling``
            chooses it by Gumbel noise. Both draw afresh at every call.
        normalize_before_dropping: normalise the two gate values before (True) or after (False) capacity drops choices.
        batch_prioritized: serve rows by descending highest probability instead of row order.
        fp32_gating: softmax in float32 whatever the logits' dtype.
        round_early: round probabilities to the model's dtype before choosing and normalising, as Transformers does,
            instead of after, as fairseq does.
    """

    num_experts: int
    capacity: CapacityRule | None = None
    second_expert_policy: str = "all"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    fp32_gating: bool = True
    round_early: bool = False

    def __post_init__(self) -> None:
        if self.second_expert_policy not in SECOND_EXPERT_POLICIES:
            known = ", ".join(SECOND_EXPERT_POLICIES)
            raise OptionError("second_expert_policy", f"{self.second_expert_policy!r} is not one of {known}")
        if self.num_experts < 2:
            raise OptionError("num_experts", f"top-2 routing needs at least 2 experts, not {self.num_experts}")

    @property
    def top_k(self) -> int:
        """2."""
        return 2

    def route(
        self,
        logits: Tensor,
        padding: Tensor | None = None,
        *,
        training: bool = False,
        model_dtype: torch.dtype | None = None,
        with_slots: bool = False,
        with_aux_loss: bool = False,
        sequences: int | None = None,
    ) -> Routing:
        """Route (T, E) logits; ``padding`` (T,) bool marks rows that go nowhere.

        Weights have ``model_dtype``, the logits' own when it is not given.
        """
        model_dtype = model_dtype or logits.dtype
        gate_logits = logits.float() if self.fp32_gating else logits
        probabilities = torch.softmax(gate_logits, dim=-1)
        if self.round_early:
            probabilities = probabilities.to(model_dtype)
        index = self._choose(gate_logits, probabilities)
        gates = probabilities.gather(1, index)
        first, second = gates.unbind(1)
        if self.normalize_before_dropping:
            first, second = _normalised(first, second)
        index = self._mask(index, second, padding)
        aux_loss = load_balancing_loss(probabilities, index[:, 0]) if with_aux_loss else None
        served = _serve(
            self.capacity,
            index,
            self.num_experts,
            training=training,
            with_slots=with_slots,
            sequences=sequences,
            row_order=lambda: self._row_order(probabilities),
        )
        weight = self._weights(served.index, first, second).to(model_dtype)
        return Routing(served.index, weight, self.num_experts, served.capacity, served.slot, served.dropped, aux_loss)

    def _choose(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """(T, 2): the argmax of the probabilities, and the argmax of the (noisy) logits without it."""
        first = probabilities.argmax(dim=-1, keepdim=True)
        if self.second_expert_policy == "sampling":
            uniform = torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny)
            logits = logits - torch.log(-torch.log(uniform))
        others = logits.scatter(1, first, float("-inf"))
        return torch.cat((first, others.argmax(dim=-1, keepdim=True)), dim=1)

    def _mask(self, index: Tensor, second: Tensor, padding: Tensor | None) -> Tensor:
        """Send second experts that were not drawn, and padding rows, to expert E."""
        if self.second_expert_policy == "random":
            dropped = 2 * second <= torch.rand_like(second)
            index = torch.stack((index[:, 0], index[:, 1].masked_fill(dropped, self.num_experts)), dim=1)
        return index if padding is None else index.masked_fill(padding.unsqueeze(1), self.num_experts)

    def _row_order(self, probabilities: Tensor) -> Tensor | None:
        """(T,) rows by descending highest probability under batch-prioritized routing, else None: their own order."""
        return torch.argsort(-probabilities.amax(dim=1), dim=0) if self.batch_prioritized else None

    def _weights(self, index: Tensor, first: Tensor, second: Tensor) -> Tensor:
        kept = index != self.num_experts
        first, second = first * kept[:, 0], second * kept[:, 1]
        if not self.normalize_before_dropping:
            first, second = _normalised(first, second)
        return torch.stack((first, second), dim=1)


@dataclass(frozen=True)
class Top1Router:
    """Top-1 routing of the branches (Switch-style): the weight is the raw softmax probability.

    Attributes:
        num_experts: E.
        capacity: the dropping rule, or None.
        fp32_gating: softmax in float32 whatever the logits' dtype.
        round_early: round probabilities to the model's dtype before the choice, as Transformers does.
    """

    num_experts: int
    capacity: CapacityRule | None = None
    fp32_gating: bool = True
    round_early: bool = False

    @property
    def top_k(self) -> int:
        """1."""
        return 1

    def route(
        self,
        logits: Tensor,
        padding: Tensor | None = None,
        *,
        training: bool = False,
        model_dtype: torch.dtype | None = None,
        with_slots: bool = False,
        with_aux_loss: bool = False,
        sequences: int | None = None,
    ) -> Routing:
        """Route (T, E) logits; ``padding`` (T,) bool marks rows that go nowhere.

        Weights have ``model_dtype``, the logits' own when it is not given.
        """
        probabilities = torch.softmax(logits.float() if self.fp32_gating else logits, dim=-1)
        if self.round_early:
            probabilities = probabilities.to(model_dtype or logits.dtype)
        weight, index = probabilities.max(dim=-1, keepdim=True)
        if padding is not None:
            index = index.masked_fill(padding.unsqueeze(1), self.num_experts)
        aux_loss = load_balancing_loss(probabilities, index[:, 0]) if with_aux_loss else None
        served = _serve(
            self.capacity, index, self.num_experts, training=training, with_slots=with_slots, sequences=sequences
        )
        weight = (weight * (served.index != self.num_experts)).to(model_dtype or logits.dtype)
        return Routing(served.index, weight, self.num_experts, served.capacity, served.slot, served.dropped, aux_loss)


@dataclass(frozen=True)
class SoftmaxTopKRouter:
    """Softmax over all experts, the K largest kept, nothing dropped (Mixtral, Qwen-MoE, OLMoE).

    Attributes:
        num_experts: E.
        top_k: K, from 1 to E.
        normalize: divide the K weights by their sum.
    """

    num_experts: int
    top_k: int = 2
    normalize: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise OptionError("top_k", f"{self.top_k} is not between 1 and num_experts={self.num_experts}")

    def route(
        self,
        logits: Tensor,
        padding: Tensor | None = None,
        *,
        training: bool = False,
        model_dtype: torch.dtype | None = None,
        with_slots: bool = False,
        with_aux_loss: bool = False,
        sequences: int | None = None,
    ) -> Routing:
        """Route (T, E) logits; ``padding`` (T,) bool marks rows that go nowhere. ``training`` changes nothing here."""
        probabilities = torch.softmax(logits.float(), dim=-1)
        weight, index = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        if padding is not None:
            index = index.masked_fill(padding.unsqueeze(1), self.num_experts)
            weight = weight.masked_fill(padding.unsqueeze(1), 0.0)
        slots = first_come_slots(index, self.num_experts) if with_slots else None
        aux_loss = load_balancing_loss(probabilities, index[:, 0]) if with_aux_loss else None
        weight = weight.to(model_dtype or logits.dtype)
        return Routing(index, weight, self.num_experts, None, slots, None, aux_loss)


@dataclass(frozen=True)
class GivenRouting:
    """A place holder where the host model routes: it hands ``MoELayer.apply`` a routing of its own.

    Attributes:
        num_experts: E.
        top_k: K.
    """

    num_experts: int
    top_k: int

    def route(
        self,
        logits: Tensor,
        padding: Tensor | None = None,
        *,
        training: bool = False,
        model_dtype: torch.dtype | None = None,
        with_slots: bool = False,
        with_aux_loss: bool = False,
        sequences: int | None = None,
    ) -> Routing:
        """Never asked."""
        raise MoEError("the host model routes, this layer is given its choices")
