"""The placement benchmark: a tiny run from the command line, and the rules by which it tells losses."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit, write_trace
from fairseq_moe_opt.placement import Cluster, LoadHistory, evaluate, place, synthetic_history
from tests.helpers.benchmark_modules import benchmark_modules, run_benchmark


@pytest.fixture(scope="module")
def results() -> Iterator[ModuleType]:
    """The benchmark's own module, a script beside others rather than a package."""
    with benchmark_modules("_placement_results") as (found,):
        yield found


def run(*arguments: str) -> Result:
    return run_benchmark("placement", "--quick", *arguments)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a tiny run with a trace file writes."""
    folder = tmp_path_factory.mktemp("placement")
    np.savez(folder / "mine.npz", **dict(synthetic_history("lm", 12, 16, 2, 9).layers))
    done = run(str(folder / "mine.npz"), "--json", str(folder / "out" / "quick.json"))
    assert done.exit_code == 0, done.output
    assert "decoder-16" in done.stdout
    assert "mine.npz" in done.stdout
    return dict(json.loads((folder / "out" / "quick.json").read_text()))


def test_every_case_and_strategy_is_there(content: dict[str, Any]) -> None:
    found = {(row["trace"], row["ranks"], row["spare_slots"] > 0, row["strategy"]) for row in content["rows"]}
    every = ("contiguous", "greedy", "anti-correlation", "eplb", "balanced", "minimax", "lower bound")
    replicating = ("eplb", "balanced", "minimax", "lower bound")
    assert found == {
        (trace, ranks, spare, strategy)
        for trace in ("decoder-16", "encoder-16", "lm-16", "mine.npz")
        for ranks in (2, 4)
        for spare, strategies in ((False, every), (True, replicating))
        for strategy in strategies
    }
    assert content["summary"]["cases"] == 16
    assert content["summary"]["lost_objective_layers"] == 0


def test_no_row_is_under_the_bound(content: dict[str, Any]) -> None:
    rows = content["rows"]
    bounds = {(r["trace"], r["ranks"], r["spare_slots"]): r for r in rows if r["strategy"] == "lower bound"}
    for row in rows:
        bound = bounds[row["trace"], row["ranks"], row["spare_slots"]]
        assert row["max_load"] >= bound["max_load"] - 1e-6
        assert row["avg_max_load"] >= bound["avg_max_load"] - 1e-6


def test_a_row_is_the_papers_protocol(results: ModuleType) -> None:
    history = synthetic_history("encoder", 16, 20, 2, 3)
    (row,) = (r for r in results.measure(results.Trace("t", history), 4, 2, ["eplb"]) if r.strategy == "eplb")
    first, second = history.halves()
    placement = place(first, Cluster.even(4, 16, spare_slots=2), "eplb")
    assert row.avg_max_load == pytest.approx(
        np.mean([one.avg_max_load for one in evaluate(placement, second).values()])
    )
    assert row.max_load == pytest.approx(np.mean([one.max_load for one in evaluate(placement, second).values()]))
    assert row.first_objective == pytest.approx(np.mean([one.objective for one in evaluate(placement, first).values()]))


def test_losses_are_told_layer_by_layer(results: ModuleType) -> None:
    def row(strategy: str, first_objective: float, avg_max_load: dict[str, float]) -> Any:
        by_layer = {
            name: {"first_objective": first_objective, "avg_max_load": value} for name, value in avg_max_load.items()
        }
        mean = sum(avg_max_load.values()) / len(avg_max_load)
        return results.Row("t", 8, 2, 0, strategy, first_objective, 0.0, 0.0, mean, by_layer, 0.0)

    rows = [row("eplb", 0.2, {"a": 0.5, "b": 0.5}), row("balanced", 0.2, {"a": 0.6, "b": 0.3})]
    (lost,) = results.losses(rows)
    assert (lost.layer, lost.metric, lost.ours, lost.theirs) == ("a", "avg_max_load", 0.6, 0.5)
    totals = results.summary(rows, [results.Trace("t", LoadHistory({"a": np.ones((2, 8), dtype=int)}), True)])
    assert (totals["lost_avg_max_load_layers"], totals["lost_avg_max_load_cases"]) == (1, 0)
    assert totals["mean_ratio"] == totals["mean_ratio_correlated"] == pytest.approx(0.45 / 0.5)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.npz").write_text("no")
    done = run(str(tmp_path / "no.npz"))
    assert done.exit_code == 2
    assert "no.npz" in done.output


def test_a_trace_file_gives_one_trace_a_phase_and_no_more_ranks_than_experts(tmp_path: Path) -> None:
    layers = (TraceLayer("e", "encoder", 3), TraceLayer("d", "decoder", 3))
    visits = [TraceVisit(name, (0, 1, 2), 9, (step, 2, 3)) for step in range(1, 5) for name in ("e", "d")]
    write_trace(Trace(layers, tuple(visits)), tmp_path / "t.json")
    done = run(str(tmp_path / "t.json"), "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {(row["trace"], row["ranks"]) for row in rows if row["experts"] == 3} == {
        ("t.json-encoder", 2),
        ("t.json-decoder", 2),
    }


def test_the_demo_is_recorded_language_by_language(results: ModuleType) -> None:
    traces = importlib.import_module("_recorded").demo_traces(8)
    assert [trace.name for trace in traces] == [
        "demo-encoder",
        *(f"demo-{one}-decoder" for one in ("fra", "deu", "spa")),
    ]
    for trace in traces:
        assert trace.history.num_experts == 16
        steps = {len(counts) for counts in trace.history.layers.values()}
        assert steps == {1} if "encoder" in trace.name else min(steps) > 5
        # Two experts a token: no row is lost.
        assert all(int(counts.sum(axis=1).min()) % 2 == 0 for counts in trace.history.layers.values())
