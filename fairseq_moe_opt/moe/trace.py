"""Which experts each forward asked for: recorded from a running model, read back for simulation and warm starts.

One JSON object a file: ``{"format": 1, "fingerprint": ..., "layers": [...], "visits": [...]}``; a visit is ``[layer,
tokens, [experts]]`` and names its layer by its place in ``layers``. A layer's n-th visit is its n-th step.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.types import Dispatch, ExpertKey, Routing

_FORMAT = 1


@dataclass(frozen=True)
class TraceLayer:
    """A layer of the traced model: its name, ``encoder`` or ``decoder``, and E."""

    name: str
    phase: str
    num_experts: int


@dataclass(frozen=True)
class TraceVisit:
    """One forward of ``layer``: the ``experts`` it needed, ascending, and its ``tokens``, padding included."""

    layer: str
    experts: tuple[int, ...]
    tokens: int = 1


@dataclass(frozen=True)
class Trace:
    """Forwards in the order in which they ran, of a model with these ``layers``."""

    layers: tuple[TraceLayer, ...]
    visits: tuple[TraceVisit, ...]

    @property
    def fingerprint(self) -> str:
        """What a model must have in common for the trace to speak of it: names, phases and experts of its layers."""
        return ";".join(f"{layer.name}:{layer.phase}:{layer.num_experts}" for layer in self.layers)

    def phase(self, name: str) -> tuple[TraceVisit, ...]:
        """The visits of one phase's layers."""
        layers = {layer.name for layer in self.layers if layer.phase == name}
        return tuple(visit for visit in self.visits if visit.layer in layers)

    def hottest(self) -> list[ExpertKey]:
        """Experts by how often they were needed, the most often first."""
        counts = Counter(ExpertKey(visit.layer, expert) for visit in self.visits for expert in visit.experts)
        return sorted(counts, key=lambda key: (-counts[key], key))


class TraceRecorder:
    """A routing observer that keeps which experts each forward needed; for several threads at once.

    Keeps at most ``limit`` visits, the first ones, so that a long run cannot fill the memory.
    """

    def __init__(self, layers: Sequence[TraceLayer], limit: int = 1_000_000) -> None:
        self._layers = tuple(layers)
        self._limit = limit
        self._lock = threading.Lock()
        self._visits: list[TraceVisit] = []

    def observe(self, layer: str, routing: Routing, dispatch: Dispatch) -> None:
        """Note a forward of ``layer``; one without any routed row needs nothing and is left out."""
        needed = tuple(expert for expert, count in enumerate(dispatch.counts) if count)
        with self._lock:
            if needed and len(self._visits) < self._limit:
                self._visits.append(TraceVisit(layer, needed, routing.expert_index.shape[0]))

    def trace(self) -> Trace:
        """What was seen so far."""
        with self._lock:
            return Trace(self._layers, tuple(self._visits))

    def __deepcopy__(self, memo: dict[int, object]) -> TraceRecorder:
        return TraceRecorder(self._layers, self._limit)

    def __reduce__(self) -> tuple[type[TraceRecorder], tuple[tuple[TraceLayer, ...], int]]:
        # A lock cannot travel; a copied model starts a trace of its own.
        return TraceRecorder, (self._layers, self._limit)


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write ``trace``, to a temporary name first, so that a reader never sees half of it."""
    target = Path(path)
    place = {layer.name: index for index, layer in enumerate(trace.layers)}
    content = {
        "format": _FORMAT,
        "fingerprint": trace.fingerprint,
        "layers": [asdict(layer) for layer in trace.layers],
        "visits": [[place[visit.layer], visit.tokens, list(visit.experts)] for visit in trace.visits],
    }
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(target)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read what ``write_trace`` wrote; CheckpointError naming the file when it is anything else."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(path, f"is not a trace: {error}") from error
    try:
        if content["format"] != _FORMAT:
            raise CheckpointError(path, f"is a trace of format {content['format']}, this is for format {_FORMAT}")
        layers = tuple(
            TraceLayer(str(one["name"]), str(one["phase"]), int(one["num_experts"])) for one in content["layers"]
        )
        visits = tuple(_visit(layers, *visit) for visit in content["visits"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(path, f"is not a trace: {type(error).__name__} {error}") from error
    return Trace(layers, visits)


def check_trace(trace: Trace, layers: Sequence[TraceLayer], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless ``trace`` speaks of a model with these layers."""
    if trace.fingerprint != Trace(tuple(layers), ()).fingerprint:
        raise CheckpointError(path, "was recorded from another model: its layers or their experts differ")


def _visit(layers: Sequence[TraceLayer], place: int, tokens: int, experts: Sequence[int]) -> TraceVisit:
    layer = layers[place]
    if any(not 0 <= expert < layer.num_experts for expert in experts):
        raise ValueError(f"{layer.name} has {layer.num_experts} experts, but a visit names others")
    return TraceVisit(layer.name, tuple(sorted(experts)), int(tokens))
