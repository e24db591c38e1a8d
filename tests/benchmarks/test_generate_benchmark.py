"""The generation benchmark: a tiny run from the command line, and the rules that turn timings into rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from packaging.version import Version
from typer.testing import CliRunner

from tests.helpers.benchmark_modules import ROOT, benchmark_modules, run_benchmark

REFERENCE = ROOT / ".reference" / "transformers-4.57.1"
LAST_SEEN_WRONG = Version("5.23.0")
"""The newest Transformers 5 in which NLLB-MoE was seen to be computed wrongly."""


@dataclass(frozen=True)
class Modules:
    """The benchmark's own modules, which are scripts beside each other rather than a package."""

    generate: ModuleType
    results: ModuleType
    rounds: ModuleType
    sides: ModuleType


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with benchmark_modules("generate", "_results", "_rounds", "_sides") as found:
        yield Modules(*found)


@dataclass(frozen=True)
class QuickRun:
    output: str
    content: dict[str, Any]

    def row(self, side: str) -> dict[str, Any]:
        (found,) = (row for row in self.content["rows"] if row["side"] == side)
        return dict(found)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    target = tmp_path_factory.mktemp("benchmark") / "results" / "quick.json"
    sizes = ["--rounds", "2", "--new-tokens", "12", "--source-tokens", "10", "--threads", "1"]
    files = ["--reference", str(REFERENCE), "--json", str(target)]
    done = run_benchmark("generate", "--quick", "--dtype", "float32", *sizes, *files)
    assert done.exit_code == 0, done.output
    return QuickRun(done.output, json.loads(target.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_this_project_gives_equal_tokens_on_every_kernel(quick_run: QuickRun) -> None:
    for side in ("this project: loop", "this project: grouped_mm", "static gating"):
        row = quick_run.row(side)
        assert (row["error"], row["verdict"], row["token_agreement"]) == (None, "equal", 1.0), side


@pytest.mark.slow
def test_transformers_5_as_shipped_is_timed_and_marked_wrong(quick_run: QuickRun) -> None:
    if Version(transformers.__version__) > LAST_SEEN_WRONG:
        pytest.skip(f"seen wrong up to Transformers {LAST_SEEN_WRONG}, this is {transformers.__version__}")
    row = quick_run.row("Transformers 5 as shipped")
    assert row["verdict"] == "WRONG"
    assert row["token_agreement"] < 1
    assert row["tokens_per_second"]["decoder"] > 0
    assert "WRONG" in quick_run.output


@pytest.mark.slow
def test_rows_hold_every_column(quick_run: QuickRun) -> None:
    for row in quick_run.content["rows"]:
        assert set(row["tokens_per_second"]) == {"encoder", "decoder"}
        assert [len(row["seconds"][phase]) for phase in ("encoder", "decoder")] == [2, 2]
        assert row["peak_bytes"] > 50 * 2**20
        assert "5.x" in row["ratios"]
        assert f"{row['tokens_per_second']['decoder']:,.1f}" in quick_run.output
    stock = quick_run.row("Transformers 5 as shipped")
    assert stock["transformers"] == transformers.__version__
    assert stock["ratios"]["5.x"] == {"encoder": 1.0, "decoder": 1.0, "generate": 1.0}


@pytest.mark.slow
def test_json_says_where_and_how(quick_run: QuickRun) -> None:
    assert set(quick_run.content) == {"date", "machine", "versions", "arguments", "rows"}
    assert quick_run.content["machine"]["cores"] >= 1
    assert quick_run.content["versions"]["transformers"] == transformers.__version__
    assert quick_run.content["arguments"]["new_tokens"] == 12


@pytest.mark.slow
def test_the_reference_is_the_baseline_or_said_to_be_missing(quick_run: QuickRun) -> None:
    compared_with = {row["compared_with"] for row in quick_run.content["rows"]}
    if REFERENCE.is_dir():
        assert compared_with == {"Transformers 4.57.1, float32"}
        assert quick_run.row("Transformers 4.57.1")["transformers"] == "4.57.1"
    else:
        assert compared_with == {"this project: loop, float32"}
        assert "`make reference` makes it" in quick_run.output


def test_agreement_counts_equal_positions(modules: Modules) -> None:
    assert modules.results.agreement([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert modules.results.agreement([[1, 2]], [[1, 2, 3]]) == 0.0
    assert modules.results.agreement([], []) == 0.0


def test_one_other_token_is_wrong_in_float32_only(modules: Modules) -> None:
    assert modules.results.verdict("float32", 1.0) == "equal"
    assert modules.results.verdict("float32", 0.999) == "WRONG"
    assert modules.results.verdict("bfloat16", 0.5) == ""


def test_speedup_is_the_median_of_ratios_within_a_round(modules: Modules) -> None:
    # Rounds: 2x, 2x and, beside a burst of other work, 30x.
    assert modules.results.speedup([1.0, 3.0, 1.0], [2.0, 6.0, 30.0]) == 2.0


def test_both_phases_together_are_summed_round_by_round(modules: Modules) -> None:
    timing = modules.sides.Timing({"encoder": [1.0, 3.0], "decoder": [4.0, 5.0]})
    assert modules.results.seconds_of(timing, "generate") == [5.0, 8.0]
    assert modules.results.seconds_of(timing, "decoder") == [4.0, 5.0]


def _measured(modules: Modules, name: str, dtype: str, seconds: float, token: int) -> Any:
    timing = modules.sides.Timing({"encoder": [seconds], "decoder": [2 * seconds]}, [[token, 7]], 2**30)
    return modules.rounds.Measured(modules.sides.Side(name, dtype), {"transformers": "4.57.1"}, (timing,))


def test_ratios_between_dtypes_are_labelled(modules: Modules) -> None:
    reference = modules.sides.REFERENCE
    measured = [
        _measured(modules, reference, "float32", 4.0, 5),
        _measured(modules, reference, "bfloat16", 3.0, 5),
        _measured(modules, "this project: loop", "bfloat16", 2.0, 6),
    ]
    cases = [modules.sides.Case(batch=1, source_tokens=10, new_tokens=2)]
    rows = modules.results.rows_of(measured, cases, modules.results.baseline_of(measured, cases))
    assert rows[2].ratios == {
        "4.57.1 float32 (cross-dtype)": {"encoder": 2.0, "decoder": 2.0, "generate": 2.0},
        "4.57.1": {"encoder": 1.5, "decoder": 1.5, "generate": 1.5},
    }
    assert rows[2].tokens_per_second == {"encoder": 5.0, "decoder": 0.5}
    assert (rows[2].token_agreement, rows[2].verdict) == (0.5, "")


def test_a_side_that_cannot_run_is_a_row_with_its_reason(modules: Modules) -> None:
    failed = modules.rounds.Measured(
        modules.sides.Side(modules.sides.REFERENCE, "float32"), {}, (modules.sides.Timing(error="no memory"),)
    )
    good = _measured(modules, "this project: loop", "float32", 1.0, 5)
    cases = [modules.sides.Case(1, 10, 2)]
    baseline = modules.results.baseline_of([failed, good], cases)
    rows = modules.results.rows_of([failed, good], cases, baseline)
    assert [(row.error, row.verdict) for row in rows] == [("no memory", ""), (None, "equal")]
    assert rows[1].ratios == {}
    assert rows[1].compared_with == "this project: loop, float32"


def test_bfloat16_runs_beside_the_float32_reference(modules: Modules) -> None:
    sides = modules.sides.sides_of("bfloat16", ["loop"], Path("side-folder"))
    reference = modules.sides.REFERENCE
    assert [(side.name, side.dtype) for side in sides[:2]] == [(reference, "float32"), (reference, "bfloat16")]
    assert [side.name for side in sides[2:]] == [
        "this project: loop",
        "static gating",
        "Transformers 5 as shipped",
    ]
    assert all(side.python_path is None for side in sides[2:])


def test_an_unknown_dtype_is_refused(modules: Modules) -> None:
    result = CliRunner().invoke(modules.generate.app, ["--dtype", "float8"])
    assert result.exit_code == 2
    assert "float32, bfloat16" in result.output
