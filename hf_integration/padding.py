"""Which of the tokens that Mixture-of-Experts layers are given need not be routed: padding, and rows nobody wants."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_integration.patching import Patches


class PaddingMasks(threading.local):
    """What is known of the tokens that a phase's layers are computing now, in this thread.

    Padding is taken from the encoder's or decoder's own two-dimensional mask: the four-dimensional one that layers are
    handed has lost which tokens are padding once a cache is in use.

    Attributes:
        known: by phase, the padding of the tokens, (B, T) bool; None where there is none.
        idle: nothing that is computed now is wanted: a dummy batch, or one whose sentences are all finished.
        finished: (B,) bool, rows of the decoder whose sentences are finished; None where that is not known.
        decoder_rows: B of the decoder's last forward.
    """

    def __init__(self) -> None:
        self.known: dict[str, Tensor | None] = {}
        self.idle = False
        self.finished: Tensor | None = None
        self.decoder_rows = 0

    def padding(self, given: Tensor | None, hidden_states: Tensor, phase: str) -> Tensor | None:
        """(B*T,) bool of (B, T, D) ``hidden_states``; ``given`` is the mask that the layer was handed."""
        batch, length, _ = hidden_states.shape
        known = self.known.get(phase, given)
        if known is None:
            return None
        if known.dim() == 4:
            known = _masked_columns(known)
        return known[:, -length:].reshape(batch * length).bool() if known.shape[1] >= length else None

    def unwanted(self, hidden_states: Tensor, phase: str) -> Tensor | None:
        """(B*T,) bool: rows whose results are thrown away; None where all are wanted."""
        batch, length, _ = hidden_states.shape
        if self.idle:
            return torch.ones(batch * length, dtype=torch.bool, device=hidden_states.device)
        if phase != "decoder" or self.finished is None or len(self.finished) != batch:
            return None
        return self.finished.to(hidden_states.device).repeat_interleave(length)

    def not_routed(
        self, given: Tensor | None, hidden_states: Tensor, phase: str, *, skip_padding: bool
    ) -> Tensor | None:
        """(B*T,) bool: ``unwanted`` rows, and padding if that is not to be routed; None where all rows are."""
        unwanted = self.unwanted(hidden_states, phase)
        if not skip_padding:
            return unwanted
        padding = self.padding(given, hidden_states, phase)
        if padding is None or unwanted is None:
            return unwanted if padding is None else padding
        return padding | unwanted

    def __deepcopy__(self, memo: dict[int, object]) -> PaddingMasks:
        return PaddingMasks()

    def __reduce__(self) -> tuple[type[PaddingMasks], tuple[()]]:
        return PaddingMasks, ()


def watch_padding(model: nn.Module, phases: Sequence[str], patches: Patches) -> PaddingMasks:
    """Masks that the stacks of ``model`` named like one of ``phases`` note with every forward."""
    masks = PaddingMasks()
    for name, module in model.named_modules():
        phase = name.rpartition(".")[2]
        if phase in phases and (hasattr(module, "layers") or hasattr(module, "block")):  # T5's stacks have blocks
            watch_stack(module, phase, masks, patches)
    return masks


def watch_stack(stack: nn.Module, phase: str, masks: PaddingMasks, patches: Patches) -> None:
    """Let ``masks`` note what ``stack``, which computes that ``phase``, is given with every forward."""
    before = stack.register_forward_pre_hook(_NoteMask(masks, phase), with_kwargs=True)
    after = stack.register_forward_hook(_ForgetMask(masks, phase), always_call=True)
    patches.on_undo(before.remove)
    patches.on_undo(after.remove)


class _NoteMask:
    def __init__(self, masks: PaddingMasks, phase: str) -> None:
        self._masks, self._phase = masks, phase

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._phase == "decoder" and isinstance(ids, Tensor):
            self._masks.decoder_rows = len(ids)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is None:
            self._masks.known[self._phase] = None
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            self._masks.known[self._phase] = mask == 0


class _ForgetMask:
    def __init__(self, masks: PaddingMasks, phase: str) -> None:
        self._masks, self._phase = masks, phase

    def __call__(self, *_: Any) -> None:
        self._masks.known.pop(self._phase, None)


def _masked_columns(mask: Tensor) -> Tensor:
    """(B, columns) bool from a four-dimensional attention mask: columns that the last query may not attend to."""
    last = mask[:, 0, -1, :]
    return ~last if last.dtype == torch.bool else last < 0
