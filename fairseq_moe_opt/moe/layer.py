"""The Mixture-of-Experts layer: router -> dispatch -> exchange -> experts -> exchange -> combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe import dispatch as dispatching
from fairseq_moe_opt.moe.activations import check_activation
from fairseq_moe_opt.moe.experts import NO_DROPOUT, ExpertDropout, compute_dtype, expert_ffn
from fairseq_moe_opt.moe.host_waves import HostWaves
from fairseq_moe_opt.moe.kernels import choose_kernel, get_kernel
from fairseq_moe_opt.moe.local_exchange import LocalExchange, LocalPaddedExchange
from fairseq_moe_opt.moe.protocols import (
    ExpertKernel,
    ExpertStore,
    PaddedExchange,
    RoutedKernel,
    Router,
    RoutingObserver,
    StepWatch,
    TokenExchange,
)
from fairseq_moe_opt.moe.report import LayerCounters, Watch
from fairseq_moe_opt.moe.static_gating import static_moe
from fairseq_moe_opt.moe.types import Dispatch, ExpertWave, ExpertWeights, PackedExperts, Routing, Segment


@dataclass(frozen=True)
class LayerConfig:
    """What a layer computes, apart from its weights.

    Attributes:
        activation: of the experts, a name of ``ACTIVATIONS``, or of a gate.
        gating: ``dynamic`` (only real rows are computed) or ``static`` (the paper's padded baseline).
        kernel: a registered kernel's name or ``auto``.
        expert_masking: EOM probability p of the NLLB branch: expert outputs are multiplied by 1 - p at evaluation and
            whole expert rows are zeroed with probability p in training.
        final_masking: FOM probability, the same on the layer's output, token by token in training.
        dropout: inside each expert, in training.
        checkpoint_capacity: rows an expert may serve at evaluation by the checkpoint's own rule, as a share of a
            batch's: what is said of it, whatever the router does. None where it has no such rule.
    """

    activation: str = "relu"
    gating: str = "dynamic"
    kernel: str = "auto"
    expert_masking: float = 0.0
    final_masking: float = 0.0
    dropout: ExpertDropout = NO_DROPOUT
    checkpoint_capacity: float | None = None

    def __post_init__(self) -> None:
        check_activation(self.activation)


@dataclass(frozen=True)
class LayerOutput:
    """A forward's result: ``output`` (T, D) in the input's dtype, the ``routing``, and the gate's ``logits`` (T, E)."""

    output: Tensor
    routing: Routing
    logits: Tensor


class MoELayer:
    """One layer over (T, D) tokens.

    It owns no parameters: ``gate`` maps tokens to (T, E) logits and ``store`` gives experts, so a host model keeps its
    own modules and state dict. Experts may be spread over ranks: ``exchange`` (``padded_exchange`` for static gating)
    then brings rows to them, and ``store`` holds this rank's alone, by slot.

    Attributes:
        look_ahead: is told the (T, D) tokens and the number of routed rows of each forward when that is computed.
    """

    def __init__(
        self,
        gate: Callable[[Tensor], Tensor],
        router: Router,
        store: ExpertStore,
        config: LayerConfig,
        counters: LayerCounters,
        observers: Iterable[RoutingObserver] = (),
        *,
        exchange: TokenExchange | None = None,
        padded_exchange: PaddedExchange | None = None,
    ) -> None:
        self.exchange = exchange or LocalExchange(router.num_experts)
        self.padded_exchange = padded_exchange or LocalPaddedExchange(router.num_experts)
        self.router = router
        self.store = store
        self.config = config
        self.counters = counters
        self._gate = gate
        self.look_ahead: Callable[[Tensor, int], None] | None = None
        self._observers = tuple(observers)
        self._kernels: dict[tuple[torch.device, torch.dtype], str] = {}

    def observe(self, observer: RoutingObserver) -> None:
        """Tell ``observer`` of every routing from now on."""
        self._observers = (*self._observers, observer)

    def watch(self, watch: StepWatch | None) -> None:
        """Tell ``watch`` of every step from now on; None ends that, and leaves nothing behind."""
        counters, exchanges = self.counters, (self.exchange, self.padded_exchange)
        name, phase = counters.name, counters.phase
        counters.watch = None if watch is None else partial(watch.step, name, phase)
        for exchange in exchanges:
            if exchange.counters is not None:
                exchange.counters.watch = None if watch is None else partial(watch.exchange, name, phase)

    def watch_experts(self, watch: Watch | None) -> None:
        """Run the experts of a wave one at a time, each in the context that ``watch`` gives for its number; or not."""
        self.counters.expert_watch = watch

    def stop_observing(self, observer: RoutingObserver) -> None:
        """Tell ``observer`` nothing any more; one that was told nothing anyway changes nothing."""
        self._observers = tuple(one for one in self._observers if one is not observer)

    def __call__(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        *,
        training: bool = False,
        with_aux_loss: bool = False,
        sequences: int | None = None,
    ) -> LayerOutput:
        """Run the layer on (T, D) ``tokens``; ``padding`` (T,) bool marks rows that are routed nowhere (output 0).

        With ``sequences``, the tokens are those of so many of equal length, one after the other. The gate is then given
        them as (sequences, length, D), and a capacity rule that is one of each sequence binds as such.
        """
        with self.counters.timed("routing", tokens.device):
            if sequences is None:
                logits = self._gate(tokens)
            else:
                shaped = tokens.view(sequences, tokens.shape[0] // max(sequences, 1), tokens.shape[1])
                logits = self._gate(shaped).view(tokens.shape[0], self.router.num_experts)
            routing = self.router.route(
                logits,
                padding,
                training=training,
                model_dtype=tokens.dtype,
                with_slots=self.config.gating == "static",
                with_aux_loss=with_aux_loss,
                sequences=sequences,
            )
        output = self.apply(tokens, routing, training=training)
        return LayerOutput(output, routing, logits)

    def apply(self, tokens: Tensor, routing: Routing, *, training: bool = False) -> Tensor:
        """Everything after routing: (T, D) tokens sent as ``routing`` says, back as (T, D)."""
        dropout = self.config.dropout if training else NO_DROPOUT
        compute = self._static if self.config.gating == "static" else self._dynamic
        return self._final(compute(tokens, routing, self._masked(routing, training), dropout), training)

    def _static(self, tokens: Tensor, routing: Routing, masked: Routing, dropout: ExpertDropout) -> Tensor:
        with self.counters.timed("dispatch", tokens.device):
            plan = dispatching.plan(routing)
        timed = partial(self.counters.timed, device=tokens.device)
        output, computed = static_moe(
            tokens, masked, self.store, self.config.activation, self.padded_exchange, dropout, timed
        )
        self._count(tokens, routing, plan, computed, "static")
        self._tell_what_is_next(tokens, plan)
        return output

    def _dynamic(self, tokens: Tensor, routing: Routing, masked: Routing, dropout: ExpertDropout) -> Tensor:
        # Kernels compute no dropout.
        autograd = dropout.is_on or self._wants_autograd(tokens)
        routed = None if autograd else self._routed(tokens, routing, masked)
        if routed is not None:
            return routed
        with self.counters.timed("dispatch", tokens.device):
            rows = tokens.to(compute_dtype(self.store.dtype, tokens.dtype))
            choices = dispatching.sort(routing)
            arrival = self.exchange.dispatch(choices.sizes, partial(dispatching.gather, rows, choices.source))
            plan = dispatching.settle(choices, arrival.sizes, routing.num_experts)
        kernel = "autograd" if autograd else self._kernel(tokens).name
        self._count(tokens, routing, plan, arrival.rows.shape[0], kernel)
        with self.counters.timed("experts", tokens.device):
            compute = partial(self._experts_autograd, dropout) if autograd else self._experts
            results = compute(arrival.rows, dispatching.segments(arrival.counts))
        self._tell_what_is_next(tokens, plan)
        with self.counters.timed("combine", tokens.device):
            returned = self.exchange.combine(results, arrival.state).to(tokens.dtype)
            return dispatching.combine(returned, plan, masked.weight)

    def _routed(self, tokens: Tensor, routing: Routing, masked: Routing) -> Tensor | None:
        """All of the above in one go of a kernel that can do so, which never waits for the device.

        None where it cannot, or where someone else wants to know what the host then does not: how many rows an expert
        has. A profile has all of it under ``experts``.
        """
        kernel = self._kernel(tokens)
        if not hasattr(kernel, "run_routed") or not isinstance(self.exchange, LocalExchange):
            return None
        if self._observers or self.look_ahead is not None or self.counters.expert_watch is not None:
            return None
        packed = _stack_of(self.store)
        if packed is None:
            return None
        with self.counters.timed("experts", tokens.device):
            rows = tokens.to(compute_dtype(self.store.dtype, tokens.dtype))
            compute = cast(RoutedKernel, kernel).run_routed
            output, counts = compute(rows, routing.expert_index, masked.weight, packed, self.config.activation)
        self.counters.add_later(tokens.shape[0], counts, routing.dropped, kernel.name)
        return output.to(tokens.dtype)

    def _tell_what_is_next(self, tokens: Tensor, plan: Dispatch) -> None:
        """When this layer's experts are computed: what is fetched for the next one must not be in their way."""
        if self.look_ahead is not None:
            self.look_ahead(tokens, plan.num_rows)

    def _experts(self, rows: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """(R, D) sorted rows to (R + 1, D) results; the last row is zero, for choices that are not computed."""
        results = rows.new_empty(rows.shape[0] + 1, rows.shape[1])
        results[-1] = 0
        if not segments:  # nothing was sent here, or no expert is
            return results
        kernel = self._kernel(rows)
        on_host = HostWaves(rows, kernel)
        by_expert = {segment.expert: segment for segment in segments}
        counts = tuple(segment.stop - segment.start for segment in segments)
        for wave in self.counters.fetching(self.store.waves(tuple(by_expert), rows.shape[0], counts)):
            due = tuple(by_expert[expert] for expert in wave.experts)
            if wave.on_host:
                on_host.run(due, wave, self.config.activation, results[:-1])
            else:
                self._run(kernel, rows, due, wave, results[:-1])
        return results

    def _run(
        self, kernel: ExpertKernel, rows: Tensor, due: Sequence[Segment], wave: ExpertWave, results: Tensor
    ) -> None:
        """All experts of a wave in one go, or one by one where each is to be timed."""
        watch = self.counters.expert_watch
        if watch is None:
            kernel.run(rows, due, wave, self.config.activation, results)
            return
        for segment in due:
            with watch(str(segment.expert)):
                kernel.run(rows, (segment,), wave, self.config.activation, results)

    def _experts_autograd(self, dropout: ExpertDropout, rows: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """The same with gradients, dropout and under autocast: results concatenated instead of written in place."""
        activation = self.config.activation
        # One split, not a slice an expert: the backward of a slice fills a tensor of all rows with zeros.
        pieces = torch.split_with_sizes(rows, [segment.stop - segment.start for segment in segments])
        by_expert = dict(zip((segment.expert for segment in segments), pieces, strict=True))
        parts: dict[int, Tensor] = {}
        for wave in self.store.waves(tuple(by_expert), rows.shape[0]):
            for expert, weights in zip(wave.experts, wave.weights, strict=True):
                parts[expert] = expert_ffn(by_expert[expert], weights, activation, dropout).to(rows.dtype)
        return torch.cat([*(parts[segment.expert] for segment in segments), rows.new_zeros(1, rows.shape[1])])

    def _wants_autograd(self, tokens: Tensor) -> bool:
        wanted = torch.is_grad_enabled() and (tokens.requires_grad or self.store.trainable)
        if wanted and self.store.transient:
            raise KernelError(
                f"{self.counters.name}: gradients are wanted, but buffered experts are overwritten after use; "
                "run under torch.no_grad(), or load with expert_memory='all'"
            )
        return wanted or torch.is_autocast_enabled(tokens.device.type)

    def _kernel(self, rows: Tensor) -> ExpertKernel:
        key = (rows.device, self.store.dtype)
        if key not in self._kernels:
            self._kernels[key] = choose_kernel(
                self.config.kernel,
                *key,
                activation=self.config.activation,
                apart=_stack_of(self.store) is None,
                example=_example(self.store),
            ).name
        return get_kernel(self._kernels[key])

    def _count(self, tokens: Tensor, routing: Routing, plan: Dispatch, computed: int, kernel: str) -> None:
        """Count the sender's tokens and choices, and the rows this rank computes, whoever sent them."""
        self.counters.add(tokens.shape[0], plan, computed, kernel)
        for observer in self._observers:
            observer.observe(self.counters.name, routing, plan)

    def _masked(self, routing: Routing, training: bool) -> Routing:
        """Expert output masking, folded into the weights: scaling an expert's row is scaling its weight."""
        probability = self.config.expert_masking
        if probability == 0:
            return routing
        if training:
            weight = routing.weight * (torch.rand_like(routing.weight) >= probability)
        else:
            weight = routing.weight * (1 - probability)
        return replace(routing, weight=weight)

    def _final(self, output: Tensor, training: bool) -> Tensor:
        probability = self.config.final_masking
        if probability == 0:
            return output
        if training:
            return output * (torch.rand_like(output[:, :1]) >= probability)
        return output * (1 - probability)


def _stack_of(store: ExpertStore) -> PackedExperts | None:
    """All experts as one stack, from a store that keeps them so."""
    return None if store.transient else next((wave.packed for wave in store.waves(())), None)


def _example(store: ExpertStore) -> ExpertWeights | None:
    """An expert as all of a store's lie in memory; None where one would have to be read for that."""
    if store.transient or not store.num_experts:
        return None
    return next((expert for wave in store.waves((0,)) for expert in wave.weights), None)
