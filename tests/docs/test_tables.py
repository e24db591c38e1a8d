"""The tables of README.md and docs/ are what their result files say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.benchmark_modules import ROOT, benchmark_modules
from tests.helpers.pages import PAGES

MARK = re.compile(r"^<!-- table: (\w+) from (\S+)", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with benchmark_modules("tables") as (module,):
        yield module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_drawn_from_the_files_as_they_are(tables: ModuleType, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.redrawn(text) == text, "python benchmarks/tables.py draws them again"


def test_every_result_file_has_a_table() -> None:
    drawn = {file for page in PAGES for _, file in MARK.findall(page.read_text(encoding="utf-8"))}
    assert drawn == {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def test_another_number_in_the_file_is_another_table(tables: ModuleType, tmp_path: Path) -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "int8_quality.json").read_text(encoding="utf-8"))
    page = "before\n<!-- table: int8_quality from file.json -->\n<!-- end of table -->\nafter"
    (tmp_path / "file.json").write_text(json.dumps(content), encoding="utf-8")
    drawn = tables.redrawn(page, tmp_path)
    assert "| int8 | 9.3 MiB |" in drawn
    assert drawn.startswith("before\n") and drawn.endswith("\nafter")
    assert tables.redrawn(drawn, tmp_path) == drawn
    content["rows"][2]["expert_bytes"] = 2**20
    (tmp_path / "file.json").write_text(json.dumps(content), encoding="utf-8")
    assert "| int8 | 1.0 MiB |" in tables.redrawn(drawn, tmp_path)
