"""Keys and values of tokens that are already there stay where they are when another token comes.

Transformers' ``DynamicLayer`` copies all of them with every token, into memory that is new each time. Here they lie in
a buffer with room for some more, a token's are written behind the others', and layers see a view of what is used. With
beams, the ones that go on are copied once, room included, instead of twice. The numbers are the same. On a CPU, without
gradients; elsewhere Transformers does what it does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from hf_integration.patching import Patches

_LEAST_ROOM = 16
"""Tokens that there is room for at least when a buffer is made."""


def install_roomy_caches(model: nn.Module, patches: Patches) -> None:
    """Make room in every dynamic cache that ``model`` is given from now on."""
    patches.on_undo(model.register_forward_pre_hook(_make_room, with_kwargs=True).remove)


def _make_room(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache: Any = kwargs.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            # It goes on as what it is, with another way to grow; whoever holds it notices nothing.
            layer.__class__ = RoomyLayer
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer


class RoomyLayer(DynamicLayer):
    """A ``DynamicLayer`` that copies what it has only when its buffer is full."""

    keys: Any  # (B, H, T, D), None before the first update
    values: Any
    _kept: tuple[_Buffer, _Buffer] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) states; all that there are now."""
        if not self.is_initialized or not self.keys.numel() or not _can_write(key_states, value_states):
            self._kept = None
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        before = self._kept or (None, None)
        kept = (_appended(before[0], self.keys, key_states), _appended(before[1], self.values, value_states))
        self._kept = kept
        self.keys, self.values = kept[0].used, kept[1].used
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        kept = self._kept
        if kept is None or kept[0].used is not self.keys or kept[1].used is not self.values:
            super().reorder_cache(beam_idx)
            return
        self._kept = (kept[0].selected(beam_idx), kept[1].selected(beam_idx))
        self.keys, self.values = self._kept[0].used, self._kept[1].used


class _Buffer:
    """(B, H, room, D) memory, of which ``used`` is a view of the tokens that are there."""

    def __init__(self, memory: Tensor, length: int) -> None:
        self.memory = memory
        self.used = memory.narrow(2, 0, length)

    def selected(self, rows: Tensor) -> _Buffer:
        """Of these rows, with the room there was."""
        return _Buffer(self.memory.index_select(0, rows), self.used.shape[2])

    def takes(self, states: Tensor, more: Tensor) -> bool:
        """Whether ``states`` are what is here, unchanged, and there is room for ``more``."""
        if states is not self.used or (self.memory.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        return self.used.shape[2] + more.shape[2] <= self.memory.shape[2] and self.memory.dtype == more.dtype


def _appended(buffer: _Buffer | None, states: Tensor, more: Tensor) -> _Buffer:
    """(B, H, S, D) ``states`` and (B, H, T, D) ``more``: in ``buffer`` if they are there and it has room."""
    length, added = states.shape[2], more.shape[2]
    if buffer is None or not buffer.takes(states, more):
        batch, heads, _, width = states.shape
        room = max(_LEAST_ROOM, (length + added) // 2)
        memory = states.new_empty(batch, heads, length + added + room, width)
        memory.narrow(2, 0, length).copy_(states)
        buffer = _Buffer(memory, length)
    buffer.memory.narrow(2, length, added).copy_(more)
    return _Buffer(buffer.memory, length + added)


def _can_write(*states: Tensor) -> bool:
    """Whether they are a CPU's, and no gradient flows through them."""
    wanted = torch.is_grad_enabled()
    return all(one.dim() == 4 and one.device.type == "cpu" and not (wanted and one.requires_grad) for one in states)
