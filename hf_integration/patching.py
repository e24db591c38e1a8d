"""Changes to a host model, each with its inverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq_moe_opt.build import ExpertShare
from fairseq_moe_opt.moe import MoELayer
from fairseq_moe_opt.moe.cache_report import BufferReport

if TYPE_CHECKING:
    from hf_integration.padding import PaddingMasks


@dataclass(frozen=True)
class _Restore:
    """Puts an instance attribute back."""

    target: object
    name: str
    had: bool
    before: object

    def __call__(self) -> None:
        if self.had:
            setattr(self.target, self.name, self.before)
        else:
            vars(self.target).pop(self.name, None)


@dataclass
class Patches:
    """What was changed in a model, and how to put it back, last change first.

    Every inverse is an object or a bound method, not a closure: in a copied model it then refers to the copy.
    """

    _undo: list[Callable[[], None]] = field(default_factory=list)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give this one module another ``forward``, as an attribute that hides its class's.

        ``forward`` is an object, not a closure, so that ``copy.deepcopy`` of the model copies what it refers to.
        """
        self.set_attribute(module, "forward", forward)

    def set_attribute(self, target: object, name: str, value: object) -> None:
        """Set an instance attribute; the inverse restores what the instance itself had."""
        own = vars(target)
        self._undo.append(_Restore(target, name, name in own, own.get(name)))
        setattr(target, name, value)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Register the inverse of a change made elsewhere: an object or bound method, not a closure."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back; a second call does nothing. What raises is tried again by the next call."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


@dataclass(frozen=True)
class Installed:
    """A family's layers in a model.

    Attributes:
        family: its name.
        layers: the engine's layers, in the model's order.
        patches: how to take them out.
        expert_bytes: bytes of all expert weights, or of this rank's.
        masks: which tokens the layers do not route.
        buffer: of the memory they share; None where all of them stay.
        shares: this rank's experts by layer, where ranks share them.
        notes: what this release of Transformers made different, for the report.
    """

    family: str
    layers: tuple[MoELayer, ...]
    patches: Patches
    expert_bytes: int
    masks: PaddingMasks
    buffer: BufferReport | None = None
    shares: Mapping[str, ExpertShare] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
