"""The user's whole vocabulary: one frozen dataclass. Its field docstrings are the help texts everywhere.

The same names are keyword arguments in Python, ``--moe-NAME`` flags on command lines and keys of YAML presets.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from fairseq_moe_opt.errors import OptionError

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "gating": ("dynamic", "static"),
    "capacity": ("none", "checkpoint"),
    "kernel": ("auto", "naive", "loop", "grouped_mm"),
    "expert_dtype": ("checkpoint", "bf16", "int8"),
}


@dataclass(frozen=True)
class MoEOptions:
    """How Mixture-of-Experts layers run."""

    gating: str = "dynamic"
    """dynamic computes only the rows that tokens really chose; static pads every expert to the same capacity, as
    the original code does, and is there to compare with."""

    capacity: str = "none"
    """none drops nothing, so a token's result does not depend on its batch; checkpoint drops exactly what the
    checkpoint's own capacity options drop."""

    kernel: str = "auto"
    """what computes the experts: auto takes the fastest one here; naive, loop and grouped_mm ask for one."""

    expert_dtype: str = "checkpoint"
    """dtype of the experts in memory, all else keeps the model's: checkpoint takes them as they are stored; bf16 rounds
    them, and they compute in it; int8 quantises their matrices as they are read, one scale an output channel."""

    profile: bool = False
    """time routing, dispatch, experts and combine of every layer; the times are in the report."""

    report: str | None = None
    """file that the report of each generate call is written to, as JSON."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(name, f"{value!r} is not one of {', '.join(choices)}")
        if not isinstance(self.profile, bool):
            raise OptionError("profile", f"{self.profile!r} is not true or false")
        if self.gating == "static" and self.kernel != "auto":
            raise OptionError("kernel", f"{self.kernel!r} has no effect with gating='static'; leave it at 'auto'")

    @classmethod
    def from_kwargs(cls, **values: Any) -> MoEOptions:
        """Options from keyword arguments; OptionError on a name that does not exist, listing those that do."""
        known = option_names()
        for name in values:
            if name not in known:
                raise OptionError(name, f"no such option; there are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, object]:
        """All options by name."""
        return asdict(self)


def option_names() -> tuple[str, ...]:
    """Names of all options, in order."""
    return tuple(field.name for field in fields(MoEOptions))


def field_choices() -> dict[str, tuple[str, ...]]:
    """The values an option may take, for options with a fixed set."""
    return dict(_CHOICES)


@cache
def field_help() -> Mapping[str, str]:
    """One-line help of every option: the docstring under its field."""
    (class_node,) = ast.parse(inspect.getsource(MoEOptions)).body
    if not isinstance(class_node, ast.ClassDef):
        raise TypeError("MoEOptions is not a class")
    texts: dict[str, str] = {}
    for node, following in zip(class_node.body, class_node.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            texts[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return texts
