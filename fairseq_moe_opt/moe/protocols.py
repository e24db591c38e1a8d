"""The seams of the layer: what a router, an expert store and an observer must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager as Context
from typing import Protocol

import torch
from torch import Tensor

from fairseq_moe_opt.moe.exchange_report import ExchangeCounters
from fairseq_moe_opt.moe.types import (
    Arrival,
    Dispatch,
    ExpertKey,
    ExpertRead,
    ExpertWave,
    ExpertWeights,
    PackedExperts,
    RoutedResult,
    Routing,
    Segment,
)


class Router(Protocol):
    """Turns gate logits into a routing; a pure decision, without weights of its own."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def top_k(self) -> int:
        """K."""

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
        """Route (T, E) logits; ``padding`` is (T,) bool, True where a row is padding; weights have ``model_dtype``.

        The rows are those of so many ``sequences`` of equal length, one after the other: a capacity may be of each.
        """


class ExpertStore(Protocol):
    """Where a layer's expert weights are had from. A wave's weights stay valid until the next wave is asked for."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts' matrices: a floating-point one, or int8."""

    @property
    def trainable(self) -> bool:
        """Whether any weight takes gradients."""

    @property
    def transient(self) -> bool:
        """Whether weights are overwritten after their wave, so that no gradient can flow through them later."""

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """Give every expert of ``needed`` (ascending, no repeats) exactly once, in as many waves as memory asks for.

        A store that keeps one stack of them all gives a wave with it even when none is needed.

        ``rows`` is how many rows the call sends to them together, where that is known: few rows mean that the next
        call will want other experts, many that it will want them all. ``counts`` is how many to each of ``needed``;
        only a caller that gives it can compute a wave that is ``on_host``.
        """


class ExpertSource(Protocol):
    """Where experts are fetched from that are not on the device. Several threads call it at the same time."""

    def load(self, key: ExpertKey, into: ExpertWeights) -> ExpertRead:
        """Fill ``into``, whose shapes are the expert's; CheckpointError names the expert and the file at fault."""


class TokenExchange(Protocol):
    """Brings rows to the ranks that hold their experts, and results back. A world of one is an exchange too.

    All ranks call both verbs equally often, in the same order, whether they have rows or not.
    """

    @property
    def num_slots(self) -> int:
        """E_local: experts this rank holds."""

    @property
    def counters(self) -> ExchangeCounters | None:
        """What it sends and receives is added to these; None where nothing ever leaves."""

    def dispatch(self, sizes: Tensor, gather: Callable[[int | None], Tensor]) -> Arrival:
        """Send rows to their experts.

        Args:
            sizes: ``SortedChoices.sizes``: rows of each logical expert, on the device, then what the caller wants on
                the host with the same copy.
            gather: gives the first n rows, or all of them for None, sorted by logical expert, (n, D). It is a function
                so that it can run while the counts are on their way.

        Raises ParallelError when another rank does not take part.
        """

    def combine(self, results: Tensor, state: object) -> Tensor:
        """Send results back to where their rows came from, in the sender's order.

        ``results`` is (R + 1, D), in the order of ``Arrival.rows``, its last row zero; returns (n + 1, D), of as many
        rows as the sender's experts have in ``sizes``, and the zero row again, which choices not computed read.
        """


class PaddedExchange(Protocol):
    """The static baseline's exchange: equal blocks of C rows an expert, whatever is in them."""

    @property
    def num_slots(self) -> int:
        """E_local: experts this rank holds."""

    @property
    def counters(self) -> ExchangeCounters | None:
        """As for ``TokenExchange``."""

    def capacity(self, own: int) -> int:
        """C on all ranks: the largest of what each of them needs."""

    def dispatch(self, buffers: Tensor) -> Tensor:
        """(E, C, D) buffers of this rank's tokens to (E_local, W * C, D), by local expert and source rank."""

    def combine(self, outputs: Tensor) -> Tensor:
        """(E_local, W * C, D) back to (E, C, D)."""


class ExpertKernel(Protocol):
    """Computes expert FFNs over rows sorted by expert."""

    @property
    def name(self) -> str:
        """The name users choose it by."""

    @property
    def needs_packed(self) -> bool:
        """Whether it computes from ``ExpertWave.packed`` instead of the experts' own tensors."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on experts with matrices of ``dtype`` (a floating-point one, or int8); None if it can."""

    def run(self, rows: Tensor, segments: Sequence[Segment], wave: ExpertWave, activation: str, out: Tensor) -> None:
        """Write ``expert(rows[segment])`` into ``out[segment]`` for every segment; both are (R, D)."""


class RoutedKernel(ExpertKernel, Protocol):
    """A kernel that can also compute a layer from its routing alone, without the host learning any count."""

    def run_routed(
        self, rows: Tensor, expert_index: Tensor, weight: Tensor, packed: PackedExperts, activation: str
    ) -> RoutedResult:
        """Sum ``weight[t, k] * expert(rows[t])`` over token t's choices ``expert_index[t, k]``.

        Both are (T, K), rows (T, D); an ``expert_index`` of E is not computed and its weight not read.
        """


class RoutingObserver(Protocol):
    """Is told of every routing; looks, never steers."""

    def observe(self, layer: str, routing: Routing, dispatch: Dispatch) -> None:
        """Called once a forward of layer ``layer``, after planning."""


class StepWatch(Protocol):
    """Runs every step of a layer in a context of its own; looks, never steers."""

    def step(self, layer: str, phase: str, step: str) -> Context[None]:
        """The context of a step of ``report.STEPS``, or of waiting for weights (``report.FETCH``) within one."""

    def exchange(self, layer: str, phase: str, direction: str) -> Context[None]:
        """The context of starting or waiting for a collective of a direction of ``exchange_report.DIRECTIONS``."""
