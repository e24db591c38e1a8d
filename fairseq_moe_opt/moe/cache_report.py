"""What a layer's expert cache did: hits, misses, bytes, waiting, and how good its predictions were."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fairseq_moe_opt.moe.types import ExpertRead


@dataclass(frozen=True)
class CacheReport:
    """What the cache of one layer's experts did.

    Attributes:
        hits: experts asked for that were there.
        misses: experts asked for that were not, those on their way included.
        evictions: experts of this layer that made room for others.
        bytes_read: by tier (``file``, ``host``, ``model``), fetched ahead or not.
        stall_seconds: time that forwards waited for experts.
        waves: pieces that forwards were cut into, those on the device.
        on_host: of the misses, experts that were computed in main memory instead of being copied to the device.
        on_host_rows: rows that were computed there.
        predicted: experts that were predicted for a forward, over the forwards with a prediction.
        predicted_right: those of them that were asked for.
        predicted_of: experts that were asked for in those forwards.
        fetched_ahead: experts that were fetched before they were asked for.
        fetched_ahead_used: those of them that were asked for next.
        resident: ids of the experts in slots when the report was made.
    """

    hits: int
    misses: int
    evictions: int
    bytes_read: dict[str, int]
    stall_seconds: float
    waves: int
    on_host: int
    on_host_rows: int
    predicted: int
    predicted_right: int
    predicted_of: int
    fetched_ahead: int
    fetched_ahead_used: int
    resident: tuple[int, ...]

    @property
    def miss_rate(self) -> float:
        """Misses over everything asked for; 0 when nothing was."""
        return _share(self.misses, self.hits + self.misses)

    @property
    def precision(self) -> float:
        """Which share of the predicted experts was asked for."""
        return _share(self.predicted_right, self.predicted)

    @property
    def recall(self) -> float:
        """Which share of the experts asked for had been predicted, in forwards with a prediction."""
        return _share(self.predicted_right, self.predicted_of)

    def to_dict(self) -> dict[str, object]:
        """Plain values, the rates among them."""
        rates = {"miss_rate": self.miss_rate, "precision": self.precision, "recall": self.recall}
        return {**asdict(self), **rates}


@dataclass(frozen=True)
class BufferReport:
    """The memory in which a model's experts are buffered.

    Attributes:
        slots: experts that are on the device together, over all layers.
        experts: experts of the model.
        slot_bytes: of one expert.
        arena_bytes: of all slots.
        workspace_bytes: the most that readers use beside them, to change dtypes and layouts.
        host_bytes: of the tier in main memory.
        host_compute_rows: the most rows with which a missing expert can be computed there; 0 where none is.
        policy: what decides which expert makes room.
        pool: ``global`` or ``layer``.
    """

    slots: int
    experts: int
    slot_bytes: int
    arena_bytes: int
    workspace_bytes: int
    host_bytes: int
    host_compute_rows: int
    policy: str
    pool: str


class CacheCounters:
    """Running sums of one layer's cache; safe to add to from several threads.

    ``resident`` gives the ids of the experts in slots at any time.
    """

    def __init__(self, resident: Callable[[], tuple[int, ...]] = tuple) -> None:
        self.resident = resident
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self._sums = dict.fromkeys(_SUMS, 0)
            self._bytes: dict[str, int] = {}
            self._stall = 0.0

    def add_visit(self, hits: int, misses: int) -> None:
        """A forward asked for ``hits`` experts that were there and ``misses`` that were not."""
        self._add(hits=hits, misses=misses)

    def add_wave(self, stall_seconds: float) -> None:
        """A forward got a wave of experts after waiting for so long."""
        self._add(waves=1)
        with self._lock:
            self._stall += stall_seconds

    def add_on_host(self, experts: int, rows: int) -> None:
        """A forward has so many experts computed in main memory, with so many rows together."""
        self._add(on_host=experts, on_host_rows=rows)

    def add_eviction(self) -> None:
        """An expert made room for another."""
        self._add(evictions=1)

    def add_read(self, read: ExpertRead) -> None:
        """An expert was fetched."""
        with self._lock:
            self._bytes[read.tier] = self._bytes.get(read.tier, 0) + read.nbytes

    def add_prediction(self, predicted: int, right: int, asked_for: int) -> None:
        """Of ``predicted`` experts ``right`` were asked for, among ``asked_for`` in all."""
        self._add(predicted=predicted, predicted_right=right, predicted_of=asked_for)

    def add_fetched_ahead(self, experts: int) -> None:
        """So many experts are being fetched ahead; negative when that was cancelled."""
        self._add(fetched_ahead=experts)

    def add_used_ahead(self, experts: int) -> None:
        """So many experts that were fetched ahead have now been asked for."""
        self._add(fetched_ahead_used=experts)

    def snapshot(self) -> CacheReport:
        """The sums so far."""
        resident = self.resident()
        with self._lock:
            return CacheReport(**self._sums, bytes_read=dict(self._bytes), stall_seconds=self._stall, resident=resident)

    def _add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount


_SUMS = (
    "hits",
    "misses",
    "evictions",
    "waves",
    "on_host",
    "on_host_rows",
    "predicted",
    "predicted_right",
    "predicted_of",
    "fetched_ahead",
    "fetched_ahead_used",
)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
