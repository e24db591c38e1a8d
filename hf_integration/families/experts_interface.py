"""Every model behind Transformers' ``ExpertsInterface``: Mixtral, Qwen-MoE, OLMoE, DeepSeek, GPT-OSS, GraniteMoE ...

Transformers 5 gives them one experts module, told by its model's own router which experts a token goes to. Only that
module's forward is replaced: routing, shared experts and all else stay the model's. Nothing is dropped there, and
padding is routed like any token, so the engine's results are Transformers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor, nn

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.build import BufferedShare, ExpertBuffer, ExpertShare, LayerSpec, build_layer
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe import MoELayer
from fairseq_moe_opt.moe.routing import GivenRouting
from fairseq_moe_opt.moe.stacked_experts import StackedExperts
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.experts_function import name_is_taken, name_refused, no_gate, run_layer
from hf_integration.experts_module import ExpertsModule, experts_modules
from hf_integration.padding import PaddingMasks, watch_stack
from hf_integration.patching import Installed, Patches

logger = logging.getLogger(__name__)

NAME = "experts-interface"
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_top_k", "top_k_experts")


def matches(model: nn.Module) -> bool:
    """Whether ``model`` holds an experts module of this kind."""
    return any(True for _ in experts_modules(model))


def experts_of(model: nn.Module) -> dict[str, ExpertsModule]:
    """The experts modules by name, in the model's order; NoMoELayerError for one that the engine cannot compute."""
    return {name: ExpertsModule.of(module) for name, module in experts_modules(model)}


def expert_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """None: experts are stacks here."""
    return iter(())


def trace_layers(model: nn.Module) -> tuple[TraceLayer, ...]:
    """Name, phase and E of every experts module."""
    return tuple(TraceLayer(name, phase_of(name), one.num_experts) for name, one in experts_of(model).items())


def phase_of(name: str) -> str:
    """The phase of the layer ``name``."""
    return "encoder" if "encoder." in name else "decoder"


def require_options(options: MoEOptions) -> None:
    """OptionError for what has no effect, or no meaning, where the host model routes."""
    if options.gating == "static":
        raise OptionError("gating", "'static' needs a capacity, which these models do not have; leave it at 'dynamic'")
    if options.capacity != "none":
        raise OptionError(
            "capacity", f"{options.capacity!r} has no effect: these models drop nothing; leave it at 'none'"
        )
    if options.prefetch == "router":
        raise OptionError(
            "prefetch", "'router' is not had for this family, whose routers are the model's own; use 'previous'"
        )


def install(
    model: nn.Module, options: MoEOptions, buffer: ExpertBuffer | None = None, spread: ExpertSpread | None = None
) -> Installed:
    """Replace the forward of every experts module; parameters, modules and their names stay."""
    require_options(options)
    patches, masks = Patches(), PaddingMasks()
    _watch_stacks(model, masks, patches)
    layers: list[MoELayer] = []
    shares: dict[str, ExpertShare] = {}
    expert_bytes = 0
    for name, experts in experts_of(model).items():
        store = StackedExperts(experts.layout, experts.stacks) if buffer is None else buffer.stores[name]
        expert_bytes += store.nbytes
        router = GivenRouting(experts.num_experts, _top_k(experts.module, model))
        spec = LayerSpec(name, phase_of(name), router, experts.activation)
        exchange = None if spread is None else spread.exchange(name)
        if spread is not None and isinstance(store, BufferedExperts):  # as all are that are spread
            shares[name] = BufferedShare(store)
        layer = build_layer(spec, options, no_gate, store, exchange=exchange)
        patches.replace_forward(experts.module, _ExpertsForward(experts.module, layer, masks))
        layers.append(layer)
    report = None if buffer is None else buffer.report
    return Installed(NAME, tuple(layers), patches, expert_bytes, masks, report, shares, _notes(len(layers)))


def _notes(num_layers: int) -> tuple[str, ...]:
    """That forwards were replaced, where the release has no other way; nothing on later ones."""
    if name_is_taken():
        return ()
    note = f"{name_refused()}; the forward of {num_layers} experts modules was replaced instead"
    logger.warning("%s", note)
    return (note,)


def _watch_stacks(model: nn.Module, masks: PaddingMasks, patches: Patches) -> None:
    """Note what the innermost stacks of layers that hold experts are given."""
    stacks = {name.rpartition(".layers.")[0] for name, _ in experts_modules(model) if ".layers." in f".{name}"}
    for name in stacks:
        watch_stack(model.get_submodule(name), phase_of(f"{name}."), masks, patches)


def _top_k(experts: nn.Module, model: nn.Module) -> int:
    """K as the configuration says; only reports ask."""
    for config in (getattr(experts, "config", None), getattr(model, "config", None)):
        for name in _TOP_K:
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    return 1


class _ExpertsForward:
    """An experts module's forward through the engine: (T, D), (T, K) indices and weights to (T, D)."""

    def __init__(self, experts: nn.Module, layer: MoELayer, masks: PaddingMasks) -> None:
        self._experts, self._layer, self._masks = experts, layer, masks
        self.__wrapped__ = type(experts).forward.__get__(experts)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        unwanted = self._unwanted(hidden_states)
        if unwanted is not None:
            top_k_index = top_k_index.masked_fill(unwanted.unsqueeze(1), self._layer.router.num_experts)
        return run_layer(self._layer, hidden_states, top_k_index, top_k_weights, training=self._experts.training)

    def _unwanted(self, hidden_states: Tensor) -> Tensor | None:
        """(T,) bool of rows whose results are thrown away; None where all are wanted."""
        finished = self._masks.finished
        rows = 1 if finished is None else len(finished)
        num_tokens = hidden_states.numel() // hidden_states.shape[-1]
        if num_tokens % rows:
            return None
        shaped = hidden_states.reshape(rows, num_tokens // rows, hidden_states.shape[-1])
        return self._masks.unwanted(shaped, "decoder")
