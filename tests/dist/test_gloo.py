"""Real processes on gloo: the same results as one process, and one message when a rank fails."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.moe import Routing
from fairseq_moe_opt.parallel import (
    AllReduceExchange,
    AllToAllExchange,
    PaddedAllToAllExchange,
    ProcessGroupRanks,
    SlotMap,
    agree,
    expert_group,
    follow_first,
)
from tests.helpers.compare import assert_close_relative
from tests.helpers.layers import random_experts
from tests.helpers.parallel_layers import dynamic_layer, part_of, random_routing, static_layer
from tests.helpers.ranks import Outcome, start_ranks, values_of

pytestmark = pytest.mark.dist

WIDTH, NUM_EXPERTS, LENGTHS = 8, 7, (5, 0, 3, 4)
HANG_TIMEOUT = 5.0


def problem(num_ranks: int, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor, Routing, list[slice]]:
    """The same experts, tokens and routing in every process; rank 1 has no tokens."""
    torch.manual_seed(7)
    lengths = LENGTHS[:num_ranks]
    packed = random_experts(NUM_EXPERTS, dtype=dtype)
    routing = random_routing(sum(lengths), NUM_EXPERTS, 2, torch.Generator().manual_seed(8), skew=1.0, padding=0.2)
    stops = [sum(lengths[: place + 1]) for place in range(num_ranks)]
    slices = [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]
    return packed, torch.randn(sum(lengths), WIDTH).to(dtype), routing, slices


def placements(num_ranks: int) -> tuple[SlotMap, SlotMap]:
    """Contiguous, uneven where it does not divide; and shuffled, with rank 0 holding one expert and one replicated."""
    shuffled = [6, 2, 0, 5, 1, 4, 3]
    others = [shuffled[1 + rank :: num_ranks - 1] for rank in range(num_ranks - 1)]
    replicated = [(6,), *(tuple(experts) if 6 in experts else (*experts, 6) for experts in others)]
    return SlotMap.contiguous(NUM_EXPERTS, num_ranks), SlotMap(NUM_EXPERTS, tuple(replicated))


def every_exchange(dtype: torch.dtype) -> dict[str, Any]:
    """All exchanges and placements in one start of the processes."""
    ranks = ProcessGroupRanks()
    packed, tokens, routing, slices = problem(ranks.size, dtype)
    rows = slices[ranks.rank]
    results: dict[str, Any] = {}
    for name, slot_map in zip(("contiguous", "replicated"), placements(ranks.size), strict=True):
        held = slot_map.by_rank[ranks.rank]
        layer = dynamic_layer(packed, held, AllToAllExchange(ranks, slot_map), NUM_EXPERTS, "loop")
        results[f"all-to-all {name}"] = layer.apply(tokens[rows], part_of(routing, rows))
        layer = dynamic_layer(packed, held, AllReduceExchange(ranks, slot_map), NUM_EXPERTS, "loop")
        results[f"all-reduce {name}"] = layer.apply(tokens, routing)
    results["maximum"] = ranks.maximum(10 + ranks.rank)
    results["first"] = follow_first(ranks, f"kernel of {ranks.rank}")
    agree(ranks, {"checkpoint": "same"})
    return results


@pytest.mark.parametrize(
    ("num_ranks", "dtype"),
    [(2, torch.float32), (3, torch.float32), (4, torch.float32), (2, torch.bfloat16), (2, torch.float16)],
)
def test_processes_equal_one_process(num_ranks: int, dtype: torch.dtype) -> None:
    packed, tokens, routing, _ = problem(num_ranks, dtype)
    with torch.no_grad():
        layer = dynamic_layer(packed, range(NUM_EXPERTS), None, NUM_EXPERTS, "loop")
        expected = layer.apply(tokens, routing)
    results = values_of(start_ranks(num_ranks, every_exchange, dtype))
    parts = torch.cat([result["all-to-all contiguous"] for result in results])
    assert torch.equal(parts, expected)
    assert all(torch.equal(result["all-reduce contiguous"], expected) for result in results)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close_relative(torch.cat([result["all-to-all replicated"] for result in results]), expected, tolerance)
    for result in results:
        assert_close_relative(result["all-reduce replicated"], expected, tolerance)
        assert (result["maximum"], result["first"]) == (9 + num_ranks, "kernel of 0")


def expert_and_data_parallel() -> torch.Tensor:
    """Two groups of two ranks, each with all experts; and static gating within them."""
    ranks = ProcessGroupRanks(expert_group(2, timeout=20.0))
    packed, tokens, routing, slices = problem(4)
    rows = slices[torch.distributed.get_rank()]
    slot_map = SlotMap.contiguous(NUM_EXPERTS, 2)
    layer = dynamic_layer(packed, slot_map.by_rank[ranks.rank], AllToAllExchange(ranks, slot_map), NUM_EXPERTS)
    dynamic = layer.apply(tokens[rows], part_of(routing, rows))
    wide = random_experts(8)
    padded = static_layer(wide, range(4 * ranks.rank, 4 * ranks.rank + 4), PaddedAllToAllExchange(ranks, 8), 8)
    one = static_layer(wide, range(8), None, 8)
    wide_routing = random_routing(len(tokens[rows]), 8, 2, torch.Generator().manual_seed(rows.start))
    assert_close_relative(padded.apply(tokens[rows], wide_routing), one.apply(tokens[rows], wide_routing))
    return dynamic


def test_expert_parallelism_within_data_parallelism() -> None:
    packed, tokens, routing, _ = problem(4)
    with torch.no_grad():
        expected = dynamic_layer(packed, range(NUM_EXPERTS), None, NUM_EXPERTS).apply(tokens, routing)
    assert_close_relative(torch.cat(values_of(start_ranks(4, expert_and_data_parallel))), expected)


def forward_then(fate: str) -> None:
    """One good forward; then rank 1 meets its fate in the middle of the second, and the others wait for it."""
    ranks = ProcessGroupRanks(timeout=HANG_TIMEOUT)
    packed, tokens, routing, slices = problem(ranks.size)
    slot_map = SlotMap.contiguous(NUM_EXPERTS, ranks.size)
    exchange = AllToAllExchange(ranks, slot_map)
    layer = dynamic_layer(packed, slot_map.by_rank[ranks.rank], exchange, NUM_EXPERTS)
    rows = slices[ranks.rank]
    layer.apply(tokens[rows], part_of(routing, rows))
    if ranks.rank == 1:
        # Between its dispatch and its combine, as if its experts had failed.
        exchange.combine = lambda results, state: meet(fate)  # type: ignore[method-assign]
    with ranks.watched():
        layer.apply(tokens[rows], part_of(routing, rows))


def meet(fate: str) -> torch.Tensor:
    if fate == "dies":
        os._exit(3)
    if fate == "hangs":
        time.sleep(60)
    raise MemoryError("no room for another row")


def told(outcomes: list[Outcome], ranks: tuple[int, ...] = (0, 2)) -> list[str]:
    """The messages of the ranks that were left waiting; all must have stopped by themselves, and in time."""
    for rank in ranks:
        assert isinstance(outcomes[rank].error, ParallelError), outcomes[rank]
        assert outcomes[rank].exit_code == 0 and outcomes[rank].seconds < 2 * HANG_TIMEOUT
    return [str(outcomes[rank].error) for rank in ranks]


@pytest.mark.parametrize("fate", ["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_is_named_by_the_others(fate: str) -> None:
    outcomes = start_ranks(3, forward_then, fate, grace=3.0 if fate == "hangs" else 10.0)
    for rank, message in zip((0, 2), told(outcomes), strict=True):
        assert f"all-to-all on rank {rank} failed: no answer from rank 1 (dead or hanging)" in message
        assert "Start all ranks again" in message and "\n" not in message
    assert outcomes[1].exit_code == (3 if fate == "dies" else None)


def test_a_rank_that_fails_by_itself_tells_the_others_why() -> None:
    outcomes = start_ranks(3, forward_then, "raises")
    assert isinstance(outcomes[1].error, MemoryError)
    for message in told(outcomes):
        assert "rank 1 stopped (MemoryError: no room for another row)" in message


def start_with_another_checkpoint() -> None:
    ranks = ProcessGroupRanks(timeout=HANG_TIMEOUT)
    agree(ranks, {"checkpoint": "0b" if ranks.rank == 1 else "0a", "placement": "contiguous"})


def test_a_rank_with_another_checkpoint_stops_all_of_them() -> None:
    messages = told(start_ranks(3, start_with_another_checkpoint), (0, 1, 2))
    assert len(set(messages)) == 1 and "checkpoint: rank 1 has 0b, rank 0 has 0a" in messages[0]


def test_without_a_process_group_the_message_says_what_to_call() -> None:
    with pytest.raises(ParallelError, match="call init_process_group first"):
        ProcessGroupRanks()
    with pytest.raises(ParallelError, match="call init_process_group first"):
        expert_group(2, timeout=1.0)
