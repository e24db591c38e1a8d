"""Ranks that share experts run the same layers at the same time, whatever each of them is busy with.

Before a rank runs a stack (its encoder, its decoder), all agree which stack is next. The ones that want that stack run
it; the others take part in its sparse layers without a token of their own, so that their experts are there. Batches may
begin and end when they will: a rank that is done with one goes on with its next, and nobody computes a dummy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from fairseq_moe_opt.parallel import Collectives

_DONE, _WAITING, _FIRST = 0, 1, 1 << 30
"""What ranks say; the largest counts. A stack's number is below those of the ones before it, so encoders come first."""


def _nothing() -> None:
    pass


class SparseLayer(Protocol):
    """A layer whose experts are spread over ranks."""

    def take_part(self) -> None:
        """Compute what other ranks send, with no token of this one."""


class Turns:
    """Who runs what next, agreed by ``ranks``; all of them enter the same stacks in the same order."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._stacks: list[tuple[tuple[SparseLayer, ...], Callable[[], None]]] = []

    def enter(self, layers: Sequence[SparseLayer], before: Callable[[], None] = _nothing) -> Callable[[], None]:
        """A new stack, by its sparse layers; what to call before each run of it, which waits for the turn.

        ``before`` is called by every rank once it is agreed that the stack is next: no rank is within any stack then.
        """
        self._stacks.append((tuple(layers), before))
        return partial(self._take, _FIRST - len(self._stacks))

    def wait(self) -> bool:
        """Let the others run one stack, if any wants to; whether one did."""
        return bool(self._stacks) and self._let_others(_WAITING) > _WAITING

    def finish(self) -> None:
        """Let the others run their stacks until nobody has anything left to run."""
        while self._stacks and self._let_others(_DONE) != _DONE:
            pass

    def _take(self, number: int) -> None:
        while (agreed := self._ranks.maximum(number)) != number:
            self._take_part(agreed)
        self._stacks[_FIRST - number - 1][1]()

    def _let_others(self, own: int) -> int:
        """Say ``own``, do what is agreed on, and return that."""
        agreed = self._ranks.maximum(own)
        if agreed > _WAITING:
            self._take_part(agreed)
        return agreed

    @torch.no_grad()
    def _take_part(self, number: int) -> None:
        layers, before = self._stacks[_FIRST - number - 1]
        before()
        for layer in layers:
            layer.take_part()
