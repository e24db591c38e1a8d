"""The dense part of a model, its linear layers and feed-forward networks, by what is fastest on a CPU.

Modules, their parameters, names and hooks stay; only forwards are replaced. A module whose forward someone else has
replaced already, as accelerate does, is left alone, and so is anything that is not exactly ``nn.Linear``: an adapter,
a quantised or a parametrised layer; and a linear layer of a dtype for which there is nothing faster. See
:mod:`fairseq_moe_opt.moe.dense` for what computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeDenseActDense
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersDenseActDense

from fairseq_moe_opt.moe.dense import feed_forward, gains, linear
from fairseq_moe_opt.moe.dense_report import DenseCounters
from fairseq_moe_opt.moe.types import ExpertWeights
from fairseq_moe_opt.options import MoEOptions
from hf_integration.patching import Patches

_FEED_FORWARDS: Mapping[type[nn.Module], tuple[str, str]] = {
    NllbMoeDenseActDense: ("fc1", "fc2"),
    SwitchTransformersDenseActDense: ("wi", "wo"),
}
"""Feed-forward networks, and what they call their two linear layers; ``act`` is between them."""

_SPARSE = frozenset({"experts", "router"})
"""Parts of a sparse layer, which the engine computes itself."""


def install_dense(model: nn.Module, options: MoEOptions, patches: Patches) -> DenseCounters | None:
    """Replace the forwards of all dense layers of ``model``, if ``options`` say so, and count what they do."""
    if options.dense == "torch":
        return None
    counters = DenseCounters()
    # An expert kernel that is asked for by name is not to be mixed with another one.
    compiled = options.kernel in ("auto", "fused")
    for module in list(_dense_modules(model)):
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear:
            if gains(module.weight.dtype, compiled=compiled):
                patches.replace_forward(module, LinearForward(module, counters, compiled))
                counters.linears += 1
        elif type(module) in _FEED_FORWARDS and isinstance(getattr(module, "act", None), nn.ReLU):
            patches.replace_forward(module, FeedForward(module, _FEED_FORWARDS[type(module)], counters, compiled))
            counters.feed_forwards += 1
    return counters


def _dense_modules(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if _SPARSE.isdisjoint(name.split(".")):
            yield module


class LinearForward:
    """``nn.Linear.forward``."""

    def __init__(self, module: nn.Linear, counters: DenseCounters, compiled: bool) -> None:
        self._module, self._counters, self._compiled = module, counters, compiled
        self.__wrapped__ = type(module).forward.__get__(module)

    def __call__(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        output, backend = linear(input, self._module.weight, self._module.bias, compiled=self._compiled)
        self._counters.add(backend)
        return output


class FeedForward:
    """The forward of a feed-forward network of two linear layers."""

    def __init__(self, module: nn.Module, names: tuple[str, str], counters: DenseCounters, compiled: bool) -> None:
        self._module, self._names = module, names
        self._counters, self._compiled = counters, compiled
        self.__wrapped__ = type(module).forward.__get__(module)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        weights = None if self._module.training else self._weights()
        found = None if weights is None else feed_forward(hidden_states, weights, "relu", compiled=self._compiled)
        if found is None:  # its two linear layers count themselves, if they are not torch's anyway
            return self.__wrapped__(hidden_states)
        self._counters.add(found[1])
        return found[0]

    def _weights(self) -> ExpertWeights | None:
        """Of the two layers as they are now; None where someone wants to see them run, or has put others there."""
        first, second = (getattr(self._module, name) for name in self._names)
        if not (_is_plain(first) and _is_plain(second)):
            return None
        return ExpertWeights(first.weight, first.bias, second.weight, second.bias)


def _is_plain(module: Any) -> bool:
    """Whether calling ``module`` does what its weights say and nothing else."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    return isinstance(vars(module).get("forward"), LinearForward | None)
