"""docs/profiling.md speaks of fields that exist, and quotes what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from fairseq_moe_opt.profiling.statistics import LayerComparison, LayerStatistics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")


def test_the_statistics_on_the_page_are_in_the_json() -> None:
    known = {field.name for one in (LayerStatistics, LayerComparison) for field in fields(one)}
    known |= {"waste_factor", "heat_map", "comparison"}
    rows = re.findall(r"^\| (`\w+`.*?) \|", PAGE.partition("| name in `profile.json`")[2], flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 12 and named <= known


def test_the_costs_on_the_page_are_those_measured() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "profiling.json").read_text(encoding="utf-8"))
    measured = [
        [f"{row[kind][side]:.3f}" for side in ("profiling on", "profiling off again") for kind in kinds]
        for row in content["rows"]
        for kinds in [("wall_ratio", "processor_ratio")]
    ]
    shown = re.findall(r"^\| [a-z, ]+ \| (\d\.\d{3}), (\d\.\d{3}) \| (\d\.\d{3}), (\d\.\d{3}) \|$", PAGE, re.MULTILINE)
    assert [list(one) for one in shown] == measured
    assert all(row["processor_ratio"]["profiling on"] < 1.05 for row in content["rows"])


def test_the_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"\]\((images/[\w.-]+\.png)\)", PAGE)
    assert len(pictures) == 3
    assert all((ROOT / "docs" / one).stat().st_size < 150_000 for one in pictures)
