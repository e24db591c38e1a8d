"""Tables of sentences and their translations, a pair a row, tab-separated and without any quoting."""

from __future__ import annotations

import csv
import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

_OPENERS: Mapping[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]


def read_rows(path: Path) -> Iterator[list[str]]:
    """The columns of every row of a table, which may be compressed (``.gz``, ``.xz``)."""
    with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="") as stream:
        yield from csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)


def by_language(rows: Iterable[list[str]]) -> dict[str, list[list[str]]]:
    """Rows that begin with a language to the rest of each, in order; languages in the order they come in."""
    found: dict[str, list[list[str]]] = {}
    for language, *rest in rows:
        found.setdefault(language, []).append(rest)
    return found
