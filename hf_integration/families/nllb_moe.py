"""NLLB-MoE (``NllbMoeModel``, ``NllbMoeForConditionalGeneration``).

Transformers 5 computes this family wrongly: ``NllbMoeExperts.forward`` takes the router's 0/1 mask for expert indices,
so only experts 0 and 1 ever run. Here the whole of ``NllbMoeSparseMLP.forward`` is replaced. Routing follows
Transformers 4.57: classifier and softmax in ``router_dtype``, probabilities rounded to the model's dtype before the
choice, outputs scaled by ``1 - moe_token_dropout`` at evaluation. In training, whole expert rows are masked with that
probability, as fairseq's expert output masking does (Transformers applies element-wise dropout, with rescaling).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP, NllbMoeTop2Router

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.build import (
    BufferedShare,
    ExpertBuffer,
    ExpertLayer,
    ExpertShare,
    LayerSpec,
    ModuleShare,
    build_layer,
    connect_routers,
    needs_packed_experts,
)
from fairseq_moe_opt.checkpoints import TensorRecord
from fairseq_moe_opt.checkpoints.expert_dtypes import SCALE_SUFFIX
from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, MoELayer
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from fairseq_moe_opt.moe.module_experts import Int8ModuleExperts, ModuleExperts, PackedModuleExperts
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.padding import PaddingMasks, watch_padding
from hf_integration.patching import Installed, Patches

NAME = "nllb-moe"
MODEL_TYPE = "nllb-moe"
PHASES = ("encoder", "decoder")
_LINEARS = ("fc1", "fc2")

Pairs = Sequence[tuple[nn.Module, nn.Module]]
"""(fc1, fc2) of experts."""


def matches(model: nn.Module) -> bool:
    """Whether ``model`` holds a sparse layer of this family."""
    return any(True for _ in _blocks(model))


def install(
    model: nn.Module, options: MoEOptions, buffer: ExpertBuffer | None = None, spread: ExpertSpread | None = None
) -> Installed:
    """Replace the forward of every sparse layer; parameters, modules and their names stay.

    With ``buffer``, experts come from its stores; their own parameters hold nothing. With ``spread``, only this rank's
    experts are here, and rows travel to those of others.
    """
    patches = Patches()
    masks = watch_padding(model, PHASES, patches)
    layers: list[MoELayer] = []
    shares: dict[str, ExpertShare] = {}
    expert_bytes = 0
    for name, block in _blocks(model):
        spec = layer_spec(name, cast(NllbMoeConfig, model.config))
        pairs = expert_pairs(block)
        held = pairs if spread is None else [pairs[expert] for expert in spread.held(name)]
        expert_bytes += _module_experts(held).nbytes
        store = _expert_store(held, options, patches) if buffer is None else buffer.stores[name]
        exchange = None if spread is None else spread.exchange(name)
        if spread is not None:
            shares[name] = _share(pairs, store, spread.held(name))
        router_forward = _GateForward(block.router)
        layer = build_layer(spec, options, _Gate(block.router), store, exchange=exchange)
        patches.replace_forward(block.router, router_forward)
        patches.replace_forward(block, _BlockForward(block, layer, masks, spec.phase))
        layers.append(layer)
    if buffer is None:
        return Installed(NAME, tuple(layers), patches, expert_bytes, masks, shares=shares)
    connect_routers(layers, [_QuietGate(block.router) for _, block in _blocks(model)], buffer)
    return Installed(NAME, tuple(layers), patches, expert_bytes, masks, buffer.report, shares)


def expert_layers(model: nn.Module, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
    """Where the experts of every sparse layer lie; ``records`` finds a parameter by its name in ``model``."""
    return tuple(
        ExpertLayer(
            name,
            phase_of(name),
            tuple(_records(f"{name}.experts.expert_{e}", records) for e in range(block.num_experts)),
        )
        for name, block in _blocks(model)
    )


def trace_layers(model: nn.Module) -> tuple[TraceLayer, ...]:
    """Name, phase and E of every sparse layer."""
    return tuple(TraceLayer(name, phase_of(name), block.num_experts) for name, block in _blocks(model))


def _records(prefix: str, find: Callable[[str], TensorRecord]) -> dict[str, TensorRecord]:
    records = {f"{one}_{leaf}": find(f"{prefix}.{one}.{leaf}") for one in _LINEARS for leaf in ("weight", "bias")}
    for one in _LINEARS:
        if records[f"{one}_weight"].dtype == torch.int8:
            records[f"{one}_scale"] = find(f"{prefix}.{one}.weight{SCALE_SUFFIX}")
    return records


def sparse_blocks(model: nn.Module) -> dict[str, NllbMoeSparseMLP]:
    """The sparse layers by name, in the model's order."""
    return dict(_blocks(model))


def expert_pairs(block: NllbMoeSparseMLP) -> list[tuple[nn.Module, nn.Module]]:
    """(fc1, fc2) of every expert, by name: Transformers 5 keeps other modules in the same ModuleDict."""
    experts = [block.experts[f"expert_{index}"] for index in range(block.num_experts)]
    return [(expert.fc1, expert.fc2) for expert in experts]


def expert_linears(
    model: nn.Module, but_of: Mapping[str, Collection[int]] = MappingProxyType({})
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every expert's ``fc1`` and ``fc2``, in the model's order.

    ``but_of``: experts of a layer, by its name, that are left out.
    """
    for name, block in _blocks(model):
        for index, pair in enumerate(expert_pairs(block)):
            if index in but_of.get(name, ()):
                continue
            for layer, linear in zip(_LINEARS, pair, strict=True):
                yield f"{name}.experts.expert_{index}.{layer}", linear


def layer_spec(name: str, config: NllbMoeConfig) -> LayerSpec:
    """What ``config`` says of the sparse layer ``name``."""
    router = GShardTop2Router(
        num_experts=config.num_experts,
        capacity=CapacityRule(config.moe_eval_capacity_token_fraction, fixed=config.expert_capacity),
        second_expert_policy=config.second_expert_policy,
        normalize_before_dropping=config.normalize_router_prob_before_dropping,
        batch_prioritized=config.batch_prioritized_routing,
        fp32_gating=config.router_dtype == "float32",
        round_early=True,
    )
    return LayerSpec(name, phase_of(name), router, config.activation_function, float(config.moe_token_dropout))


def phase_of(name: str) -> str:
    """The phase of the layer ``name``."""
    return "decoder" if "decoder." in name else "encoder"


def _blocks(model: nn.Module) -> Iterator[tuple[str, NllbMoeSparseMLP]]:
    for name, module in model.named_modules():
        if isinstance(module, NllbMoeSparseMLP):
            yield name, module


def _expert_store(pairs: Pairs, options: MoEOptions, patches: Patches) -> ModuleExperts:
    weight = cast(Tensor, pairs[0][0].weight)
    if not needs_packed_experts(options, weight.device, weight.dtype):
        return _module_experts(pairs)
    packed = PackedModuleExperts(pairs)
    patches.on_undo(packed.unpack)
    return packed


def _share(pairs: Pairs, store: ModuleExperts | BufferedExperts, held: Sequence[int]) -> ExpertShare:
    return BufferedShare(store) if isinstance(store, BufferedExperts) else ModuleShare(pairs, store, held)


def _module_experts(pairs: Pairs) -> ModuleExperts:
    return Int8ModuleExperts(pairs) if isinstance(pairs[0][0], Int8Linear) else ModuleExperts(pairs)


class _GateForward:
    """``NllbMoeTop2Router.forward`` cut down to its logits, which ``output_router_logits`` records (place 2)."""

    def __init__(self, router: NllbMoeTop2Router) -> None:
        self._router = router
        self.__wrapped__ = type(router).forward.__get__(router)

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[None, None, Tensor]:
        classifier = self._router.classifier
        dtype = self._router.dtype
        bias = None if classifier.bias is None else classifier.bias.to(dtype)
        return None, None, functional.linear(hidden_states.to(dtype), classifier.weight.to(dtype), bias)


class _Gate:
    """The layer's gate: calls the router module, so that its forward hooks run."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    def __call__(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self._router(tokens)[2])


class _QuietGate:
    """The same logits without the router's hooks, for a guess that no one else is to see."""

    def __init__(self, router: NllbMoeTop2Router) -> None:
        self._forward = _GateForward(router)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens)[2]


class _BlockForward:
    """``NllbMoeSparseMLP.forward`` through the engine: (B, T, D) to (B, T, D)."""

    def __init__(self, block: NllbMoeSparseMLP, layer: MoELayer, masks: PaddingMasks, phase: str) -> None:
        self._block, self._layer, self._masks, self._phase = block, layer, masks, phase
        self.__wrapped__ = type(block).forward.__get__(block)

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        batch, length, width = hidden_states.shape
        padding = self._padding(padding_mask, hidden_states)
        tokens = hidden_states.reshape(batch * length, width)
        result = self._layer(tokens, padding, training=self._block.training)
        return result.output.view(batch, length, width)

    def _padding(self, given: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """(B*T,) bool, or None when every token is routed: no padding, or padding is to be routed like any token.

        ``router_ignore_padding_tokens=False`` means that padding is not routed, whatever its name suggests.
        """
        unwanted = self._masks.unwanted(hidden_states, self._phase)
        if self._block.router.router_ignore_padding_tokens:
            return unwanted
        padding = self._masks.padding(given, hidden_states, self._phase)
        if padding is None or unwanted is None:
            return unwanted if padding is None else padding
        return padding | unwanted
