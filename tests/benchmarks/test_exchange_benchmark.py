"""The exchange benchmark: a tiny run from the command line, its checks, and the cost model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.benchmark_modules import benchmark_modules, run_benchmark

UNEVEN, PADDED = "uneven all-to-all", "padded all-to-all"


@dataclass(frozen=True)
class Modules:
    """The benchmark's own modules, which are scripts beside each other rather than a package."""

    exchange: ModuleType
    model: ModuleType
    ranks: ModuleType


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with benchmark_modules("exchange", "_exchange_model", "_exchange_ranks") as found:
        yield Modules(*found)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    target = tmp_path_factory.mktemp("benchmark") / "quick.json"
    sizes = ["--ranks", "2", "--tokens", "32", "--width", "16", "--rounds", "3", "--json", str(target)]
    done = run_benchmark("exchange", "--quick", *sizes)
    assert done.exit_code == 0, done.output
    return done.output, json.loads(target.read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
@pytest.mark.dist
def test_rows_hold_the_papers_numbers(quick_run: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = quick_run
    measured = {(row["side"], row["num_experts"]): row for row in rows if row["kind"] == "measured"}
    # k*S*D = 2 * 32 * 16 whatever E; E*C*D = 8 * 32 * 16 and 16 * 8 * 16.
    assert [measured[UNEVEN, experts]["elements"] for experts in (8, 16)] == [1024, 1024]
    assert [measured[PADDED, experts]["elements"] for experts in (8, 16)] == [4096, 2048]
    for row in measured.values():
        assert row["bytes_there"] == row["bytes_back"] == 4 * row["elements"]
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0 and row["difference"] <= 1e-5
    # Of two ranks half of everything leaves: rows both ways, and 8 bytes of half the experts' counts.
    assert measured[UNEVEN, 8]["bytes_leaving"] == 4096 + 8 * 4
    assert measured[PADDED, 8]["bytes_leaving"] == 16384 + 8


@pytest.mark.slow
@pytest.mark.dist
def test_predictions_are_marked_as_such(quick_run: tuple[str, list[dict[str, Any]]]) -> None:
    output, rows = quick_run
    predicted = [row for row in rows if row["kind"] == "prediction"]
    assert [(row["num_experts"], row["num_ranks"]) for row in predicted] == [(8, 8), (16, 8), (16, 16)]
    assert "PREDICTIONS, not measured" in output
    assert {row["kind"] for row in rows} == {"measured", "probe", "model", "prediction"}


def test_the_model_finds_latency_and_bandwidth(modules: Modules) -> None:
    samples = [
        modules.model.Sample(messages, nbytes, messages * 5e-5 + nbytes / 1e9)
        for messages in (1, 3)
        for nbytes in (0, 10_000, 1_000_000)
    ]
    model = modules.model.fit(samples)
    assert model.latency == pytest.approx(5e-5) and model.bandwidth == pytest.approx(1e9)
    assert model.error == pytest.approx(0, abs=1e-6)


def test_a_prediction_by_hand(modules: Modules) -> None:
    setting = modules.ranks.Setting(num_experts=8, fraction=0.5, tokens=4, width=2)
    model = modules.model.CostModel(latency=1.0, bandwidth=2.0, error=0.0)
    # 3 messages each of sizes, rows, results; three quarters of 8 int64, and twice of k*S*D = 16 float32.
    assert model.predict(setting, UNEVEN, 4) == 3 * 3 + (48 + 2 * 48) / 2
    # Twice 3 messages and three quarters of E*C*D = 32 float32; 4 steps of 8 bytes for the capacity.
    assert model.predict(setting, PADDED, 4) == 2 * 3 + 2 * 96 / 2 + 4 + 32 / 2


def test_samples_without_a_bandwidth_are_refused(modules: Modules) -> None:
    with pytest.raises(ValueError, match="no bandwidth"):
        modules.model.fit([modules.model.Sample(1, 0, 1e-4), modules.model.Sample(3, 0, 3e-4)])


def fake_ranks(modules: Modules, setting: Any, difference: float = 0.0) -> list[Any]:
    def way(side: str) -> dict[str, dict[str, int]]:
        elements = setting.elements(side)
        rows = {
            "elements_sent": elements,
            "elements_received": elements,
            "bytes_sent": 4 * elements,
            "bytes_leaving": 2 * elements,
        }
        return {"dispatch": dict(rows), "combine": dict(rows)}

    sides = (UNEVEN, PADDED)
    return [
        modules.ranks.Measured({side: way(side) for side in sides}, {side: [1.0] for side in sides}, difference, [])
        for _ in range(2)
    ]


def test_other_numbers_than_the_papers_stop_the_benchmark(modules: Modules) -> None:
    setting = modules.ranks.Setting(8, 1.0, 4, 2)
    found = fake_ranks(modules, setting)
    assert [row.elements for row in modules.exchange.rows_of(setting, found)] == [16, 64]
    wrong = copy.deepcopy(found)
    wrong[1].traffic[UNEVEN]["combine"]["elements_sent"] += 2
    with pytest.raises(modules.exchange.BenchmarkError, match="rank 1, combine: elements_sent is 18, not 16"):
        list(modules.exchange.rows_of(setting, wrong))


def test_other_outputs_stop_the_benchmark(modules: Modules) -> None:
    setting = modules.ranks.Setting(8, 1.0, 4, 2)
    for difference in (1e-3, float("nan")):
        with pytest.raises(modules.exchange.BenchmarkError, match="outputs differ"):
            list(modules.exchange.rows_of(setting, fake_ranks(modules, setting, difference)))
