"""The GPU kernels' benchmark, tried on a CPU: what it compares, counts and writes, not its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", minversion="5.12", reason="transformers >= 5.12 is not installed")

from tests.helpers.benchmark_modules import benchmark_modules

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_modules("kernels_gpu") as (module,):
        shapes = (
            module.Shape("plain", 32, 64, 8, 2, False),
            module.Shape("gated", 32, 48, 8, 3, True),
        )
        monkeypatch.setattr(module, "SHAPES", shapes)
        monkeypatch.setattr(module, "PREFILL", 64)
        yield module


def test_all_sides_are_compared_and_written(benchmark: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--rounds", "2", "--shapes", "plain,gated", "--dtypes", "float32,bfloat16"]
    result = CliRunner().invoke(benchmark.app, [*arguments, "--results", str(path)])
    assert result.exit_code == 0, result.output
    assert "grouped_mm" in result.output
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    sides = {(row["shape"], row["tokens"]): set() for row in rows}
    for row in rows:
        sides[row["shape"], row["tokens"]].add(row["side"])
        assert len(row["seconds"]) == len(row["bandwidth"]) == len(row["dense_seconds"]) == 2
        assert row["active"] <= min(8, row["tokens"] * row["top_k"])
        assert (row["of_grouped"] > 0) == (row["shape"] == "gated")
    assert set(sides) == {(shape, tokens) for shape in ("plain", "gated") for tokens in (1, 8, 32, 64)}
    assert {"loop", "grouped_mm"} <= sides["plain", 8]
    assert {f"Transformers {way}" for way in ("eager", "batched_mm", "grouped_mm")} <= sides["gated", 8]
    assert "Transformers batched_mm" not in sides["gated", 64]


def test_the_read_counts_experts_that_were_chosen(benchmark: ModuleType) -> None:
    """Two tokens that choose the same two of eight experts: two experts' matrices in the time that a side takes."""
    shape = benchmark.SHAPES[0]
    case = benchmark.case_of(shape, benchmark.random_packed(shape, torch.float32, CPU), 2)
    index = torch.tensor([[1, 5], [5, 1]])
    case = replace(case, routing=replace(case.routing, expert_index=index))
    with torch.inference_mode():
        (row, *_) = benchmark.measure(case, torch.ones(1000), benchmark.Clock(CPU), rounds=1)
    read = 2 * (2 * 32 * 64) * 4
    assert row.active == 2
    assert row.of_bandwidth == pytest.approx(read / row.seconds[0] / row.bandwidth[0])
    assert row.of_dense == pytest.approx(row.dense_seconds[0] / row.seconds[0])


def test_a_side_that_differs_is_refused(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = benchmark.SHAPES[1]
    case = benchmark.case_of(shape, benchmark.random_packed(shape, torch.float32, CPU), 4)
    monkeypatch.setattr(benchmark, "sides_of", lambda case: [("wrong", lambda: case.tokens)])
    with torch.inference_mode(), pytest.raises(Exception, match=r"gated, torch\.float32: wrong differs by"):
        benchmark.measure(case, torch.ones(1000), benchmark.Clock(CPU), rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(benchmark: ModuleType) -> None:
    result = CliRunner().invoke(benchmark.app, [])
    assert "torch sees no CUDA device" in str(result.exception)
