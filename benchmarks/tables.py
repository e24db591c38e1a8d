"""Draws the tables of README.md and docs/ from the result files again.

    python benchmarks/tables.py            # rewrites the pages
    python benchmarks/tables.py --check    # only says which pages differ (exit code 1)

A table's place on a page is marked in Markdown comments, with the file and the function's keywords:

    <!-- table: generate from benchmarks/results/generate.json dtype=float32 batch=32 -->
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from _tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
_REGION = re.compile(
    r"^<!-- table: (?P<name>\w+) from (?P<file>\S+)(?P<keywords>(?: \w+=\S+)*) -->\n.*?^<!-- end of table -->$",
    flags=re.MULTILINE | re.DOTALL,
)


def redrawn(text: str, root: Path = ROOT) -> str:
    """``text`` with every marked table drawn from its file as that is now."""
    return _REGION.sub(lambda match: _region(match, root), text)


def _region(match: re.Match[str], root: Path) -> str:
    content = json.loads((root / match["file"]).read_text(encoding="utf-8"))
    keywords = dict(word.split("=", 1) for word in match["keywords"].split())
    table = TABLES[match["name"]](content, **keywords)
    opening = match[0].partition("\n")[0]
    return f"{opening}\n\n{table}\n\n<!-- end of table -->"


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/language_model/README.md"]


def main(check: Annotated[bool, typer.Option(help="change nothing, fail where a page differs")] = False) -> None:
    """Draw the tables of README.md and docs/ from the result files."""
    stale = [page for page in pages() if redrawn(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        typer.echo(f"{page.relative_to(ROOT)} {'differs from' if check else 'redrawn from'} the result files")
        if not check:
            page.write_text(redrawn(page.read_text(encoding="utf-8")), encoding="utf-8")
    if check and stale:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
