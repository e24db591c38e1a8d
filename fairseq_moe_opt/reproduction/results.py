"""What a section found, in values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

AT_LEAST, AT_MOST, ABOUT = "at least", "at most", "about"
TOLERANCE = 0.02
"""How far from the paper a figure may be that is arithmetic, in shares of it."""


@dataclass(frozen=True)
class PaperValue:
    """Something that the paper says.

    Attributes:
        text: as a reader wants to see it.
        where: the section of ``docs`` or of the paper it stands in.
        number: for a ratio; None for a statement.
        goal: what reaches it: ``at least`` as much, ``at most``, ``about`` the same; empty where the paper describes
            its own machine or data and there is nothing to reach.
    """

    text: str
    where: str
    number: float | None = None
    goal: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a table: paper, here, ratio, setting.

    Attributes:
        what: is compared.
        setting: under which it was measured here.
        paper: what the paper says.
        here: as a reader wants to see it.
        number: the same for a ratio; None for a statement.
        holds: whether a statement holds here; None for a number, or where there is nothing to reach.
        why: the measured cause of a figure that is not reached, or that differs.
    """

    what: str
    setting: str
    paper: PaperValue
    here: str
    number: float | None = None
    holds: bool | None = None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Here over paper."""
        return None if not self.paper.number or self.number is None else self.number / self.paper.number

    @property
    def is_reached(self) -> bool | None:
        """Whether the paper's figure is; None where there is nothing to reach."""
        paper, here = self.paper.number, self.number
        if not self.paper.goal or paper is None or here is None:
            return self.holds
        if self.paper.goal == ABOUT:
            return abs(here - paper) <= TOLERANCE * abs(paper)
        return here >= paper if self.paper.goal == AT_LEAST else here <= paper

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "ratio": self.ratio, "reached": self.is_reached}


@dataclass(frozen=True)
class Section:
    """A table of the page, and what its pictures are drawn from.

    Attributes:
        name: as ``--only`` knows it.
        title: of the page's part.
        intro: what was measured, on what: real weights, random ones or synthetic traces.
        lines: the table.
        notes: below the table.
        data: everything measured.
    """

    name: str
    title: str
    intro: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "lines": [line.to_dict() for line in self.lines]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Section:
        """What ``to_dict`` made, back."""
        lines = tuple(
            Line(**{**{key: one[key] for key in Line.__dataclass_fields__}, "paper": PaperValue(**one["paper"])})
            for one in content["lines"]
        )
        return cls(content["name"], content["title"], content["intro"], lines, tuple(content["notes"]), content["data"])


def times(number: float) -> str:
    """``12.3x``."""
    return f"{number:,.1f}x" if number >= 10 else f"{number:.2f}x"


def seconds_text(seconds: float) -> str:
    """``12.3 ms`` or ``1.23 s``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
