"""What ranks must have in common is compared before the first token, instead of found out from wrong output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, cast

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.parallel.collectives import Collectives

T = TypeVar("T")

_SHOWN = 60
"""Characters of a value that a message shows."""


def agree(
    ranks: Collectives,
    facts: Mapping[str, str],
    *,
    problem: str = "were not started alike",
    advice: str = "Start all of them with the same",
) -> None:
    """Compare ``facts`` (what it is, such as ``checkpoint``, to its fingerprint) between ranks.

    The message begins with ``problem`` and ends with ``advice``.

    Raises ParallelError with the same message on every rank, naming the ranks that differ and in what.
    """
    by_rank = cast("list[Mapping[str, str]]", ranks.gather_objects(dict(facts)))
    found = list(disagreements(by_rank))
    if found:
        raise ParallelError(f"ranks {problem}: {'; '.join(found)}. {advice}")


def disagreements(by_rank: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What differs, a clause for each fact; the value that most ranks have is taken as meant, rank 0's among equals."""
    names = dict.fromkeys(name for facts in by_rank for name in facts)
    for name in names:
        values = [facts.get(name, "none") for facts in by_rank]
        meant = Counter(values).most_common(1)[0][0]  # the first one seen among equals
        others = [f"rank {rank} has {_short(value)}" for rank, value in enumerate(values) if value != meant]
        if others:
            yield f"{name}: {', '.join(others)}, rank {values.index(meant)} has {_short(meant)}"


def follow_first(ranks: Collectives, value: T) -> T:
    """Rank 0's ``value``, on every rank: for choices that may fall differently, such as the kernel."""
    return cast("T", ranks.gather_objects(value)[0])


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else f"{value[: _SHOWN - 3]}..."
