"""What computed the dense part of a model: counters, and what a report says of them."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class DenseReport:
    """What computed the dense part of a model.

    Attributes:
        linears, feed_forwards: layers that do not run as the host model has them.
        calls: their forwards since the last reset, by what computed them: ``fused``, ``onednn`` or ``torch``.
    """

    linears: int
    feed_forwards: int
    calls: dict[str, int]

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for ``json.dump``."""
        return asdict(self)


class DenseCounters:
    """Running sums of a model's dense layers; safe to add to from several threads."""

    def __init__(self) -> None:
        self.linears = self.feed_forwards = 0
        self._calls: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, backend: str) -> None:
        """Count one forward."""
        with self._lock:
            self._calls[backend] = self._calls.get(backend, 0) + 1

    def reset(self) -> None:
        """Forget the forwards counted so far."""
        with self._lock:
            self._calls.clear()

    def snapshot(self) -> DenseReport:
        """The sums so far."""
        with self._lock:
            return DenseReport(self.linears, self.feed_forwards, dict(self._calls))

    def __deepcopy__(self, memo: dict[int, object]) -> DenseCounters:
        copied = DenseCounters()
        copied.linears, copied.feed_forwards = self.linears, self.feed_forwards
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        # A copied or pickled model starts counting afresh; a lock cannot travel anyway.
        return DenseCounters, (), {"linears": self.linears, "feed_forwards": self.feed_forwards}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.linears, self.feed_forwards = state["linears"], state["feed_forwards"]
