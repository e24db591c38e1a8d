"""What is measured: the model's shape, the sides that run it, and the cases each side is timed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

REFERENCE = "Transformers 4.57.1"
STOCK = "Transformers 5 as shipped"
STATIC = "static gating"


@dataclass(frozen=True)
class Shape:
    """A random NLLB-MoE: widths, layers a side, experts a sparse layer, one sparse layer in ``sparse_step``.

    ``skew`` is the standard deviation of the routers' biases, which make some experts popular and others not.
    """

    d_model: int = 512
    ffn_dim: int = 2048
    layers: int = 8
    heads: int = 8
    experts: int = 64
    sparse_step: int = 4
    vocabulary: int = 4096
    positions: int = 512
    skew: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """All of it by name."""
        return asdict(self)


QUICK = Shape(d_model=32, ffn_dim=64, layers=2, heads=4, experts=8, sparse_step=2, vocabulary=256, positions=64)
"""Small enough to run in the tests."""


@dataclass(frozen=True)
class Side:
    """One way to run the model, in a process of its own.

    Attributes:
        name: in the table.
        dtype: of its weights, ``float32`` or ``bfloat16``.
        options: of this project; None runs the model as Transformers ships it.
        python_path: a folder put before all others, for another release of Transformers.
    """

    name: str
    dtype: str
    options: Mapping[str, Any] | None = None
    python_path: Path | None = None


@dataclass(frozen=True)
class Case:
    """One workload: ``batch`` unpadded sources of ``source_tokens``, ``new_tokens`` greedy tokens for each."""

    batch: int
    source_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that each phase handles."""
        return {"encoder": self.batch * self.source_tokens, "decoder": self.batch * self.new_tokens}


@dataclass(frozen=True)
class Timing:
    """What one side did on one case.

    Attributes:
        seconds: by phase, one entry a round, in the order of the rounds.
        tokens: (batch, new_tokens) token ids, from the run before the rounds.
        peak_bytes: largest resident size of its process during the case.
        error: why it could not run; the rest is empty then.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"encoder": [], "decoder": []})
    tokens: list[list[int]] = field(default_factory=list)
    peak_bytes: int = 0
    error: str | None = None


def sides_of(dtype: str, kernels: Sequence[str], reference: Path | None) -> tuple[Side, ...]:
    """Every side for ``dtype``, the one that others are compared with first.

    Beside bfloat16 sides, 4.57.1 runs in float32 too, so that ratios across dtypes come from the same rounds.
    """
    common = {"capacity": "none"}
    sides = [Side(f"this project: {name}", dtype, {**common, "kernel": name}) for name in kernels]
    sides += [Side(STATIC, dtype, {**common, "gating": "static"}), Side(STOCK, dtype)]
    if reference is not None:
        side = Side(REFERENCE, dtype, python_path=reference)
        sides = [side] if dtype == "float32" else [replace(side, dtype="float32"), side]
        sides += sides_of(dtype, kernels, None)
    return tuple(sides)
