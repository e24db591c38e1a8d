"""The load history a placement is made from: how many rows each expert got, batch by batch.

Letters of this room: B batches of a layer's history, E experts, W ranks (the paper's D, its "devices"), S slots of all
ranks together (E and the replicas).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import Trace, TraceVisit

Counts = NDArray[np.int64]
"""Routed rows, (B, E)."""
Shares = NDArray[np.float64]
"""Each batch's rows as shares of that batch, (B, E): rows that sum to 1. The paper's A, transposed."""


@dataclass(frozen=True)
class LoadHistory:
    """Routed rows of every Mixture-of-Experts layer, batch by batch.

    Attributes:
        layers: layer name to (B, E) int64 counts; layers may differ in B, never in E. Copied and made read-only.

    Raises:
        InputError: no layer, an array that is not (B, E) of counts, two numbers of experts, or a layer without a
            single routed row.
    """

    layers: Mapping[str, Counts]

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a load history needs at least one layer")
        checked = {name: _checked(name, counts) for name, counts in self.layers.items()}
        experts = {name: counts.shape[1] for name, counts in checked.items()}
        if len(set(experts.values())) > 1:
            raise InputError(f"a load history needs one number of experts; got {experts}")
        object.__setattr__(self, "layers", MappingProxyType(checked))

    def __reduce__(self) -> tuple[Any, ...]:
        """Read-only mappings cannot be pickled."""
        return type(self), (dict(self.layers),)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(next(iter(self.layers.values())).shape[1])

    def shares(self, layer: str) -> Shares:
        """The history of ``layer`` as shares of each batch (paper, section 4.4), (B', E), less empty batches."""
        return shares_of(self.layers[layer])

    def halves(self) -> tuple[LoadHistory, LoadHistory]:
        """The first half of every layer's batches, to place by, and the second, to test on (paper, section 4.4).

        An odd batch goes to the second half. Raises InputError where a half would hold no row.
        """
        first = {name: counts[: len(counts) // 2] for name, counts in self.layers.items()}
        second = {name: counts[len(counts) // 2 :] for name, counts in self.layers.items()}
        return LoadHistory(first), LoadHistory(second)


def shares_of(counts: Counts) -> Shares:
    """(B, E) counts as shares of each batch, (B', E); batches without a row say nothing and are left out."""
    rows = counts.sum(axis=1, keepdims=True)
    used = rows[:, 0] > 0
    return np.asarray(counts[used] / rows[used], dtype=np.float64)


def history_of(trace: Trace, phase: str | None = None) -> LoadHistory:
    """The counts of ``trace``: a layer's visits are its batches. Of one ``phase``, or of all.

    Raises InputError where the trace has no counts, nothing of the phase, or layers of different sizes.
    """
    layers = {one.name: one.num_experts for one in trace.layers if phase in (None, one.phase)}
    visits: dict[str, list[TraceVisit]] = {name: [] for name in layers}
    for visit in trace.visits:
        if not visit.counts:
            raise InputError("the trace says which experts were needed, but not how many rows they got: record it anew")
        if visit.layer in layers:
            visits[visit.layer].append(visit)
    return LoadHistory({name: _dense(visits[name], num_experts) for name, num_experts in layers.items()})


def read_history(path: str | PathLike[str]) -> LoadHistory:
    """Read a ``.npz`` file that holds one (B, E) array of counts a layer, named by its layer.

    Raises InputError, naming the file, where it is none or does not hold a load history.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as arrays:
            return LoadHistory({name: arrays[name] for name in arrays.files})
    except InputError as error:
        raise InputError(f"{fspath(path)}: {error}") from None
    except (OSError, ValueError, TypeError, BadZipFile) as error:
        raise InputError(f"{fspath(path)}: not a .npz file of counts a layer ({error})") from None


def _dense(visits: Sequence[TraceVisit], num_experts: int) -> Counts:
    """(B, E) counts of one layer's visits."""
    counts = np.zeros((len(visits), num_experts), dtype=np.int64)
    for batch, visit in enumerate(visits):
        counts[batch, list(visit.experts)] = visit.counts
    return counts


def _checked(name: str, counts: Counts) -> Counts:
    """A read-only int64 copy of ``counts``; InputError where it cannot be a layer's history."""
    array = np.asarray(counts)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"layer {name!r}: counts must be (batches, experts); got the shape {array.shape}")
    if array.dtype.kind not in "iu" or (array < 0).any():
        raise InputError(f"layer {name!r}: counts must be whole numbers, 0 or more; got {array.dtype}")
    if not array.any():
        raise InputError(f"layer {name!r}: not one row was routed in its {array.shape[0]} batches")
    copy = array.astype(np.int64)
    copy.setflags(write=False)
    return copy
