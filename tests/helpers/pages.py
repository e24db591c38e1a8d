"""The project's Markdown pages: their code blocks, their paragraphs, and the numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "language_model" / "README.md",
)

_FENCE = re.compile(r"^```(\w*)(?: (\w+))?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_TABLE = re.compile(r"^<!-- table: .*?^<!-- end of table -->$", flags=re.MULTILINE | re.DOTALL)
_SOURCE = re.compile(r"^<!-- numbers: (.+?) -->\n")
_UNITS: Mapping[str, float] = {
    "%": 0.01,
    "x": 1,
    "times": 1,
    "tokens a second": 1,
    "sentences a second": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "ms": 1e-3,
    "s": 1,
    "seconds": 1,
    "minutes": 60,
}
_ANY_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_MEASURE = re.compile(rf"(?<![\w.=^\"'])(?P<digits>\d[\d,]*(?:\.\d+)?)\s?(?P<unit>{_ANY_UNIT})(?![\w/])")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: the file it stands in.
        line: of its fence, from 1.
        language: as the fence says, or empty.
        mark: the word after the language (``gpu``, ``nodes``, ``long``), or empty.
        text: what is between the fences.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of ``page`` in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2] or "", match[3])
        for match in _FENCE.finditer(text)
    ]


@dataclass(frozen=True)
class Measure:
    """A number with a unit as a text has it: ``value`` in the basic unit, known to ``precision``."""

    text: str
    value: float
    precision: float

    def matches(self, found: float) -> bool:
        """Whether ``found`` rounds to what the text says."""
        return abs(found - self.value) <= self.precision * 0.5000001


@dataclass(frozen=True)
class Paragraph:
    """A paragraph or table outside code and drawn tables; ``sources`` are those that a comment above it names."""

    text: str
    sources: tuple[str, ...]

    @property
    def measures(self) -> list[Measure]:
        """Its numbers with units, but those in code spans."""
        plain = re.sub(r"`[^`]*`", "", self.text)
        return [_measure(match) for match in _MEASURE.finditer(plain)]


def paragraphs_of(text: str) -> Iterator[Paragraph]:
    """The paragraphs of a page's ``text``; a comment ``<!-- numbers: SOURCE, SOURCE -->`` belongs to the next one."""
    for part in re.split(r"\n\s*\n", _TABLE.sub("", _FENCE.sub("", text))):
        part = part.strip("\n") + "\n"
        match = _SOURCE.match(part)
        yield Paragraph(part[match.end() :] if match else part, tuple(re.split(r",\s*", match[1])) if match else ())


def _measure(match: re.Match[str]) -> Measure:
    digits, scale = match["digits"].replace(",", ""), _UNITS[match["unit"]]
    decimals = len(digits.partition(".")[2])
    return Measure(match[0], float(digits) * scale, 10**-decimals * scale)


def numbers_in(value: Any) -> Iterator[float]:
    """Every number in the JSON ``value``, however deep."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from numbers_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers_in(one)
