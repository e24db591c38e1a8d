"""The buffering benchmark: a tiny run from the command line, and the rules that make its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fairseq_moe_opt.buffering import POLICIES
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit
from tests.helpers.benchmark_modules import benchmark_modules, run_benchmark

MIB = 2**20


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ...]]:
    """``buffering``, ``_buffers`` and ``_sides``, which are scripts beside each other rather than a package."""
    with benchmark_modules("buffering", "_buffers", "_sides") as found:
        yield found


@pytest.mark.slow
def test_a_tiny_run_gives_equal_tokens_everywhere(tmp_path: Path) -> None:
    target = tmp_path / "quick.json"
    sizes = ["--budget", "50", "--no-policies", "--rounds", "1", "--new-tokens", "6", "--threads", "1", "--batch", "2"]
    done = run_benchmark("buffering", "--quick", *sizes, "--reference", "none", "--json", str(target))
    assert done.exit_code == 0, done.output
    (model,) = json.loads(target.read_text())["rows"]
    rows = model["rows"]
    assert [row["error"] for row in rows] == [None] * 5
    assert all(row["tokens_equal"] for row in rows)
    assert rows[0]["side"] == "resident" and rows[0]["miss_rate"] is None and rows[0]["of_resident"] == 1.0
    for row in rows[1:]:
        assert row["within_budget"] and row["arena_bytes"] > 0 and 0 <= row["miss_rate"] <= 1
    assert set(model["simulated_miss_rates"]["50"]) == {*POLICIES, "belady"}
    assert "equal" in done.output and "WRONG" not in done.output


def test_every_budget_tier_and_policy_has_its_side(modules: tuple[ModuleType, ModuleType, ModuleType]) -> None:
    _, buffers, _ = modules
    found = list(buffers.sides([100, 50, 25, 10]))
    assert found[0].options == {}
    assert len(set(found)) == len(found) == 1 + 4 * 4 + len(POLICIES) + 1
    assert {side.policy for side in found if side.budget == 25} == {"auto", *POLICIES}
    assert found[-1].options == {
        "expert_memory": "25%",
        "eviction": "lifo",
        "expert_pool": "layer",
        "prefetch": "off",
        "host_memory": "0",
    }


def test_growing_beyond_the_budget_is_said(modules: tuple[ModuleType, ModuleType, ModuleType]) -> None:
    _, buffers, sides = modules
    cache = {"misses": 3, "hits": 9, "bytes_read": {"file": 40, "host": 8}, "stall_seconds": 0.5}
    report = {
        "buffer": {"arena_bytes": 10 * MIB, "workspace_bytes": 2 * MIB, "host_bytes": 0},
        "caches": [cache, cache],
    }
    case = sides.Case(batch=2, source_tokens=4, new_tokens=6)
    found = buffers._of_buffer(report, case, 76 * MIB)
    assert found == {
        "miss_rate": 0.25,
        "bytes_per_token": 8.0,
        "stall_seconds": 1.0,
        "arena_bytes": 10 * MIB,
        "within_budget": True,
    }
    assert not buffers._of_buffer(report, case, 76 * MIB + 1)["within_budget"]
    assert buffers._of_buffer({}, case, 0) == {}


def test_another_token_is_wrong(modules: tuple[ModuleType, ModuleType, ModuleType]) -> None:
    buffering, buffers, _ = modules
    resident = buffers.BufferRow("resident", {}, tokens_per_second=10.0)
    row = buffers._compared(buffers.BufferRow("25%", {}, tokens_per_second=5.0), False, [resident])
    assert (row.of_resident, row.tokens_equal) == (0.5, False)
    assert "WRONG" in buffering._cells(row)
    failed = buffers._compared(buffers.BufferRow("25%", {}, error="no memory"), True, [resident])
    assert not failed.tokens_equal and "failed: no memory" in buffering._cells(failed)


def test_how_skewed_and_sticky_a_trace_is(modules: tuple[ModuleType, ModuleType, ModuleType]) -> None:
    buffering, _, _ = modules
    layers = (TraceLayer("enc", "encoder", 4), TraceLayer("dec", "decoder", 4))
    visits = (
        TraceVisit("enc", (0, 1, 2, 3)),
        TraceVisit("dec", (0, 1)),
        TraceVisit("dec", (0,)),
        TraceVisit("dec", (0, 2)),
    )
    trace = Trace(layers, visits)
    assert buffering.routing_facts(trace) == {"hottest_quarter": 3 / 5, "used_again": 2 / 3}
    assert buffering.miss_rates(trace, [100])[100]["belady"] == 3 / 5
