"""The Mixture-of-Experts layer: router -> dispatch -> experts -> combine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe import dispatch as dispatching
from fairseq_moe_opt.moe.experts import NO_DROPOUT, ExpertDropout, check_activation, compute_dtype, expert_ffn
from fairseq_moe_opt.moe.kernels import choose_kernel, get_kernel
from fairseq_moe_opt.moe.protocols import ExpertKernel, ExpertStore, Router, RoutingObserver
from fairseq_moe_opt.moe.report import LayerCounters
from fairseq_moe_opt.moe.static_gating import static_moe
from fairseq_moe_opt.moe.types import Dispatch, Routing, Segment


@dataclass(frozen=True)
class LayerConfig:
    """What a layer computes, apart from its weights.

    Attributes:
        activation: of the experts, a name of ``ACTIVATIONS``.
        gating: ``dynamic`` (only real rows are computed) or ``static`` (the paper's padded baseline).
        kernel: a registered kernel's name or ``auto``.
        expert_masking: EOM probability p of the NLLB branch: expert outputs are multiplied by 1 - p at evaluation and
            whole expert rows are zeroed with probability p in training.
        final_masking: FOM probability, the same on the layer's output, token by token in training.
        dropout: inside each expert, in training.
    """

    activation: str = "relu"
    gating: str = "dynamic"
    kernel: str = "auto"
    expert_masking: float = 0.0
    final_masking: float = 0.0
    dropout: ExpertDropout = NO_DROPOUT

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
    own modules and state dict.

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
    ) -> None:
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

    def __call__(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        *,
        training: bool = False,
        with_aux_loss: bool = False,
    ) -> LayerOutput:
        """Run the layer on (T, D) ``tokens``; ``padding`` (T,) bool marks rows that are routed nowhere (output 0)."""
        with self.counters.timed("routing", tokens.device):
            logits = self._gate(tokens)
            routing = self.router.route(
                logits,
                padding,
                training=training,
                model_dtype=tokens.dtype,
                with_slots=self.config.gating == "static",
                with_aux_loss=with_aux_loss,
            )
        output = self.apply(tokens, routing, training=training)
        return LayerOutput(output, routing, logits)

    def apply(self, tokens: Tensor, routing: Routing, *, training: bool = False) -> Tensor:
        """Everything after routing: (T, D) tokens sent as ``routing`` says, back as (T, D)."""
        with self.counters.timed("dispatch", tokens.device):
            plan = dispatching.plan(routing)
        dropout = self.config.dropout if training else NO_DROPOUT
        # Kernels compute no dropout.
        autograd = self._wants_autograd(tokens) or dropout.is_on
        self._count(tokens, routing, plan, autograd)
        routing = self._masked(routing, training)
        if self.config.gating == "static":
            with self.counters.timed("experts", tokens.device):
                output = static_moe(tokens, routing, self.store, self.config.activation, dropout)
        else:
            compute = functools.partial(self._experts_autograd, dropout) if autograd else self._experts
            output = self._dynamic(tokens, routing, plan, compute)
        if self.look_ahead is not None:
            self.look_ahead(tokens, plan.num_rows)
        return self._final(output, training)

    def _dynamic(
        self,
        tokens: Tensor,
        routing: Routing,
        plan: Dispatch,
        compute: Callable[[Tensor, tuple[Segment, ...]], Tensor],
    ) -> Tensor:
        with self.counters.timed("dispatch", tokens.device):
            rows = dispatching.gather(tokens.to(compute_dtype(self.store.dtype, tokens.dtype)), plan)
        with self.counters.timed("experts", tokens.device):
            results = compute(rows, dispatching.segments(plan))
        with self.counters.timed("combine", tokens.device):
            return dispatching.combine(results.to(tokens.dtype), plan, routing.weight)

    def _experts(self, rows: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """(R, D) sorted rows to (R + 1, D) results; the last row is zero, for choices that are not computed."""
        results = rows.new_empty(rows.shape[0] + 1, rows.shape[1])
        results[-1] = 0
        kernel = self._kernel(rows)
        by_expert = {segment.expert: segment for segment in segments}
        for wave in self.store.waves(tuple(by_expert), rows.shape[0]):
            due = tuple(by_expert[expert] for expert in wave.experts)
            kernel.run(rows, due, wave, self.config.activation, results[:-1])
        return results

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
            self._kernels[key] = choose_kernel(self.config.kernel, *key).name
        return get_kernel(self._kernels[key])

    def _count(self, tokens: Tensor, routing: Routing, plan: Dispatch, autograd: bool) -> None:
        num_tokens, computed = tokens.shape[0], plan.num_rows
        if self.config.gating == "static":
            name, capacity = "static", num_tokens if routing.capacity is None else routing.capacity
            computed = routing.num_experts * capacity
        else:
            name = "autograd" if autograd else self._kernel(tokens).name
        self.counters.add(num_tokens, plan, computed, name)
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
