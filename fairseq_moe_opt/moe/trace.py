"""Which experts each forward asked for, and how many rows each got: recorded from a running model, read back for
cache simulation, warm starts and placement.

One JSON object a file: ``{"format": 2, "fingerprint": ..., "layers": [...], "visits": [...]}``; a visit is ``[layer,
tokens, [experts], [counts]]``, and ``[[a token's experts], ...]`` after that where choices were asked for. It names its
layer by its place in ``layers``. A layer's n-th visit is its n-th step. Format 1 had no counts, and is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.types import Dispatch, ExpertKey, Routing

_FORMAT, _READABLE = 2, (1, 2)


@dataclass(frozen=True)
class TraceLayer:
    """A layer of the traced model: its name, ``encoder`` or ``decoder``, and E."""

    name: str
    phase: str
    num_experts: int


_PLACE = re.compile(r"(?:^|\.)((?:encoder|decoder)\.layers\.\d+)\.")


def portable_name(layer: str) -> str:
    """What a layer is called in every front end: its place in the model. Another name is left as it is.

    >>> portable_name("model.encoder.layers.1.ffn"), portable_name("encoder.layers.1.moe_layer")
    ('encoder.layers.1', 'encoder.layers.1')
    """
    found = _PLACE.search(layer)
    return layer if found is None else found[1]


@dataclass(frozen=True)
class TraceVisit:
    """One forward of a layer.

    Attributes:
        layer: its name.
        experts: those it needed, ascending.
        tokens: rows of its input, padding included.
        counts: routed rows of each of ``experts``, padding not included; empty where only needs are known.
        choices: the experts of each routed token, in the order of its choices; empty unless they were asked for.
    """

    layer: str
    experts: tuple[int, ...]
    tokens: int = 1
    counts: tuple[int, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Trace:
    """Forwards in the order in which they ran, of a model with these ``layers``."""

    layers: tuple[TraceLayer, ...]
    visits: tuple[TraceVisit, ...]

    @property
    def fingerprint(self) -> str:
        """What a model must have in common for the trace to speak of it: places, phases and experts of its layers.

        The same in Transformers and in fairseq, whatever they call a layer.
        """
        text = ";".join(f"{portable_name(layer.name)}:{layer.phase}:{layer.num_experts}" for layer in self.layers)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def named_as(self, layers: Sequence[TraceLayer]) -> Trace:
        """The same trace with the names that ``layers``, of a model it fits, have there."""
        names = {portable_name(layer.name): layer.name for layer in layers}
        found = {layer.name: names[portable_name(layer.name)] for layer in self.layers}
        return Trace(
            tuple(replace(layer, name=found[layer.name]) for layer in self.layers),
            tuple(replace(visit, layer=found[visit.layer]) for visit in self.visits),
        )

    def phase(self, name: str) -> tuple[TraceVisit, ...]:
        """The visits of one phase's layers."""
        layers = {layer.name for layer in self.layers if layer.phase == name}
        return tuple(visit for visit in self.visits if visit.layer in layers)

    def hottest(self) -> list[ExpertKey]:
        """Experts by how often they were needed, the most often first."""
        counts = Counter(ExpertKey(visit.layer, expert) for visit in self.visits for expert in visit.experts)
        return sorted(counts, key=lambda key: (-counts[key], key))


class _Seen(NamedTuple):
    """A visit as it is kept while recording: its choices, if any, still on their device."""

    visit: TraceVisit
    choices: Tensor | None


class TraceRecorder:
    """A routing observer that keeps which experts each forward needed, and their rows; for several threads at once.

    It never waits for the device: counts are on the host already, and choices stay where they are until ``trace()``.

    Args:
        layers: the model's.
        limit: visits kept, the first ones, so that a long run cannot fill the memory.
        choices_limit: choices of single tokens kept, the first ones, 2 bytes each on the device; 0 keeps none.
    """

    def __init__(self, layers: Sequence[TraceLayer], limit: int = 200_000, *, choices_limit: int = 0) -> None:
        self._layers = tuple(layers)
        self._limit = limit
        self._choices_limit, self._choices_left = choices_limit, choices_limit
        self._lock = threading.Lock()
        self._seen: list[_Seen] = []

    def observe(self, layer: str, routing: Routing, dispatch: Dispatch) -> None:
        """Note a forward of ``layer``; one without any routed row needs nothing and is left out."""
        needed = tuple(expert for expert, count in enumerate(dispatch.counts) if count)
        if not needed:
            return
        counts = tuple(dispatch.counts[expert] for expert in needed)
        with self._lock:
            if len(self._seen) < self._limit:
                visit = TraceVisit(layer, needed, routing.expert_index.shape[0], counts)
                self._seen.append(_Seen(visit, self._kept(routing.expert_index)))

    def trace(self) -> Trace:
        """What was seen so far."""
        with self._lock:
            seen = tuple(self._seen)
        sizes = {layer.name: layer.num_experts for layer in self._layers}
        return Trace(self._layers, tuple(_with_choices(*one, sizes[one.visit.layer]) for one in seen))

    def _kept(self, expert_index: Tensor) -> Tensor | None:
        if expert_index.numel() > self._choices_left:
            self._choices_left = 0  # a trace has choices up to some visit, and none after it
            return None
        self._choices_left -= expert_index.numel()
        return expert_index.to(torch.int16)

    def __deepcopy__(self, memo: dict[int, object]) -> TraceRecorder:
        return TraceRecorder(self._layers, self._limit, choices_limit=self._choices_limit)

    def __reduce__(self) -> tuple[Callable[..., TraceRecorder], tuple[tuple[TraceLayer, ...]]]:
        # A lock cannot travel; a copied model starts a trace of its own.
        return partial(TraceRecorder, limit=self._limit, choices_limit=self._choices_limit), (self._layers,)


def _with_choices(visit: TraceVisit, index: Tensor | None, num_experts: int) -> TraceVisit:
    """``visit`` with the choices of ``index`` (T, K), less those not computed and tokens left without any."""
    if index is None:
        return visit
    chosen = (tuple(expert for expert in row if expert < num_experts) for row in index.tolist())
    return replace(visit, choices=tuple(filter(None, chosen)))


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write ``trace``, to a temporary name first, so that a reader never sees half of it."""
    target = Path(path)
    place = {layer.name: index for index, layer in enumerate(trace.layers)}
    content = {
        "format": _FORMAT,
        "fingerprint": trace.fingerprint,
        "layers": [asdict(layer) for layer in trace.layers],
        "visits": [_plain(visit, place[visit.layer]) for visit in trace.visits],
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
        if content["format"] not in _READABLE:
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


def _plain(visit: TraceVisit, place: int) -> list[Any]:
    plain = [place, visit.tokens, list(visit.experts), list(visit.counts)]
    return [*plain, [list(token) for token in visit.choices]] if visit.choices else plain


def _visit(
    layers: Sequence[TraceLayer],
    place: int,
    tokens: int,
    experts: Sequence[int],
    counts: Sequence[int] = (),
    choices: Sequence[Sequence[int]] = (),
) -> TraceVisit:
    layer = layers[place]
    chosen = tuple(map(tuple, choices))
    if any(not 0 <= expert < layer.num_experts for one in (experts, *chosen) for expert in one):
        raise ValueError(f"{layer.name} has {layer.num_experts} experts, but a visit names others")
    if list(experts) != sorted(set(experts)):
        raise ValueError(f"{layer.name}: the experts of a visit do not ascend")
    if counts and (len(counts) != len(experts) or min(counts) < 1):
        raise ValueError(f"{layer.name}: a visit needs {len(experts)} experts, but its counts are {list(counts)}")
    return TraceVisit(layer.name, tuple(experts), int(tokens), tuple(counts), chosen)
