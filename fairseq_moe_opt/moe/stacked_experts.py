"""An expert store over stacks: a host module's own parameters, each of which holds one matrix of all experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, PackedExperts


@dataclass(frozen=True)
class StackLayout:
    """How the first matrix of all experts, and the second, lie in their stacks.

    Attributes:
        gated: the first stack holds gates too, so that it is (E, 2F, D) instead of (E, F, D).
        transposed: both stacks have their last two dimensions exchanged: (E, D, 2F) and (E, F, D).
        interleaved: gate and up take turns (g0, u0, g1 ...); else all gates come first.
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False

    def first(self, stack: Tensor) -> dict[str, Tensor]:
        """Of the first stack, one expert's part of it or all, its matrices by their names in ``ExpertWeights``."""
        return self._halves(stack.transpose(-1, -2) if self.transposed else stack, -2, "weight")

    def first_bias(self, stack: Tensor) -> dict[str, Tensor]:
        """The same of the (E, 2F) biases, or one expert's."""
        return self._halves(stack, -1, "bias")

    def second(self, stack: Tensor) -> dict[str, Tensor]:
        """Of the second stack."""
        return {"fc2_weight": stack.transpose(-1, -2) if self.transposed else stack}

    def views(self, stacks: Stacks) -> dict[str, Tensor]:
        """All parts, by name."""
        parts = {**self.first(stacks.first), **self.second(stacks.second)}
        if stacks.first_bias is not None:
            parts.update(self.first_bias(stacks.first_bias))
        if stacks.second_bias is not None:
            parts["fc2_bias"] = stacks.second_bias
        return parts

    def _halves(self, both: Tensor, dim: int, kind: str) -> dict[str, Tensor]:
        if not self.gated:
            return {f"fc1_{kind}": both}
        if self.interleaved:
            # 2F as (F, 2), so that a half is one index of a dimension of its own.
            shape = list(both.shape)
            shape[dim:] = [shape[dim] // 2, 2, *(shape[dim + 1 :] if dim < -1 else ())]
            gate, up = both.view(shape).unbind(dim)
        else:
            gate, up = both.chunk(2, dim)
        return {f"gate_{kind}": gate, f"fc1_{kind}": up}


@dataclass(frozen=True)
class Stacks:
    """The parameters themselves: first and second matrices of all experts, and their biases."""

    first: Tensor
    second: Tensor
    first_bias: Tensor | None = None
    second_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        every = (self.first, self.second, self.first_bias, self.second_bias)
        return tuple(tensor for tensor in every if tensor is not None)


class StackedExperts:
    """All experts of a layer in the parameters that ``load`` gives; reads them live, copies nothing.

    Views are kept until the parameters lie elsewhere, because making them costs more than a small expert's product.
    """

    def __init__(self, layout: StackLayout, load: Callable[[], Stacks]) -> None:
        self.layout = layout
        self._load = load
        self._kept: _Views | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self._load().first.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self._load().first.dtype

    @property
    def trainable(self) -> bool:
        """Whether any weight takes gradients."""
        return any(tensor.requires_grad for tensor in self._load().tensors())

    @property
    def transient(self) -> bool:
        """False: the weights stay."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._load().tensors())

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """One wave with everything asked for, and the stack."""
        stacks = self._load()
        if torch.is_grad_enabled() and self.trainable:
            packed = self._views(stacks)  # part of this forward's graph
            yield ExpertWave(tuple(needed), tuple(packed.expert(expert) for expert in needed), packed)
            return
        views = self._current(stacks)
        yield ExpertWave(tuple(needed), tuple(views.expert(expert) for expert in needed), views.packed)

    def _current(self, stacks: Stacks) -> _Views:
        seen = tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in stacks.tensors())
        views = self._kept
        if views is None or views.seen != seen:
            with torch.no_grad():
                views = self._kept = _Views(seen, self._views(stacks))
        return views

    def _views(self, stacks: Stacks) -> PackedExperts:
        parts: Mapping[str, Tensor | None] = {"fc1_bias": None, "fc2_bias": None, **self.layout.views(stacks)}
        return PackedExperts(**parts)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, object]) -> StackedExperts:
        return StackedExperts(self.layout, copy.deepcopy(self._load, memo))  # views of the copied parameters


class _Views:
    """Of stacks that lay where ``seen`` says: all experts, and those that were asked for one by one."""

    def __init__(self, seen: tuple[object, ...], packed: PackedExperts) -> None:
        self.seen, self.packed = seen, packed
        self._experts: dict[int, ExpertWeights] = {}

    def expert(self, index: int) -> ExpertWeights:
        """Expert ``index``, made at first use."""
        found = self._experts.get(index)
        if found is None:
            found = self._experts[index] = self.packed.expert(index)
        return found
