"""A rank's share of one layer's experts, which can change: in a host model's modules, or in files behind a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor, nn

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.moe.module_experts import ModuleExperts, move_expert, trade_places


class ExpertShare(Protocol):
    """The experts of one layer that a rank holds, in slot order."""

    @property
    def held(self) -> tuple[int, ...]:
        """Logical experts, by slot."""

    @property
    def device(self) -> torch.device:
        """Where they are computed."""

    @property
    def nbytes(self) -> int:
        """Of all of them."""

    def hold(self, held: Sequence[int]) -> None:
        """Hold these from now on. Weights of newcomers are to be written into ``tensors`` of each where it has any."""

    def tensors(self, expert: int) -> tuple[Tensor, ...]:
        """The weights of an expert it holds, to be sent or written; none where experts are read from the files."""


class ModuleShare:
    """In the modules of a model that has places for all experts; those of other ranks' are on the meta device.

    A newcomer takes the memory of an expert that leaves, so that nothing is allocated where a rank has as many as
    before. The names and shapes of the model's parameters stay.

    Args:
        pairs: (fc1, fc2) of all E experts.
        store: over those that are held.
        held: which these are, by slot.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], store: ModuleExperts, held: Sequence[int]) -> None:
        self._pairs, self._store, self._held = tuple(pairs), store, tuple(held)

    @property
    def held(self) -> tuple[int, ...]:
        """See ``ExpertShare``."""
        return self._held

    @property
    def device(self) -> torch.device:
        """See ``ExpertShare``."""
        return self._store.weights(0).fc1_weight.device

    @property
    def nbytes(self) -> int:
        """See ``ExpertShare``."""
        return self._store.nbytes

    def hold(self, held: Sequence[int]) -> None:
        """See ``ExpertShare``."""
        device = self.device
        leaving = [expert for expert in self._held if expert not in held]
        coming = [expert for expert in held if expert not in self._held]
        for former, new in zip_longest(leaving, coming):
            if former is None:
                move_expert(self._pairs[new], device)
            elif new is None:
                move_expert(self._pairs[former], torch.device("meta"))
            else:
                trade_places(self._pairs[former], self._pairs[new])
        self._held = tuple(held)
        self._store.hold([self._pairs[expert] for expert in held])

    def tensors(self, expert: int) -> tuple[Tensor, ...]:
        """See ``ExpertShare``."""
        return tuple(self._store.weights(self._held.index(expert)).tensors())


class BufferedShare:
    """In the files: experts do not travel, whoever has them from now on reads them when they are asked for."""

    def __init__(self, store: BufferedExperts) -> None:
        self._store = store

    @property
    def held(self) -> tuple[int, ...]:
        """See ``ExpertShare``."""
        return self._store.layer.held

    @property
    def device(self) -> torch.device:
        """See ``ExpertShare``."""
        return self._store.pool.arena.device

    @property
    def nbytes(self) -> int:
        """See ``ExpertShare``."""
        return self._store.nbytes

    def hold(self, held: Sequence[int]) -> None:
        """See ``ExpertShare``."""
        self._store.hold(held)

    def tensors(self, expert: int) -> tuple[Tensor, ...]:
        """See ``ExpertShare``."""
        return ()
