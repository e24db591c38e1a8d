"""The fairseq benchmark: a tiny run from the command line, and the rules that turn runs into rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.benchmark_modules import benchmark_modules, run_benchmark


@dataclass(frozen=True)
class Modules:
    results: ModuleType
    turns: ModuleType
    work: ModuleType
    sides: ModuleType


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with benchmark_modules("_fairseq_results", "_turns", "_fairseq_work", "_sides") as found:
        yield Modules(*found)


@dataclass(frozen=True)
class QuickRun:
    output: str
    content: dict[str, Any]

    def rows(self, model: str) -> list[dict[str, Any]]:
        return [row for row in self.content["rows"] if row["model"] == model]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    pytest.importorskip("fairseq", reason="fairseq is not installed")
    target = tmp_path_factory.mktemp("benchmark") / "results" / "quick.json"
    sizes = ["--rounds", "2", "--source-tokens", "10", "--new-tokens", "5", "--lm-tokens", "48", "--threads", "1"]
    done = run_benchmark("fairseq_generate", "--quick", *sizes, "--json", str(target))
    assert done.exit_code == 0, done.output
    return QuickRun(done.output, json.loads(target.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_translation_rows_cover_every_workload_with_equal_outputs(quick_run: QuickRun) -> None:
    rows = quick_run.rows("translation")
    assert [(row["experts"], row["beam"]) for row in rows] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    for row in rows:
        assert row["outputs"] == "equal"
        assert row["differences"]["tokens"] == 1.0
        assert 0 <= row["differences"]["states"] < 1e-5
        assert row["static_dropped"] == row["dynamic_dropped"] == 0
        assert [len(row["seconds"][side]["encoder"]) for side in ("static", "dynamic")] == [2, 2]
        assert set(row["times_faster"]) == {"encoder", "all"}
        assert row["seconds"]["static"]["all"][0] > row["seconds"]["static"]["encoder"][0]
        assert (row["rounds"], row["note"], row["at_least"]) == (2, None, False)
        # Random weights that sent everything to two experts would measure something else.
        assert row["active_experts"]["encoder"] > row["experts"] / 2


@pytest.mark.slow
def test_language_model_rows_drop_alike_or_not_at_all(quick_run: QuickRun) -> None:
    limited, free = quick_run.rows("language model")
    assert (limited["capacity"], limited["outputs"]) == ("checkpoint", "equal")
    assert limited["static_dropped"] == limited["dynamic_dropped"] > 0
    assert (free["capacity"], free["outputs"], free["dynamic_dropped"]) == ("none", "", 0)
    assert free["static_dropped"] == limited["static_dropped"]
    assert set(free["times_faster"]) == {"all"}
    assert f"{free['static_dropped']:.1%} dropped" in quick_run.output


@pytest.mark.slow
def test_json_says_where_and_how(quick_run: QuickRun) -> None:
    assert set(quick_run.content) == {"date", "machine", "versions", "arguments", "rows"}
    assert quick_run.content["machine"]["cores"] >= 1
    assert set(quick_run.content["versions"]) == {"python", "torch", "fairseq-fixed"}
    assert quick_run.content["arguments"]["limits"] == {"rounds": 2, "budget": 60, "longest": 120}
    assert [suite["capacity_fraction"] for suite in quick_run.content["arguments"]["suites"]] == [1.0, 0.05]


def _outputs(modules: Modules, seconds: float, **changes: Any) -> Any:
    values = {"tokens": [[5, 2]], "scores": torch.tensor([-1.0, -2.0]), "states": torch.ones(1, 1, 2)}
    return modules.work.Outputs(**{**values, "seconds": {"encoder": seconds / 2, "all": seconds}, **changes})


def _run(modules: Modules, calls: list[str], name: str, seconds: float) -> Callable[[], Any]:
    def run() -> Any:
        calls.append(name)
        return _outputs(modules, seconds)

    return run


def _take_turns(modules: Modules, runs: dict[str, Any], **limits: float) -> dict[str, Any]:
    chosen = modules.turns.Limits(**{"rounds": 3, "budget": 1000.0, "longest": 1000.0, **limits})
    found: dict[str, Any] = modules.turns.take_turns(runs, chosen, lambda text: None)
    return found


def test_each_round_begins_with_another_side(modules: Modules) -> None:
    calls: list[str] = []
    found = _take_turns(modules, {name: _run(modules, calls, name, 1.0) for name in ("a", "b")})
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert found["a"].rounds == 3
    assert found["a"].seconds == {"encoder": [0.5] * 3, "all": [1.0] * 3}


def test_no_round_begins_that_would_not_fit(modules: Modules) -> None:
    # A round takes 10 s, as the first runs do: 10 + 10 + 10 fit into 35, the first runs alone into 19.
    for budget, rounds in ((35.0, 2), (30.0, 2), (19.0, 0)):
        runs = {"a": _run(modules, [], "a", 2.0), "b": _run(modules, [], "b", 8.0)}
        found = _take_turns(modules, runs, budget=budget)
        assert found["b"].rounds == rounds
        assert found["b"].seconds["all"] == [8.0] * max(rounds, 1)


def test_a_run_that_takes_too_long_is_given_up(modules: Modules) -> None:
    def endless() -> None:
        while True:
            time.sleep(0.01)

    found = _take_turns(modules, {"dynamic": _run(modules, [], "dynamic", 0.02), "static": endless}, longest=0.1)
    assert (found["static"].outputs, found["static"].stopped_after) == (None, 0.1)
    assert found["dynamic"].rounds == 3
    work = modules.work.Work(batch=4, tokens=10, beam=1, new_tokens=3)
    row = modules.results.row_of("translation", 8, work, "checkpoint", found["static"], found["dynamic"])
    assert row.times_faster == {"all": pytest.approx(5.0)}
    assert (row.at_least, row.outputs, row.note) == (True, "", "not done after 0 s")
    assert row.sentences_per_second == {"static": {}, "dynamic": {"encoder": 400.0, "all": 200.0}}


@pytest.mark.parametrize("error", ["needs 70.0 GiB, 20.0 GiB are free", "not enough memory: you tried to allocate"])
def test_a_side_without_room_is_a_row_with_its_reason(modules: Modules, error: str) -> None:
    def no_room() -> None:
        raise modules.work.CannotRunError(error) if "GiB" in error else RuntimeError(f"{error}\nmore")

    found = _take_turns(modules, {"dynamic": _run(modules, [], "dynamic", 1.0), "static": no_room})
    work = modules.work.Work(batch=4, tokens=10)
    row = modules.results.row_of("language model", 8, work, "checkpoint", found["static"], found["dynamic"])
    assert (row.note, row.times_faster, row.at_least, row.static_dropped) == (error, {}, False, None)
    assert modules.results.table_of([row]).row_count == 1


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "equal"),
        ({"tokens": [[6, 2]]}, "WRONG"),
        ({"tokens": [[5, 2, 2]]}, "WRONG"),
        ({"scores": torch.tensor([-1.0, -2.0001])}, "equal"),
        ({"scores": torch.tensor([-1.0, -2.001])}, "WRONG"),
        ({"scores": torch.tensor([-1.0])}, "WRONG"),
        ({"states": torch.full((1, 1, 2), 1.001)}, "WRONG"),
        ({"states": torch.full((1, 1, 2), float("nan"))}, "WRONG"),
    ],
)
def test_tokens_scores_and_states_are_all_compared(modules: Modules, changes: dict[str, Any], verdict: str) -> None:
    right = _outputs(modules, 1.0)
    differences = modules.results.compare(_outputs(modules, 1.0, **changes), right)
    assert modules.results.verdict(differences) == verdict


def test_static_gating_needs_memory_for_its_masks(modules: Modules) -> None:
    shape = replace(modules.sides.QUICK, experts=8, d_model=32)
    # (T, E, C) = 100 * 8 * 100 floats, three of them; at C = 5 the buffers (E, C, D) are larger.
    assert modules.work.static_bytes(shape, rows=100, capacity=100) == 4 * 3 * 80_000
    assert modules.work.static_bytes(shape, rows=10, capacity=5) == 4 * (2 * 400 + 3 * 1280)


def test_a_layer_gets_a_batchs_source_or_its_beams(modules: Modules) -> None:
    assert modules.work.Work(batch=48, tokens=24, beam=4, new_tokens=8).rows == 1152
    assert modules.work.Work(batch=8, tokens=2, beam=4, new_tokens=8).rows == 32
