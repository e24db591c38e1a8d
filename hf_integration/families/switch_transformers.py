"""Switch Transformers (``google/switch-*``): a token goes to one expert, scaled by the router's probability of it.

Of a sequence, an expert serves ``expert_capacity`` tokens in their order; those beyond get nothing from this layer.
Transformers does that from 5.18 on, as 4.57 did; its releases from 5.0 to 5.17 drop nothing, whatever the capacity.
Here ``capacity="checkpoint"`` is the former, ``capacity="none"`` the latter, on every release.

Padding is routed like any token and takes up capacity, as in Transformers, which never reads
``router_ignore_padding_tokens``; where that is True, padding is not routed here. In training, the router's jitter
multiplies what the router is given; Transformers multiplies in place, so that in float32 the experts get it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from fairseq_moe_opt.build import ExpertBuffer, ExpertLayer, LayerSpec
from fairseq_moe_opt.checkpoints import TensorRecord
from fairseq_moe_opt.moe import CapacityRule, MoELayer
from fairseq_moe_opt.moe.experts import ExpertDropout
from fairseq_moe_opt.moe.routing import Top1Router
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.families import paired
from hf_integration.families.paired import NO_EXPERTS, PairedExperts, RouterForward, RouterHost, phase_of
from hf_integration.padding import PaddingMasks
from hf_integration.patching import Installed

NAME = "switch-transformers"
MODEL_TYPE = "switch_transformers"
_LABEL = "expert_{}"
_LINEARS = ("wi", "wo")
_ACTIVATIONS: Mapping[str, str] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
"""Transformers' names of activations that the engine has under another one."""


def matches(model: nn.Module) -> bool:
    """Whether ``model`` holds a sparse layer of this family."""
    return bool(sparse_blocks(model))


def install(
    model: nn.Module, options: MoEOptions, buffer: ExpertBuffer | None = None, spread: ExpertSpread | None = None
) -> Installed:
    """Replace the forward of every sparse layer: see :func:`.paired.install`."""
    host = RouterHost(NAME, layer_spec, _BlockForward, _RouterForward)
    return paired.install(host, model, _experts(model), options, buffer, spread)


def expert_layers(model: nn.Module, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
    """Where the experts of every sparse layer lie; ``records`` finds a parameter by its name in ``model``."""
    return _experts(model).layers(records)


def trace_layers(model: nn.Module) -> tuple[TraceLayer, ...]:
    """Name, phase and E of every sparse layer."""
    return _experts(model).trace_layers()


def sparse_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The sparse layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwitchTransformersSparseMLP)}


def expert_pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(wi, wo) of every expert, by name: Transformers 5 keeps other modules in the same ModuleDict."""
    return PairedExperts({}, _LABEL, _LINEARS).pairs(block)


def expert_linears(
    model: nn.Module, but_of: Mapping[str, Collection[int]] = NO_EXPERTS
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every expert's ``wi`` and ``wo``, in the model's order, but for those of ``but_of``."""
    return _experts(model).linears(but_of)


def layer_spec(name: str, config: SwitchTransformersConfig) -> LayerSpec:
    """What ``config`` says of the sparse layer ``name``."""
    router = Top1Router(
        num_experts=config.num_experts,
        capacity=CapacityRule(eval_token_fraction=0.0, fixed=config.expert_capacity, per_sequence=True),
        fp32_gating=config.router_dtype == "float32",
        round_early=True,
    )
    activation = _ACTIVATIONS.get(config.dense_act_fn, config.dense_act_fn)
    dropout = ExpertDropout(hidden=float(config.dropout_rate))
    return LayerSpec(name, phase_of(name), router, activation, dropout=dropout)


def _experts(model: nn.Module) -> PairedExperts:
    return PairedExperts(sparse_blocks(model), _LABEL, _LINEARS)


class _RouterForward(RouterForward):
    """The same with the jitter of training."""

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[None, None, Tensor]:
        router = self._router
        if router.training and router.jitter_noise > 0:
            low, high = 1.0 - router.jitter_noise, 1.0 + router.jitter_noise
            hidden_states = hidden_states.to(router.dtype)
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        return super().__call__(hidden_states, padding_mask)


class _BlockForward:
    """``SwitchTransformersSparseMLP.forward`` through the engine: (B, T, D) to (B, T, D)."""

    def __init__(self, block: SwitchTransformersSparseMLP, layer: MoELayer, masks: PaddingMasks) -> None:
        self._block, self._layer, self._masks = block, layer, masks
        self._phase = layer.counters.phase
        self.__wrapped__ = type(block).forward.__get__(block)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        batch, length, width = hidden_states.shape
        skip_padding = self._block.router.ignore_padding_tokens
        not_routed = self._masks.not_routed(None, hidden_states, self._phase, skip_padding=skip_padding)
        tokens = hidden_states.reshape(batch * length, width)
        result = self._layer(tokens, not_routed, training=self._block.training, sequences=batch)
        return result.output.view(batch, length, width)
