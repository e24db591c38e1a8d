"""A placement as a JSON file, which says what it was made for and is checked against it when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fairseq_moe_opt.errors import PlacementError
from fairseq_moe_opt.placement.types import Placement, RankSlots

FORMAT, VERSION = "moe-placement", 1
_TYPES: Mapping[str, type] = {
    "num_experts": int,
    "num_ranks": int,
    "strategy": str,
    "fingerprint": str,
    "layers": dict,
}


def write_placement(placement: Placement, path: str | PathLike[str]) -> None:
    """Write ``placement``; a line a layer, so that two files can be compared by eye."""
    layers = ",\n".join(f"  {json.dumps(name)}: {json.dumps(slots)}" for name, slots in placement.layers.items())
    head = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": placement.fingerprint,
        "num_experts": placement.num_experts,
        "num_ranks": placement.num_ranks,
        "strategy": placement.strategy,
    }
    lines = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    Path(path).write_text(f'{{\n{lines} "layers": {{\n{layers}\n }}\n}}\n', encoding="utf-8")


def read_placement(
    path: str | PathLike[str],
    *,
    fingerprint: str | None = None,
    num_experts: int | None = None,
    num_ranks: int | None = None,
) -> Placement:
    """Read a placement and check it against what is given.

    Args:
        path: a file of ``write_placement``.
        fingerprint: of the model at hand; a file without one fits every model.
        num_experts: E of the model at hand.
        num_ranks: W of the job at hand.

    Raises:
        PlacementError: no such file, no placement, another version, or made for something else; names the file.
    """
    try:
        placement = _parsed(json.loads(Path(path).read_text(encoding="utf-8")))
        check_made_for(placement, fingerprint, num_experts, num_ranks)
    except PlacementError as error:
        raise PlacementError(f"{fspath(path)}: {error}") from None
    except OSError as error:
        raise PlacementError(f"{fspath(path)}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise PlacementError(f"{fspath(path)}: not a placement: no JSON text") from None
    return placement


def _parsed(content: Any) -> Placement:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlacementError(f'not a placement: "format" is not "{FORMAT}"')
    if content.get("version") != VERSION:
        raise PlacementError(f"its version is {content.get('version')!r}; this release reads {VERSION}")
    for field, kind in _TYPES.items():
        if type(content.get(field)) is not kind:
            raise PlacementError(f"{field!r} must be {kind.__name__}; got {content.get(field)!r}")
    return Placement(
        layers={name: _slots(name, slots) for name, slots in content["layers"].items()},
        num_experts=content["num_experts"],
        num_ranks=content["num_ranks"],
        strategy=content["strategy"],
        fingerprint=content["fingerprint"],
    )


def _slots(name: str, slots: Any) -> RankSlots:
    valid = isinstance(slots, list) and all(
        isinstance(rank, list) and all(type(expert) is int for expert in rank) for rank in slots
    )
    if not valid:
        raise PlacementError(f"layer {name!r}: must be a list of experts for every rank")
    return tuple(map(tuple, slots))


def check_made_for(
    placement: Placement, fingerprint: str | None, num_experts: int | None, num_ranks: int | None
) -> None:
    """Raise PlacementError unless ``placement`` is for such a model and job; None and no fingerprint fit all."""
    if num_experts is not None and placement.num_experts != num_experts:
        raise PlacementError(f"made for {placement.num_experts} experts; the model has {num_experts}")
    if num_ranks is not None and placement.num_ranks != num_ranks:
        raise PlacementError(f"made for {placement.num_ranks} ranks; this job has {num_ranks}")
    if fingerprint is not None and placement.fingerprint not in ("", fingerprint):
        raise PlacementError(f"made for the model {placement.fingerprint}; this one is {fingerprint}")
