"""The benchmark of model families: tiny models from the command line, and what it refuses to time or to mix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.benchmark_modules import benchmark_modules

TINY = ["--quick", "--rounds", "2", "--prompt-tokens", "6", "--new-tokens", "3", "--batch", "2"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with benchmark_modules("families") as (found,):
        yield found


def call(script: ModuleType, *arguments: str) -> str:
    done = CliRunner().invoke(script.app, [*TINY, "--threads", str(torch.get_num_threads()), *arguments])
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return done.output


def test_two_families_one_after_the_other_in_one_file(script: ModuleType, tmp_path: Path) -> None:
    target = str(tmp_path / "families.json")
    call(script, "--families", "NllbMoe", "--dtypes", "float32", "--results", target)
    call(script, "--families", "Mixtral", "--dtypes", "float32", "--results", target, "--append")
    rows = json.loads(Path(target).read_text())["rows"]
    sides = [(row["family"], row["side"]) for row in rows]
    mixtral = ("eager", "batched_mm", "grouped_mm", "moe_opt", "optimize")
    assert sides == [*(("Mixtral", side) for side in mixtral), ("NllbMoe", "eager"), ("NllbMoe", "optimize")]
    for row in rows:
        assert set(row["seconds"]) == {"prefill", "decode"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["seconds"].values())
        if row["family"] == "Mixtral" or row["side"] == "optimize":
            assert row["tokens"] and row["difference"] <= 1e-5
    with pytest.raises(script.BenchmarkError, match="another arguments: measure all"):
        script.kept_rows(Path(target), script.Plan(script.QUICK, (1,), ("float32",), 6, 3, 2, 1), ["Mixtral"])


def test_ratios_are_medians_within_rounds_against_the_fastest_way(script: ModuleType) -> None:
    case = script.Case(torch.zeros(1, 6), torch.zeros(1, 3))
    seconds = {
        "eager": {"prefill": [4.0, 8.0, 6.0], "decode": [2.0, 2.0, 2.0]},
        "batched_mm": {"prefill": [], "decode": [9.0, 1.0, 9.0]},
        "moe_opt": {"prefill": [2.0, 2.0, 3.0], "decode": [1.0, 1.0, 4.0]},
    }
    found = dict.fromkeys(seconds, (0.0, True))
    rows = {row.side: row for row in script.rows_of("Mixtral", "float32", case, found, seconds, torch.nn.Linear(1, 1))}
    # Prefill 4/2, 8/2, 6/3; decode against the faster of two in each round: 2/1, 1/1, 2/4.
    assert rows["moe_opt"].times_fastest == {"prefill": 2.0, "decode": 1.0}
    assert rows["moe_opt"].tokens_per_second == {"prefill": 6 / 2, "decode": 2 / 1}
    assert "prefill" not in rows["batched_mm"].tokens_per_second


def test_a_side_that_computes_something_else_is_not_timed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq_moe_opt.moe.layer import MoELayer

    right = MoELayer.apply
    monkeypatch.setattr(MoELayer, "apply", lambda self, *given, **how: right(self, *given, **how) * 1.01)
    plan = script.Plan(script.QUICK, (2,), ("float32",), 6, 3, 1, torch.get_num_threads())
    with torch.inference_mode(), pytest.raises(script.BenchmarkError, match="Olmoe, moe_opt: logits differ"):
        script.measure("Olmoe", plan)


def test_batched_mm_is_left_out_where_it_would_copy_too_much(script: ModuleType) -> None:
    with benchmark_modules("_families_models", "_families_work") as (models, work):
        model = models.model_of("Mixtral", models.QUICK)
        # D 32, F 24: 2 * 24 * 32 + 32 * 24 numbers of 4 bytes a row.
        assert work.copied_bytes(10, model) == 10 * (3 * 24 * 32) * 4
