"""A world of one: every expert is here, so rows stay where they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fairseq_moe_opt.moe.types import Arrival


class LocalExchange:
    """The identity: slot ``e`` is expert ``e``."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    @property
    def num_slots(self) -> int:
        """E."""
        return self._num_experts

    @property
    def counters(self) -> None:
        """Nothing is sent."""
        return None

    def dispatch(self, sizes: Tensor, gather: Callable[[int | None], Tensor]) -> Arrival:
        """The rows that are computed, and no others."""
        # The layer's one host synchronisation: sizes must be known on the host to slice rows.
        on_host = tuple(sizes.tolist())
        counts = on_host[: self._num_experts]
        return Arrival(gather(sum(counts)), counts, on_host, None)

    def combine(self, results: Tensor, state: object) -> Tensor:
        """``results`` themselves."""
        return results


class LocalPaddedExchange:
    """The static baseline on one rank."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    @property
    def num_slots(self) -> int:
        """E."""
        return self._num_experts

    @property
    def counters(self) -> None:
        """Nothing is sent."""
        return None

    def capacity(self, own: int) -> int:
        """``own``."""
        return own

    def dispatch(self, buffers: Tensor) -> Tensor:
        """``buffers`` themselves."""
        return buffers

    def combine(self, outputs: Tensor) -> Tensor:
        """``outputs`` themselves."""
        return outputs
