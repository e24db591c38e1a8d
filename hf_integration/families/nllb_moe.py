"""NLLB-MoE (``NllbMoeModel``, ``NllbMoeForConditionalGeneration``).

Transformers 5 computes this family wrongly: ``NllbMoeExperts.forward`` takes the router's 0/1 mask for expert indices,
so only experts 0 and 1 ever run. Here the whole of ``NllbMoeSparseMLP.forward`` is replaced. Routing follows
Transformers 4.57: classifier and softmax in ``router_dtype``, probabilities rounded to the model's dtype before the
choice, outputs scaled by ``1 - moe_token_dropout`` at evaluation. In training, whole expert rows are masked with that
probability, as fairseq's expert output masking does (Transformers applies element-wise dropout, with rescaling).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor, nn
from transformers.models.nllb_moe.configuration_nllb_moe import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from fairseq_moe_opt.build import ExpertBuffer, ExpertLayer, LayerSpec
from fairseq_moe_opt.checkpoints import TensorRecord
from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, MoELayer
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.families import paired
from hf_integration.families.paired import NO_EXPERTS, PairedExperts, RouterHost, phase_of
from hf_integration.padding import PaddingMasks
from hf_integration.patching import Installed

NAME = "nllb-moe"
MODEL_TYPE = "nllb-moe"
_LABEL = "expert_{}"


def matches(model: nn.Module) -> bool:
    """Whether ``model`` holds a sparse layer of this family."""
    return any(True for _ in _blocks(model))


def install(
    model: nn.Module, options: MoEOptions, buffer: ExpertBuffer | None = None, spread: ExpertSpread | None = None
) -> Installed:
    """Replace the forward of every sparse layer: see :func:`.paired.install`."""
    host = RouterHost(NAME, layer_spec, _BlockForward)
    return paired.install(host, model, _experts(model), options, buffer, spread)


def expert_layers(model: nn.Module, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
    """Where the experts of every sparse layer lie; ``records`` finds a parameter by its name in ``model``."""
    return _experts(model).layers(records)


def trace_layers(model: nn.Module) -> tuple[TraceLayer, ...]:
    """Name, phase and E of every sparse layer."""
    return _experts(model).trace_layers()


def sparse_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The sparse layers by name, in the model's order."""
    return dict(_blocks(model))


def expert_pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(fc1, fc2) of every expert, by name: Transformers 5 keeps other modules in the same ModuleDict."""
    return PairedExperts({}, _LABEL).pairs(block)


def expert_linears(
    model: nn.Module, but_of: Mapping[str, Collection[int]] = NO_EXPERTS
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every expert's ``fc1`` and ``fc2``, in the model's order, but for those of ``but_of``."""
    return _experts(model).linears(but_of)


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


def _blocks(model: nn.Module) -> Iterator[tuple[str, NllbMoeSparseMLP]]:
    for name, module in model.named_modules():
        if isinstance(module, NllbMoeSparseMLP):
            yield name, module


def _experts(model: nn.Module) -> PairedExperts:
    return PairedExperts(sparse_blocks(model), _LABEL)


class _BlockForward:
    """``NllbMoeSparseMLP.forward`` through the engine: (B, T, D) to (B, T, D)."""

    def __init__(self, block: NllbMoeSparseMLP, layer: MoELayer, masks: PaddingMasks) -> None:
        self._block, self._layer, self._masks = block, layer, masks
        self._phase = layer.counters.phase
        self.__wrapped__ = type(block).forward.__get__(block)

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        batch, length, width = hidden_states.shape
        # router_ignore_padding_tokens=False means that padding is not routed, whatever its name suggests.
        skip_padding = not self._block.router.router_ignore_padding_tokens
        not_routed = self._masks.not_routed(padding_mask, hidden_states, self._phase, skip_padding=skip_padding)
        tokens = hidden_states.reshape(batch * length, width)
        result = self._layer(tokens, not_routed, training=self._block.training)
        return result.output.view(batch, length, width)
