"""Auxiliary losses on their way from the sparse layers to a criterion, past fairseq's fixed layer outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class GateLosses:
    """What one forward pass of a model gave, layer by layer.

    Attributes:
        balance: the load-balancing loss ``l_aux`` of each layer, 0-dim.
        cmr_share: sum of the CMR gate over tokens, one entry a CMR layer, 0-dim.
        cmr_tokens: number of tokens that are not padding, one entry a CMR layer.
    """

    balance: list[Tensor] = field(default_factory=list)
    cmr_share: list[Tensor] = field(default_factory=list)
    cmr_tokens: list[Tensor | int] = field(default_factory=list)


_COLLECTOR: ContextVar[GateLosses | None] = ContextVar("gate_losses", default=None)


@contextmanager
def collect_gate_losses() -> Iterator[GateLosses]:
    """Gather the losses of every sparse layer that runs inside the ``with`` block, in this thread."""
    losses = GateLosses()
    token = _COLLECTOR.set(losses)
    try:
        yield losses
    finally:
        _COLLECTOR.reset(token)


def wants_gate_losses() -> bool:
    """Whether anybody gathers them: they cost something."""
    return _COLLECTOR.get() is not None


def note_gate_loss(loss: Tensor | None) -> None:
    """Hand a layer's ``l_aux`` over."""
    collector = _COLLECTOR.get()
    if collector is not None and loss is not None:
        collector.balance.append(loss)


def note_cmr_gate(share: Tensor, padding: Tensor | None) -> None:
    """Hand a CMR layer's gate (T, B, 1) over; ``padding`` is (B, T), True where a token does not count."""
    if wants_gate_losses():
        _note_cmr(share.sum(), share.shape[0] * share.shape[1] if padding is None else (~padding).sum())


def hand_over(balance: Tensor, share: Tensor | None, tokens: Tensor | int | None) -> None:
    """Hand over what another collector got from one layer: the parts of a ``GateLosses``, None without CMR."""
    note_gate_loss(balance)
    if share is not None and tokens is not None:
        _note_cmr(share, tokens)


def _note_cmr(share: Tensor, tokens: Tensor | int) -> None:
    collector = _COLLECTOR.get()
    if collector is not None:
        collector.cmr_share.append(share)
        collector.cmr_tokens.append(tokens)
