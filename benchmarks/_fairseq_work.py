"""What the fairseq benchmark runs and what comes out; needs no fairseq."""

from __future__ import annotations

from dataclasses import dataclass, field

from _sides import Shape
from torch import Tensor

ENCODER, ALL = "encoder", "all"
"""What is timed: the encoder alone, and the whole of generating or scoring."""

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Work:
    """One workload.

    Attributes:
        batch: sentences at once.
        tokens: of each source sentence or block of text, all real.
        beam: hypotheses kept a sentence; 1 for a language model.
        new_tokens: generated for each sentence, the end token included; 0 for a language model.
    """

    batch: int
    tokens: int
    beam: int = 1
    new_tokens: int = 0

    @property
    def rows(self) -> int:
        """Most tokens that a sparse layer gets at once."""
        return self.batch * max(self.tokens, self.beam)


@dataclass(frozen=True)
class Outputs:
    """What one run gave.

    Attributes:
        tokens: of every hypothesis, best first, sentence by sentence.
        scores: log-probabilities of all those tokens, one after another.
        states: (T, B, D) of the encoder; None for a language model.
        seconds: by phase.
        active_experts: mean over calls and layers of the experts with at least one row, by side of the model.
        dropped: share of routed rows lost to capacity.
    """

    tokens: list[list[int]]
    scores: Tensor
    states: Tensor | None
    seconds: dict[str, float]
    active_experts: dict[str, float] = field(default_factory=dict)
    dropped: float = 0.0


class CannotRunError(Exception):
    """A side is not run; the message says why, in a few words."""


def static_bytes(shape: Shape, rows: int, capacity: int) -> int:
    """The most that static gating holds at once in one layer over ``rows`` tokens, weights not counted."""
    mask = rows * shape.experts * capacity
    buffers = shape.experts * capacity * shape.d_model
    # While making the combine tensor: two terms and their sum. Later: the tensor, and inputs, outputs, outputs joined.
    return _FLOAT_BYTES * max(3 * mask, 2 * mask + 3 * buffers)
