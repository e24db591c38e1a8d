"""fairseq's sparse language models, converted (:mod:`hf_integration.fairseq_lm`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from fairseq_moe_opt.build import ExpertBuffer, ExpertLayer, LayerSpec
from fairseq_moe_opt.checkpoints import TensorRecord
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe import CapacityRule, MoELayer
from fairseq_moe_opt.moe.experts import ExpertDropout
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.fairseq_lm.configuration import FairseqMoELMConfig
from hf_integration.fairseq_lm.modeling import LearnedPositions, SparseLayer, layer_router
from hf_integration.families import paired
from hf_integration.families.paired import NO_EXPERTS, PairedExperts, phase_of
from hf_integration.padding import PaddingMasks
from hf_integration.patching import Installed, Patches

NAME = MODEL_TYPE = FairseqMoELMConfig.model_type
_LABEL = "{}"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` holds a sparse layer of this family."""
    return bool(sparse_blocks(model))


def install(
    model: nn.Module, options: MoEOptions, buffer: ExpertBuffer | None = None, spread: ExpertSpread | None = None
) -> Installed:
    """Replace the forward of every sparse layer: see :func:`.paired.install`."""
    config = cast(FairseqMoELMConfig, model.config)
    if options.capacity == "checkpoint" and config.eval_capacity_max_length:
        raise OptionError(
            "capacity",
            "'checkpoint' is not to be had for this model, whose capacity is a fraction of its longest text "
            "(moe_eval_capacity_max_seqlen); leave it at 'none', which drops nothing",
        )
    installed = paired.install(_Host(config, options), model, _experts(model), options, buffer, spread)
    for module in model.modules():
        if isinstance(module, LearnedPositions):
            installed.patches.replace_forward(module, _PositionsForward(module, installed.masks))
    return installed


def expert_layers(model: nn.Module, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
    """Where the experts of every sparse layer lie; ``records`` finds a parameter by its name in ``model``."""
    return _experts(model).layers(records)


def trace_layers(model: nn.Module) -> tuple[TraceLayer, ...]:
    """Name, phase and E of every sparse layer."""
    return _experts(model).trace_layers()


def sparse_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The sparse layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}


def expert_pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(fc1, fc2) of every expert."""
    return PairedExperts({}, _LABEL).pairs(block)


def expert_linears(
    model: nn.Module, but_of: Mapping[str, Collection[int]] = NO_EXPERTS
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every expert's ``fc1`` and ``fc2``, in the model's order, but for those of ``but_of``."""
    return _experts(model).linears(but_of)


def layer_spec(name: str, config: FairseqMoELMConfig) -> LayerSpec:
    """What ``config`` says of the sparse layer ``name``."""
    return LayerSpec(
        name,
        phase_of(name),
        layer_router(config, CapacityRule(config.eval_capacity_token_fraction)),
        config.activation_function,
        expert_masking=float(config.expert_masking),
        final_masking=float(config.final_masking),
        dropout=ExpertDropout(config.activation_dropout, config.dropout),
    )


def _experts(model: nn.Module) -> PairedExperts:
    return PairedExperts(sparse_blocks(model), _LABEL)


class _Host:
    """This family's part of :func:`.paired.install`."""

    name = NAME

    def __init__(self, config: FairseqMoELMConfig, options: MoEOptions) -> None:
        # What padding is given matters only where it takes others' places.
        self._routes_padding = config.route_padding and options.capacity != "none"

    def layer_spec(self, name: str, config: Any) -> LayerSpec:
        return layer_spec(name, config)

    def gates(self, block: nn.Module, patches: Patches) -> tuple[paired.Gate, paired.Gate]:
        gate = cast(SparseLayer, block).gate
        return gate, _QuietGate(gate.wg)

    def forward(self, block: nn.Module, layer: MoELayer, masks: PaddingMasks) -> Callable[..., Any]:
        return _BlockForward(cast(SparseLayer, block), layer, masks, self._routes_padding)


class _QuietGate:
    """The gate's logits without its hooks, for a guess that no one else is to see."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.linear(tokens, self._linear.weight)


class _BlockForward:
    """``SparseLayer.forward`` through the engine: (B, T, D) to (B, T, D)."""

    def __init__(self, block: SparseLayer, layer: MoELayer, masks: PaddingMasks, routes_padding: bool) -> None:
        self._block, self._layer, self._masks, self._routes_padding = block, layer, masks, routes_padding
        self.__wrapped__ = type(block).forward.__get__(block)

    def __call__(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        result = self._layer(tokens, self._not_routed(hidden), training=self._block.training)
        return result.output.view(hidden.shape)

    def _not_routed(self, hidden: Tensor) -> Tensor | None:
        """(B*T,) bool: padding, and rows whose results are thrown away."""
        phase = self._layer.counters.phase
        return self._masks.not_routed(None, hidden, phase, skip_padding=not self._routes_padding)


class _PositionsForward:
    """``LearnedPositions.forward``; of a rank that only waits for others, positions go on beyond the table."""

    def __init__(self, module: LearnedPositions, masks: PaddingMasks) -> None:
        self._module, self._masks = module, masks
        self.__wrapped__ = type(module).forward.__get__(module)

    def __call__(self, position_ids: Tensor) -> Tensor:
        if self._masks.idle:
            position_ids = position_ids.clamp(max=self._module.count - 1)
        return type(self._module).forward(self._module, position_ids)
