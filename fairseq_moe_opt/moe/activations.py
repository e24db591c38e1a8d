"""What an expert does between its two products: an activation, or a gate that multiplies one half by the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.types import ACTIVATIONS


def _relu2(hidden: Tensor) -> Tensor:
    return torch.relu(hidden).square()


def _gelu_tanh(hidden: Tensor) -> Tensor:
    return functional.gelu(hidden, approximate="tanh")


_ACTIVATE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
}


@dataclass(frozen=True)
class ClampedSwiglu:
    """The gate of GPT-OSS and its relatives: ``g * sigmoid(alpha * g) * (u + offset)`` of clamped halves.

    Attributes:
        alpha: 1 makes it SwiGLU.
        limit: the gate is at most this, the other half between this and its negative.
        offset: added to the other half after that.
    """

    alpha: float
    limit: float
    offset: float

    _PATTERN = re.compile(r"swiglu\(alpha=(?P<alpha>[^,]+),limit=(?P<limit>[^,]+),offset=(?P<offset>[^,]+)\)")

    @property
    def name(self) -> str:
        """What kernels are told as their activation."""
        return f"swiglu(alpha={self.alpha!r},limit={self.limit!r},offset={self.offset!r})"

    @classmethod
    def parse(cls, name: str) -> ClampedSwiglu | None:
        """The gate of that name; None if it is no such gate's."""
        found = cls._PATTERN.fullmatch(name)
        try:
            return None if found is None else cls(*(float(number) for number in found.groups()))
        except ValueError:
            return None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """(r, F) halves to (r, F)."""
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + self.offset)


@cache
def clamped_swiglu(name: str) -> ClampedSwiglu | None:
    """The gate that kernels are told of as ``name``; None if it is no such gate."""
    return ClampedSwiglu.parse(name)


def check_activation(name: str) -> str:
    """Return ``name`` if this engine computes it, else raise OptionError with the names it does."""
    if name not in _ACTIVATE and clamped_swiglu(name) is None:
        known = (*ACTIVATIONS, ClampedSwiglu(1.702, 7.0, 1.0).name)
        raise OptionError("activation", f"{name!r} is not one of {', '.join(known)}")
    return name


def activate(name: str, hidden: Tensor) -> Tensor:
    """Apply activation ``name`` to ``hidden`` of any shape."""
    return _ACTIVATE[name](hidden)


def apply_gate(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """``act(gate) * up``, or what the gate ``name`` makes of the two."""
    clamped = clamped_swiglu(name)
    return _ACTIVATE[name](gate) * up if clamped is None else clamped(gate, up)
