"""Where every expert lives: values only.

A *logical* expert is one of the layer's E experts; a *slot* of a rank holds one copy of one; copies of the same expert
are its *replicas*, and they share its rows evenly. Ranks may hold uneven numbers of experts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import OptionError, PlacementError

RankSlots = tuple[tuple[int, ...], ...]
"""One layer: for every rank the logical experts in its slots, in slot order."""


@dataclass(frozen=True)
class Cluster:
    """The ranks that experts are placed on.

    Attributes:
        slots: experts each rank has room for, length W.
        num_nodes: nodes the ranks are spread over, contiguously and equally.

    Raises:
        OptionError: no rank, a negative number of slots, or ranks that the nodes do not divide.
    """

    slots: tuple[int, ...]
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if not self.slots or min(self.slots) < 0:
            raise OptionError("slots", f"every one of at least one rank needs 0 slots or more; got {self.slots}")
        if self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            raise OptionError("nodes", f"must divide the {self.num_ranks} ranks; got {self.num_nodes}")

    @classmethod
    def even(cls, num_ranks: int, num_experts: int, *, spare_slots: int = 0, num_nodes: int = 1) -> Cluster:
        """Room for ``num_experts`` and ``spare_slots`` replicas, as evenly as possible, the first ranks one more.

        Raises OptionError where a number is out of its range.
        """
        if num_ranks < 1:
            raise OptionError("ranks", f"must be 1 or more; got {num_ranks}")
        if not 0 <= spare_slots <= num_experts * (num_ranks - 1):
            most = num_experts * (num_ranks - 1)
            raise OptionError("spare_slots", f"must be 0 to {most} (every expert on every rank); got {spare_slots}")
        each, over = divmod(num_experts + spare_slots, num_ranks)
        return cls(tuple(each + (rank < over) for rank in range(num_ranks)), num_nodes)

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.slots)

    @property
    def num_slots(self) -> int:
        """Slots of all ranks together."""
        return sum(self.slots)

    def node_of_rank(self) -> NDArray[np.int64]:
        """(W,) the node of each rank."""
        return np.arange(self.num_ranks, dtype=np.int64) // (self.num_ranks // self.num_nodes)

    def check_room(self, num_experts: int) -> None:
        """Raise OptionError unless every expert has a slot."""
        if self.num_slots < num_experts:
            raise OptionError("slots", f"{num_experts} experts need as many slots; got {self.num_slots}")


@dataclass(frozen=True)
class Placement:
    """Expert placement of every layer, for one model and one number of ranks.

    Attributes:
        layers: layer name to that layer's ``RankSlots``; made read-only.
        num_experts: E, the same in every layer.
        num_ranks: W.
        strategy: name of what made it.
        fingerprint: of the model it was made for; empty where none was known.

    Raises:
        PlacementError: a layer without W ranks, with an expert that does not exist, or that leaves one out.
    """

    layers: Mapping[str, RankSlots]
    num_experts: int
    num_ranks: int
    strategy: str
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlacementError("a placement needs at least one layer")
        layers = {name: tuple(tuple(map(int, rank)) for rank in slots) for name, slots in self.layers.items()}
        for name, slots in layers.items():
            _check_layer(name, slots, self.num_experts, self.num_ranks)
        object.__setattr__(self, "layers", MappingProxyType(layers))

    def __reduce__(self) -> tuple[Any, ...]:
        """Read-only mappings cannot be pickled, and ranks send each other placements."""
        return type(self), (dict(self.layers), self.num_experts, self.num_ranks, self.strategy, self.fingerprint)

    @property
    def label(self) -> str:
        """Strategy and a short digest: equal for equal placements, and for nothing else."""
        return f"{self.strategy} {hashlib.sha256(repr(self.__reduce__()).encode()).hexdigest()[:16]}"

    @cached_property
    def homes(self) -> Mapping[str, tuple[tuple[tuple[int, int], ...], ...]]:
        """Layer name to, for every logical expert, its (rank, slot) pairs in order of ranks."""
        return MappingProxyType({name: homes_of(slots, self.num_experts) for name, slots in self.layers.items()})

    def slots_per_rank(self, layer: str) -> tuple[int, ...]:
        """How many experts each rank holds of ``layer``, replicas included."""
        return tuple(len(rank) for rank in self.layers[layer])


@dataclass(frozen=True, order=True)
class Move:
    """One copy of an expert's weights that a rank has to fetch.

    Attributes:
        layer: whose expert.
        expert: logical expert.
        source: a rank that holds it before, the lowest.
        target: the rank that has to hold it.
    """

    layer: str
    expert: int
    source: int
    target: int


def moves_between(before: Placement, after: Placement) -> tuple[Move, ...]:
    """What ranks must fetch to go from one placement to another; changing slots within a rank costs nothing.

    Raises PlacementError unless both are of the same layers, experts and ranks.
    """
    for what in ("num_experts", "num_ranks"):
        if getattr(before, what) != getattr(after, what):
            raise PlacementError(f"two placements differ in {what}: {getattr(before, what)}, {getattr(after, what)}")
    if before.layers.keys() != after.layers.keys():
        raise PlacementError("two placements are of different layers")
    return tuple(
        Move(name, expert, before.homes[name][expert][0][0], rank)
        for name, slots in after.layers.items()
        for rank, experts in enumerate(slots)
        for expert in sorted((Counter(experts) - Counter(before.layers[name][rank])).elements())
    )


def homes_of(slots: RankSlots, num_experts: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For every logical expert its (rank, slot) pairs, in order of ranks."""
    homes: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(slots):
        for slot, expert in enumerate(experts):
            homes[expert].append((rank, slot))
    return tuple(map(tuple, homes))


def fractions_of(slots: RankSlots, num_experts: int) -> NDArray[np.float64]:
    """(E, W): which fraction of an expert's rows goes to each rank when its replicas share them evenly."""
    copies = np.zeros((num_experts, len(slots)))
    for rank, experts in enumerate(slots):
        np.add.at(copies[:, rank], np.asarray(experts, dtype=np.int64), 1.0)
    return np.asarray(copies / copies.sum(axis=1, keepdims=True))


def rank_slots(experts: Sequence[int] | NDArray[np.int64], ranks: Iterable[int], num_ranks: int) -> RankSlots:
    """``RankSlots`` from one (expert, rank) pair a slot; a rank's experts ascend, so equal contents compare equal."""
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert, rank in zip(experts, ranks, strict=True):
        held[rank].append(int(expert))
    return tuple(tuple(sorted(one)) for one in held)


def _check_layer(name: str, slots: RankSlots, num_experts: int, num_ranks: int) -> None:
    if len(slots) != num_ranks:
        raise PlacementError(f"layer {name!r}: has {len(slots)} ranks, not {num_ranks}")
    placed = {expert for rank in slots for expert in rank}
    unknown = sorted(placed - set(range(num_experts)))
    if unknown:
        raise PlacementError(f"layer {name!r}: expert {unknown[0]} is not one of 0 to {num_experts - 1}")
    if len(placed) < num_experts:
        missing = next(expert for expert in range(num_experts) if expert not in placed)
        raise PlacementError(f"layer {name!r}: expert {missing} is on no rank")
