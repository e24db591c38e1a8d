"""The sections by name, in the order in which they are measured: what takes no time comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.results import Section
from fairseq_moe_opt.reproduction.sections import (
    activation,
    balance,
    latency,
    memory,
    miss_rates,
    static_memory,
    throughput,
    waste,
)


@dataclass(frozen=True)
class Part:
    """What a section's file gives: its measurement, and its pictures from what that found."""

    measure: Callable[[Context], Section]
    draw: Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]]


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        one.NAME: Part(one.measure, one.draw)
        for one in (static_memory, activation, balance, miss_rates, latency, memory, waste, throughput)
    }
)


def section_names() -> tuple[str, ...]:
    """Every section, in order."""
    return tuple(PARTS)


def get_part(name: str) -> Part:
    """The section called ``name``; OptionError lists the names there are."""
    if name not in PARTS:
        raise OptionError("only", f"{name!r} is not one of {', '.join(PARTS)}")
    return PARTS[name]
