"""How much memory weights take that are always there: the paper's static memory (section 3.2), from sizes alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fairseq_moe_opt.errors import OptionError


@dataclass(frozen=True)
class LayerSize:
    """A sparse layer: ``encoder`` or ``decoder``, its experts, and the bytes of one."""

    phase: str
    num_experts: int
    expert_bytes: int


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of weights on one rank with ``slots`` experts of each buffered layer there.

    Attributes:
        slots: experts of a buffered layer that are on the rank.
        nbytes: dense weights, experts of layers that are not buffered, and slots.
        saved: bytes less than with every expert of the rank there.
        ratio: how many times less memory that is.
    """

    slots: int
    nbytes: int
    saved: int
    ratio: float


def static_memory(
    dense_bytes: int, layers: Sequence[LayerSize], ranks: int, buffered: Collection[str] = ("decoder",)
) -> tuple[StaticMemory, ...]:
    """The table over slots a layer, from all experts of a rank down to one.

    Args:
        dense_bytes: of everything but experts, which every rank holds.
        layers: the sparse layers, whose experts are dealt out to the ranks equally.
        ranks: devices; 8 in the paper.
        buffered: phases whose layers have slots; only the decoder in the paper.

    Raises OptionError when the ranks do not divide the experts.
    """
    for layer in layers:
        if ranks < 1 or layer.num_experts % ranks:
            raise OptionError("ranks", f"{ranks} ranks do not divide {layer.num_experts} experts equally")
    most = max(layer.num_experts // ranks for layer in layers)
    whole = _nbytes(dense_bytes, layers, ranks, buffered, most)
    sizes = ((slots, _nbytes(dense_bytes, layers, ranks, buffered, slots)) for slots in range(most, 0, -1))
    return tuple(StaticMemory(slots, nbytes, whole - nbytes, whole / nbytes) for slots, nbytes in sizes)


def _nbytes(dense_bytes: int, layers: Sequence[LayerSize], ranks: int, buffered: Collection[str], slots: int) -> int:
    total = dense_bytes
    for layer in layers:
        local = layer.num_experts // ranks
        total += layer.expert_bytes * (min(slots, local) if layer.phase in buffered else local)
    return total
