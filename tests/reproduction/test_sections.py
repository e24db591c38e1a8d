"""Every section at tiny sizes, from measurement to page; a killed run keeps what it has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairseq_moe_opt.errors import InputError, OptionError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit
from fairseq_moe_opt.placement import LoadHistory, history_of
from fairseq_moe_opt.reproduction import Context, Section, read_plan, reproduce, section_names
from fairseq_moe_opt.reproduction.config import PHASES
from fairseq_moe_opt.reproduction.runner import RESULTS, Output, page_in
from fairseq_moe_opt.reproduction.sections import PARTS
from fairseq_moe_opt.reproduction.sections.activation import activity_of
from fairseq_moe_opt.reproduction.sections.balance import loads_of
from fairseq_moe_opt.reproduction.sections.miss_rates import sweep

PLAN_FILE = Path(__file__).with_name("plan.yaml")


def recorded() -> Trace:
    """Two layers of 8 experts, in pairs."""
    layers = (TraceLayer("encoder.1.ffn", "encoder", 8), TraceLayer("decoder.1.ffn", "decoder", 8))
    visits = []
    for step in range(12):
        pair = 2 * (step % 4)
        visits.append(TraceVisit("encoder.1.ffn", tuple(range(8)), 16, (1, 2, 3, 4, 5, 6, 7, 4)))
        visits.append(TraceVisit("decoder.1.ffn", (pair, pair + 1), 4, (5, 3)))
    return Trace(layers, tuple(visits))


def context(scale: str = "full", trace: Trace | None = None) -> Context:
    return Context(read_plan(scale, PLAN_FILE), lambda: trace, lambda _: None)


def output(folder: Path, plots: bool = False) -> Output:
    return Output(folder, page_in(folder), plots)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Section]]:
    folder = tmp_path_factory.mktemp("reproduction")
    found = reproduce(context(trace=recorded()), Output(folder / "pictures", folder / "page.md"))
    return folder, {section.name: section for section in found}


def test_every_section_is_measured_written_and_drawn(whole: tuple[Path, dict[str, Section]]) -> None:
    folder, found = whole
    assert tuple(found) == section_names() == tuple(PARTS)
    content = json.loads((folder / "pictures" / RESULTS).read_text(encoding="utf-8"))
    assert tuple(content["sections"]) == section_names()
    assert content["plan"]["models"]["lm"]["experts"] == 64
    page = (folder / "page.md").read_text(encoding="utf-8")
    assert "[results.json](pictures/results.json)" in page
    for name, section in found.items():
        assert section.lines and f"## {section.title}" in page
        assert content["sections"][name]["machine"]["torch"]
        for file, _ in PARTS[name].draw(section.data):
            assert f"(pictures/{file})" in page
            assert (folder / "pictures" / file).read_bytes().startswith(b"\x89PNG")


def test_pictures_can_be_drawn_from_the_file(whole: tuple[Path, dict[str, Section]]) -> None:
    folder, _ = whole
    content = json.loads((folder / "pictures" / RESULTS).read_text(encoding="utf-8"))
    for name, one in content["sections"].items():
        for _, figure in PARTS[name].draw(one["data"]):
            assert all(axes.get_title() for axes in figure.axes if axes.lines or axes.patches)


def test_waste_is_that_of_the_plan(whole: tuple[Path, dict[str, Section]]) -> None:
    _, found = whole
    data = found["waste"].data
    assert {phase: data[phase]["dynamic"] for phase in PHASES} == dict.fromkeys(PHASES, 1.0)
    assert [data[phase]["static"] for phase in PHASES] == pytest.approx([2.0, 4.0, 4.0], rel=0.02)


def test_throughput_says_what_stopped_each_side(whole: tuple[Path, dict[str, Section]]) -> None:
    _, found = whole
    for one in found["throughput"].data.values():
        for side in ("static", "dynamic"):
            timed = [point for point in one["points"][side] if point["seconds"]]
            assert timed and all(point["peak_bytes"] <= one["budget"] for point in timed)
            over = [point for point in one["points"][side] if point["peak_bytes"] > one["budget"]]
            assert bool(over) == (one["stopped_by"][side] == "budget")
            assert not any(point["seconds"] for point in over)
        assert one["curve"][-1]["gain"] == one["gain"]


def test_only_measures_one_section_and_keeps_the_others(tmp_path: Path) -> None:
    reproduce(context(), output(tmp_path), ["static_memory"])
    first = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))["sections"]["static_memory"]
    found = reproduce(context(), output(tmp_path), ["balance"])
    assert [section.name for section in found] == ["static_memory", "balance"]
    content = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))["sections"]
    assert content["static_memory"] == first
    assert "demo" not in page_in(tmp_path).read_text(encoding="utf-8")


def test_a_killed_run_keeps_what_it_has(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def say(message: str) -> None:
        if message == "section balance":
            raise KilledError

    with pytest.raises(KilledError):
        reproduce(Context(read_plan("full", PLAN_FILE), lambda: None, say), output(tmp_path))
    content = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))
    assert list(content["sections"]) == ["static_memory", "activation"]
    assert "## Expert activation" in page_in(tmp_path).read_text(encoding="utf-8")


def test_unknown_sections_and_results_of_another_scale_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'speed' is not one of static_memory, activation"):
        reproduce(context(), output(tmp_path), ["speed"])
    reproduce(context("quick"), output(tmp_path), ["static_memory"])
    with pytest.raises(InputError, match="has results of scale 'quick'"):
        reproduce(context("full"), output(tmp_path), ["static_memory"])
    (tmp_path / RESULTS).write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="not results of moe-opt reproduce"):
        reproduce(context("full"), output(tmp_path), ["static_memory"])


def test_activity_by_hand() -> None:
    counts = np.array([[3, 1, 0, 0], [4, 0, 0, 0], [0, 2, 2, 0]])
    found = activity_of(LoadHistory({"one": counts}))
    assert found.idle == pytest.approx(100 * 7 / 12)
    assert found.largest == pytest.approx(100)
    assert found.hottest == pytest.approx(100 * (0.75 + 1 + 0) / 3)
    assert found.again == pytest.approx(100 / 3)  # of two and one active, the first is there again once
    assert found.active == pytest.approx(100 * 5 / 12)


def test_misses_fall_with_slots_and_nobody_beats_belady() -> None:
    found = sweep(history_of(recorded(), "decoder"), 2)
    assert found.active == 1.0  # two experts in each forward, two devices
    for policies in (*found.layers.values(), *found.devices.values()):
        for rates in policies.values():
            assert len(rates) == 4 and rates == sorted(rates, reverse=True)
            assert all(best <= rate for best, rate in zip(policies["belady"], rates, strict=True))
    before, after = found.correlation["contiguous"], found.correlation["anti-correlation"]
    assert after < 0 < before  # pairs are kept apart
    assert found.devices["anti-correlation"]["lifo"] < found.devices["contiguous"]["lifo"]


def test_loads_are_those_of_the_half_that_placed_nothing() -> None:
    counts = np.array([[4, 4, 0, 0, 0, 0, 0, 0]] * 4)
    found = loads_of(LoadHistory({"one": counts}), 4)
    assert (found["contiguous"].max_load, found["greedy"].max_load) == (1.0, 0.5)
    assert found["greedy"].avg_max_load == 0.5
