"""The kernels' benchmark: a tiny run, its checks, and files that several runs add to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fairseq_moe_opt.moe.kernels import available_kernels
from tests.helpers.benchmark_modules import benchmark_modules

ROWS = (1, 2, 4, 8, 32)


@dataclass(frozen=True)
class Modules:
    """The benchmark's own modules, which are scripts beside each other rather than a package."""

    kernels: ModuleType
    results: ModuleType
    tables: ModuleType


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """With two tiny shapes and a small plain read."""
    with benchmark_modules("kernels", "_kernel_results", "_tables") as found:
        kernels = found[0]
        shapes = (kernels.Shape("wide", 32, 64, False), kernels.Shape("gated", 16, 32, True))
        monkeypatch.setattr(kernels, "SHAPES", shapes)
        monkeypatch.setattr(kernels, "PLAIN_NUMBERS", 2**16)
        monkeypatch.setattr(kernels, "MOST_EXPERTS", 3)
        yield Modules(*found)


def run(modules: Modules, target: Path, *arguments: str) -> Result:
    sizes = ["--rounds", "3", "--budget", "0.01", "--results", str(target)]
    return CliRunner().invoke(modules.kernels.app, [*sizes, *arguments])


def content_of(target: Path) -> dict[str, Any]:
    return dict(json.loads(target.read_text(encoding="utf-8")))


def test_every_case_has_its_sides_and_ratios(modules: Modules, tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    done = run(modules, target, "--shapes", "wide,gated", "--dtypes", "float32,int8")
    assert done.exit_code == 0, done.output
    content = content_of(target)
    found = {(row["shape"], row["dtype"], row["rows_dtype"], row["rows"], row["side"]) for row in content["rows"]}
    for dtype, rows_dtype in (("float32", "float32"), ("int8", "float32"), ("int8", "bfloat16")):
        names = available_kernels("cpu", getattr(torch, dtype))
        for shape in ("wide", "gated"):
            for rows in ROWS:
                expected = {name for name in names if name != "naive" or rows == 1}
                if shape == "gated" and dtype == "float32":
                    ways = ("eager", "batched_mm", "grouped_mm") if rows == 1 else ("eager", "grouped_mm")
                    expected |= {f"Transformers {way}" for way in ways}
                assert {side for *case, side in found if case == [shape, dtype, rows_dtype, rows]} == expected
    for row in content["rows"]:
        assert len(row["seconds"]) == len(row["bandwidth"]) == 3 and row["of_bandwidth"] > 0
        assert len(row["dense_seconds"]) == (3 if row["rows"] == 32 else 0)
        assert (row["of_dense"] > 0) == (row["rows"] == 32)
        numbers = 3 * 32 * 64 * 2 if row["shape"] == "wide" else 3 * 16 * 32 * 3
        assert row["weight_bytes"] == numbers * (1 if row["dtype"] == "int8" else 4)
        assert row["difference"] <= (1e-5 if row["rows_dtype"] == "float32" else 2e-2)
    assert "int8, bfloat16 rows" in done.output
    assert "| wide | int8 | bfloat16 |" in modules.tables.kernels(content)


def test_runs_add_to_one_file(modules: Modules, tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    for arguments in (("gated", "int8"), ("wide", "float32"), ("wide", "float32")):
        assert run(modules, target, "--add", "--shapes", arguments[0], "--dtypes", arguments[1]).exit_code == 0
    cases = [(row["shape"], row["dtype"], row["rows_dtype"], row["rows"]) for row in content_of(target)["rows"]]
    expected = [("wide", "float32", "float32", rows) for rows in ROWS]
    expected += [("gated", "int8", one, rows) for one in ("float32", "bfloat16") for rows in ROWS]
    assert list(dict.fromkeys(cases)) == expected
    sides = [(row["side"], row["rows"]) for row in content_of(target)["rows"] if row["shape"] == "wide"]
    assert len(sides) == len(set(sides))
    other = run(modules, target, "--add", "--shapes", "wide", "--dtypes", "float32", "--budget", "0.02")
    assert isinstance(other.exception, modules.results.BenchmarkError)
    assert "cannot be added to: its arguments is {'rounds': 3, 'budget': 0.01}, now it is" in str(other.exception)
    assert len(content_of(target)["rows"]) == len(cases)


def test_a_side_that_differs_stops_the_benchmark(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = modules.kernels.sides_of

    def with_a_wrong_one(case: Any) -> Iterator[Any]:
        yield from real(case)
        yield "wrong", lambda: dict(real(case))["loop"]() * 1.001

    monkeypatch.setattr(modules.kernels, "sides_of", with_a_wrong_one)
    target = tmp_path / "kernels.json"
    done = run(modules, target, "--shapes", "wide", "--dtypes", "float32")
    assert isinstance(done.exception, modules.results.BenchmarkError)
    assert "wide, float32: wrong differs by 1.0e-03" in str(done.exception)
    assert not target.exists()


def test_sides_take_turns_between_readings(modules: Modules) -> None:
    ran: list[str] = []
    sides = {name: lambda name=name: ran.append(name) for name in "ab"}
    seconds, around = modules.kernels.take_turns(sides, 2, lambda: ran.append("-"))
    assert "".join(ran) == "-a-b-" + "b-a-" + "a-b-"
    assert (
        {name: len(one) for name, one in seconds.items()} == {"a": 2, "b": 2} == {k: len(v) for k, v in around.items()}
    )


def test_limits_are_measured_beyond_the_limit_in_force(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled code itself takes every number of rows, and only where the loop is faster is there a limit."""
    if "fused" not in available_kernels():
        pytest.skip("no compiled kernel here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fairseq_moe_opt.moe.kernels.fused.row_limit", lambda *_: 0)
    seen: list[int] = []
    shape = modules.kernels.SHAPES[0]
    experts, _ = modules.kernels.make_experts(shape, torch.float32, torch.float32, 1)

    def turns(sides: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        rows = len(sides["fused"]()) // len(experts)
        torch.testing.assert_close(sides["fused"](), sides["loop"]())
        seen.append(rows)
        return {"fused": [1.0] * rounds, "loop": [2.0 if rows <= 16 else 0.5] * rounds}, {}

    monkeypatch.setattr(modules.kernels, "take_turns", turns)
    assert modules.kernels.best_limit(shape, experts, torch.float32, 3) == 16
    assert seen == [1, 2, 4, 8, 16, 32]
