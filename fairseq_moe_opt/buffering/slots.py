"""The arena: one allocation, cut into slots of equal size, each of which holds one expert at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_opt.moe.types import ExpertWeights
from fairseq_moe_opt.sizes import aligned


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in a slot: ``start`` and ``nbytes`` in bytes, ``stride`` in elements."""

    name: str
    start: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class SlotLayout:
    """How the tensors of one expert are laid into a slot.

    Attributes:
        places: one a tensor, in field order.
        nbytes: of the slot, a multiple of ``ALIGNMENT``.
    """

    places: tuple[_Place, ...]
    nbytes: int

    @classmethod
    def of(cls, expert: ExpertWeights) -> SlotLayout:
        """The layout for experts of ``expert``'s shapes, strides and dtypes; it may have no storage (``meta``).

        Matrices may lie transposed, without gaps, and gate and ``fc1`` may take turns in one.
        """
        interleaved = expert.joined is not None and expert.joined.interleaved
        places, start = list[_Place](), 0
        for field in dataclasses.fields(expert):
            tensor = getattr(expert, field.name)
            if not isinstance(tensor, Tensor):
                continue
            nbytes, first = tensor.numel() * tensor.element_size(), start
            if interleaved and field.name == "fc1_weight":  # the gate's first element goes before
                first, start = start + tensor.element_size(), aligned(start + 2 * nbytes)
            elif interleaved and field.name == "gate_weight":
                first = places[0].start - tensor.element_size()
            else:
                start = aligned(start + nbytes)
            places.append(_Place(field.name, first, nbytes, tuple(tensor.shape), tensor.stride(), tensor.dtype))
        return cls(tuple(places), start)

    @property
    def expert_dtype(self) -> torch.dtype:
        """Of the matrices."""
        return next(place.dtype for place in self.places if place.name == "fc1_weight")

    @property
    def expert_bytes(self) -> int:
        """Bytes of the tensors, without what is lost between them."""
        return sum(place.nbytes for place in self.places)

    def view(self, memory: Tensor) -> ExpertWeights:
        """The expert in the ``nbytes`` bytes of ``memory`` (uint8)."""
        tensors: dict[str, Tensor | None] = {field.name: None for field in dataclasses.fields(ExpertWeights)}
        for place in self.places:
            numbers = memory[place.start :].view(place.dtype)
            tensors[place.name] = numbers.as_strided(place.shape, place.stride)
        return ExpertWeights(**tensors)  # type: ignore[arg-type]


class SlotArena:
    """``num_slots`` slots of ``slot_bytes`` bytes in one allocation, never more.

    Args:
        num_slots: at least 1.
        slot_bytes: of the largest expert's layout.
        device: where the slots are.
        pinned: whether they are page-locked host memory, from which a GPU copies without the processor's help.
    """

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device, *, pinned: bool = False) -> None:
        self.num_slots, self.slot_bytes, self.device = num_slots, slot_bytes, device
        # Not an inference tensor, whatever the caller's mode: such could not be written to outside of it.
        with torch.inference_mode(False):
            self._memory = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self._memory.numel()

    def view(self, slot: int, layout: SlotLayout) -> ExpertWeights:
        """Slot ``slot`` as an expert of ``layout``."""
        start = slot * self.slot_bytes
        with torch.inference_mode(False):
            return layout.view(self._memory[start : start + layout.nbytes])


def slot_bytes_for(layouts: Iterable[SlotLayout]) -> int:
    """Bytes of a slot that any of ``layouts`` fits in."""
    return max(layout.nbytes for layout in layouts)
