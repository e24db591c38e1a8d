"""What an experts module behind Transformers' ``ExpertsInterface`` holds: stacks of matrices, and how they lie there.

Sixty-odd model files share one contract: parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of all experts,
perhaps with ``_bias``, and a forward that is given hidden states, expert indices and weights. What is done between the
two products is each file's own, so it is found out by trying: the module's function and the engine's are given the same
numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_moe_opt.errors import NoMoELayerError
from fairseq_moe_opt.moe.activations import ClampedSwiglu, activate, apply_gate
from fairseq_moe_opt.moe.stacked_experts import StackLayout, Stacks
from fairseq_moe_opt.moe.types import ACTIVATIONS

_GATED, _PLAIN, _SECOND = "gate_up_proj", "up_proj", "down_proj"
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module, understood.

    Attributes:
        module: itself; its parameters are read at every use.
        layout: of its stacks.
        activation: a name that the engine's kernels know.
    """

    module: nn.Module
    layout: StackLayout
    activation: str

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsModule:
        """Look at ``module``; NoMoELayerError says what of it the engine cannot compute."""
        if getattr(module, "has_post_expert_norm", False):
            raise NoMoELayerError(f"{type(module).__name__} normalises what each expert gives: not computed here")
        gated = _GATED in module._parameters
        activation, interleaved = _gate_of(module) if gated else (_activation_of(module), False)
        return cls(module, StackLayout(gated, bool(getattr(module, "is_transposed", False)), interleaved), activation)

    @property
    def names(self) -> Mapping[str, str]:
        """Names of the module's parameters by their fields of ``Stacks``."""
        first = _GATED if self.layout.gated else _PLAIN
        every = {
            "first": first,
            "second": _SECOND,
            "first_bias": f"{first}_bias",
            "second_bias": f"{_SECOND}_bias",
        }
        return MappingProxyType({field: name for field, name in every.items() if self._parameter(name) is not None})

    @property
    def num_experts(self) -> int:
        """E."""
        return self.stacks().first.shape[0]

    def stacks(self) -> Stacks:
        """The parameters as they are now."""
        return Stacks(**{field: cast(Tensor, self._parameter(name)) for field, name in self.names.items()})

    def _parameter(self, name: str) -> Tensor | None:
        return self.module._parameters.get(name)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything in ``model`` that Transformers would run through its ``ExpertsInterface``."""
    for name, module in model.named_modules():
        if is_experts_module(module):
            yield name, module


def is_experts_module(module: nn.Module) -> bool:
    """Whether ``module`` has the attribute that ``use_experts_implementation`` sets, and stacks of matrices."""
    own = module._parameters
    if not hasattr(module, "is_transposed") or not (_GATED in own or _PLAIN in own):
        return False
    return all(own[name] is not None and own[name].dim() == 3 for name in own if not name.endswith("_bias"))  # type: ignore[union-attr]


def _gate_of(module: nn.Module) -> tuple[str, bool]:
    """What makes (r, F) of (r, 2F) in ``module``, by the engine's name, and whether its halves are interleaved."""
    numbers = _numbers(module).unflatten(1, (-1, 2))
    own = cast(Callable[[Tensor], Tensor], getattr(module, "_apply_gate", None) or _DefaultGate(module))
    for interleaved in (False, True):
        # (r, F, 2) laid out so that index 0 of the pairs is what this layout calls the gate.
        given = numbers.flatten(1) if interleaved else numbers.transpose(1, 2).flatten(1)
        result = _try(own, given)
        for name in _gate_names(module):
            if _agree(result, apply_gate(name, numbers[..., 0], numbers[..., 1])):
                return name, interleaved
    raise NoMoELayerError(
        f"the experts of {type(module).__name__} have a gate that is none of the engine's ({', '.join(ACTIVATIONS)}, "
        "and clamped SwiGLU): use one of Transformers' own implementations for this model"
    )


def _activation_of(module: nn.Module) -> str:
    numbers = _numbers(module)
    result = _try(cast(Callable[[Tensor], Tensor], getattr(module, "act_fn", None)), numbers)
    for name in ACTIVATIONS:
        if _agree(result, activate(name, numbers)):
            return name
    raise NoMoELayerError(
        f"the experts of {type(module).__name__} have an activation that is none of {', '.join(ACTIVATIONS)}: use one "
        "of Transformers' own implementations for this model"
    )


@dataclass(frozen=True)
class _DefaultGate:
    """What releases without ``_apply_gate`` compute."""

    module: Any

    def __call__(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return cast(Tensor, self.module.act_fn(gate) * up)


def _gate_names(module: nn.Module) -> Iterator[str]:
    yield from ACTIVATIONS
    limits, alphas = ([float(value) for value in _values(module, names)] for names in (_LIMITS, _ALPHAS))
    for limit, alpha, offset in itertools.product(limits, (*alphas, 1.0), (0.0, 1.0)):
        yield ClampedSwiglu(alpha, limit, offset).name


def _values(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    found = (getattr(module, name, None) for name in names)
    return [float(value) for value in found if isinstance(value, (int, float))]


def _numbers(module: nn.Module) -> Tensor:
    """(8, 64) numbers on both sides of zero, and of any limit that ``module`` clamps at."""
    reach = 3 * max([2.0, *_values(module, _LIMITS)])
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(4, 64, generator=generator, device="cpu")
    large = (torch.rand(4, 64, generator=generator, device="cpu") * 2 - 1) * reach
    return torch.cat((small, large))


def _try(function: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor | None:
    """None for a function that cannot be called so: it is none of the engine's then."""
    try:
        with torch.no_grad():
            return function(numbers.clone())
    except Exception:  # the module's own code, called with numbers of ours
        return None


def _agree(theirs: Tensor | None, ours: Tensor) -> bool:
    return theirs is not None and theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)
