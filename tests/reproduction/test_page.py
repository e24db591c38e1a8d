"""Lines, and the Markdown page they end up on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fairseq_moe_opt.reproduction.config import read_plan
from fairseq_moe_opt.reproduction.page import Picture, Told, page_of
from fairseq_moe_opt.reproduction.results import ABOUT, AT_LEAST, AT_MOST, Line, PaperValue, Section

PLAN_FILE = Path(__file__).with_name("plan.yaml")
MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "processor": "a processor",
    "cores": "1 of 2",
    "system": "Linux x86_64",
    "python": "3.11.0",
    "torch": "2.13.0",
    "fairseq_moe_opt": "0.1",
}


def line(number: float | None, goal: str = AT_LEAST, paper: float | None = 10.0, **more: object) -> Line:
    value = PaperValue(f"{paper}x", "V", paper, goal)
    return Line("throughput", "E 512", value, f"{number}x", number, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("goal", "number", "reached"),
    [
        (AT_LEAST, 10.0, True),
        (AT_LEAST, 9.99, False),
        (AT_MOST, 10.0, True),
        (AT_MOST, 10.01, False),
        (ABOUT, 10.15, True),
        (ABOUT, 9.85, True),
        (ABOUT, 10.3, False),
        ("", 3.0, None),
    ],
)
def test_a_number_reaches_its_goal(goal: str, number: float, reached: bool | None) -> None:
    assert line(number, goal).is_reached is reached
    assert line(number, goal).ratio == pytest.approx(number / 10)


def test_a_statement_holds_or_not() -> None:
    for holds in (True, False, None):
        one = line(None, "", None, holds=holds)
        assert (one.is_reached, one.ratio) == (holds, None)


def section(*lines: Line) -> Section:
    return Section("latency", "Latency", "Random weights.", lines, ("a note",), {"curve": [1, 2]})


def test_sections_come_back_from_json() -> None:
    one = section(line(12.0), line(None, "", None, holds=False, why="a | b"))
    assert Section.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_the_page_says_what_is_reached_and_why_the_rest_is_not() -> None:
    missed = line(5.0, why="60% of it is elsewhere")
    described = line(30.0, "", why="no exchange here")
    near = line(11.0, "", why="never shown")
    told = Told(
        section(line(12.0), missed, described, near), MACHINE, 1.5, (Picture("pictures/latency.png", "A title"),)
    )
    page = page_of(read_plan("full", PLAN_FILE), [told])
    assert "Of 2 figures and statements of the paper that can be reached, 1 are." in page
    assert page.count("* throughput: 5.0x, paper 10.0x: 60% of it is elsewhere.") == 2  # at the top, and in its section
    assert "no exchange here" in page and "never shown" not in page
    assert "| throughput | 10.0x (V) | 12.0x | 1.20 | yes | E 512 |" in page
    assert "| throughput | 10.0x (V) | 5.0x | 0.50 | **no** | E 512 |" in page
    assert "| throughput | 10.0x (V) | 30.0x | 3.00 |  | E 512 |" in page
    assert "![A title](pictures/latency.png)" in page and "* a note" in page
    assert "a processor, 1 of 2 cores" in page and "* LM: D 64 to 32" in page
    assert "[results.json](results.json)" in page
    assert "quick run" not in page and "quick run" in page_of(read_plan("quick", PLAN_FILE), [told])


def test_a_bar_does_not_break_a_table() -> None:
    page = page_of(read_plan("full", PLAN_FILE), [Told(section(line(None, "", None, holds=True)), MACHINE, 0.0)])
    assert "| throughput | Nonex (V) | Nonex |" in page
    broken = Line("a|b", "", PaperValue("x", "V"), "y")
    assert "| a\\|b | x (V) | y |" in page_of(read_plan("full", PLAN_FILE), [Told(section(broken), MACHINE, 0.0)])
