"""docs/buffering.md speaks of options, values and report fields that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from fairseq_moe_opt.moe.cache_report import BufferReport, CacheReport
from fairseq_moe_opt.options import field_choices, option_names

PAGE = (Path(__file__).parents[1] / "docs" / "buffering.md").read_text(encoding="utf-8")


def test_flags_on_the_page_are_options() -> None:
    shown = {name.replace("-", "_") for name in re.findall(r"--moe-([a-z0-9-]+)", PAGE)}
    assert len(shown) > 3
    assert shown <= set(option_names())


def test_the_table_has_the_options_and_all_their_values() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.*?`) \|", PAGE, flags=re.MULTILINE))
    assert len(rows) == 9
    assert set(rows) <= set(option_names())
    for name, choices in field_choices().items():
        if name in rows:
            assert set(re.findall(r"`([^`]+)`", rows[name])) == set(choices)


def test_the_report_s_fields_are_there() -> None:
    known = {field.name for one in (BufferReport, CacheReport) for field in fields(one)}
    for name in ("workspace_bytes", "host_compute_rows", "on_host", "on_host_rows"):
        assert f"`{name}`" in PAGE and name in known
