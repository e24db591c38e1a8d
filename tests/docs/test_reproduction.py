"""docs/reproduction.md is drawn from the results beside it: every number on it is one of theirs."""

from __future__ import annotations

import json

from fairseq_moe_opt.reproduction import read_plan
from fairseq_moe_opt.reproduction.runner import RESULTS, Output, page_text
from tests.helpers.pages import ROOT

PAGE = ROOT / "docs" / "reproduction.md"
OUTPUT = Output(ROOT / "docs" / "reproduction", PAGE)


def test_the_page_says_what_the_results_say() -> None:
    results = json.loads((OUTPUT.folder / RESULTS).read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page_text(read_plan(results["scale"]), OUTPUT, results["sections"])


def test_other_results_are_another_page() -> None:
    results = json.loads((OUTPUT.folder / RESULTS).read_text(encoding="utf-8"))
    results["sections"]["static_memory"]["minutes"] += 1.0
    assert PAGE.read_text(encoding="utf-8") != page_text(read_plan(results["scale"]), OUTPUT, results["sections"])


def test_its_pictures_are_there() -> None:
    results = json.loads((OUTPUT.folder / RESULTS).read_text(encoding="utf-8"))
    files = [picture["file"] for section in results["sections"].values() for picture in section["pictures"]]
    assert len(files) > 5
    assert all((OUTPUT.folder / file).is_file() for file in files)
