"""The demo model whose experts move between ranks in the middle of translating: the tokens of one process all the same."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.parallel import ProcessGroupRanks
from fairseq_moe_opt.placement import Cluster, moves_between
from hf_integration import generate_batches
from hf_integration.translate import load_tokenizer, pad_rows, translate_lines
from tests.dist.test_expert_parallel import (
    GREEDY,
    MODEL,
    NUM_EXPERTS,
    PATIENCE,
    alone,
    load,
    placed,
    sentences,
    settings,
)
from tests.helpers.ranks import start_ranks, values_of, without_content

pytestmark = pytest.mark.dist

TEXT, HALF = 24, 12
"""Sentences of the text, and where experts move."""


@cache
def tokenizer() -> Any:
    """Loading it takes longer than a translation does."""
    return load_tokenizer(MODEL)


def translated(model: Any, lines: tuple[str, ...]) -> list[str]:
    return list(
        translate_lines(model, tokenizer(), lines, "eng_Latn", "fra_Latn", batch_size=4, generation=GREEDY)
    )


def move_by_hand(cases: dict[str, tuple[tuple[int, ...], dict[str, Any]]]) -> dict[str, Any]:
    """Half of the text, another placement, the other half; what was said, and the report."""
    results: dict[str, Any] = {}
    for name, (slots, options) in cases.items():
        model = load(**options)
        before = model.moe.placement
        first = translated(model, sentences()[:HALF])
        report = model.moe.rebalance(placed("greedy", slots))
        second = translated(model, sentences()[HALF:TEXT])
        again = model.moe.rebalance(placed("greedy", slots))
        moved = len(moves_between(before, model.moe.placement))
        back = model.moe.rebalance(before)
        whole = translated(model, sentences()[:HALF])
        total = model.moe.report().rebalancing
        results[name] = first + second, whole, moved, [asdict(one) for one in (report, again, back, total)]
        if "expert_memory" not in options:
            model.moe.undo()
            results[name] += (model_sum(model),)
    return results


def model_sum(model: Any) -> float:
    """A number that any wrong weight changes."""
    return float(sum(value.double().abs().sum() for value in model.state_dict().values()))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_moving_in_the_middle_of_a_text_changes_no_token(num_ranks: int) -> None:
    even = Cluster.even(num_ranks, NUM_EXPERTS).slots
    uneven = (NUM_EXPERTS - 2 * num_ranks + 2, *[2] * (num_ranks - 1))
    cases: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "resident": (even, {"kernel": "loop"}),
        "resident, other numbers": (uneven, {"kernel": "loop"}),
        "packed": (even, {"kernel": "grouped_mm"}),
        "packed, other numbers": (uneven, {"kernel": "grouped_mm"}),
        "int8": (uneven, {"expert_dtype": "int8"}),
        "buffered": (uneven, {"expert_memory": "40%"}),
        "buffered, two tiers": (even, {"expert_memory": "20%", "host_memory": "40%", "prefetch": "previous"}),
    }
    if num_ranks == 3:
        cases = {name: cases[name] for name in ("resident, other numbers", "packed", "buffered")}
    everybody = values_of(start_ranks(num_ranks, move_by_hand, cases, **PATIENCE))
    for name, (_, options) in cases.items():
        expected = alone(options.get("expert_dtype", "checkpoint"))[:TEXT]
        for tokens, whole, *_ in (results[name] for results in everybody):
            assert tokens == expected, name
            assert whole == expected[:HALF], name
        _check_reports(name, [results[name][2:4] for results in everybody])
    whole_model = load(parallel=False)
    whole_model.moe.undo()
    for name in {"resident", "packed", "packed, other numbers"}.intersection(cases):
        for results in everybody:
            assert results[name][4] == pytest.approx(model_sum(whole_model), rel=1e-12)


def _check_reports(name: str, ranks: list[tuple[int, list[dict[str, Any]]]]) -> None:
    """What all ranks moved is what each says, and bytes that are sent are received."""
    moved = ranks[0][0]
    assert moved > 0
    there, again, back, total = zip(*(reports for _, reports in ranks), strict=True)
    for reports in (there, back):
        assert {one["experts_moved"] for one in reports} == {moved}
        assert sum(one["experts_received"] for one in reports) == moved
        assert sum(one["bytes_sent"] for one in reports) == sum(one["bytes_received"] for one in reports)
        sent = [one["bytes_received"] for one in reports]
        assert not any(sent) if name.startswith("buffered") else all(sent)
    assert all(one["times"] == one["experts_moved"] == one["bytes_sent"] == 0 for one in again)
    for index, one in enumerate(total):
        assert one["times"] == 2
        assert one["seconds"] == pytest.approx(sum(part[index]["seconds"] for part in (there, again, back)))


def move_by_loads(every: int) -> tuple[list[str], dict[str, Any], Any, Any]:
    model = load(placed("contiguous", (8, 8)), rebalance_every=every)
    before = model.moe.placement
    tokens = translated(model, sentences()[:TEXT])
    return tokens, asdict(model.moe.report().rebalancing), before, model.moe.placement


def test_experts_follow_the_loads_every_so_many_calls() -> None:
    """24 sentences, 4 a batch, 2 ranks: 3 calls, of which the second moves."""
    first, second = values_of(start_ranks(2, move_by_loads, 2, **PATIENCE))
    assert first[0] == second[0] == alone()[:TEXT]
    assert first[1]["times"] == second[1]["times"] == 1
    assert first[1]["experts_moved"] == second[1]["experts_moved"] > 0
    assert first[3] == second[3] != first[2]
    never, _ = values_of(start_ranks(2, move_by_loads, 0, **PATIENCE))
    assert never[1]["times"] == 0 and never[2] == never[3]


def batches_for(rank: int) -> list[dict[str, torch.Tensor]]:
    """Four for rank 0, one for rank 1."""
    tokenizer().src_lang = "eng_Latn"
    lines = sentences()[:8] if rank == 0 else sentences()[8:10]
    rows = [tokenizer()([one, other])["input_ids"] for one, other in zip(lines[::2], lines[1::2], strict=True)]
    padded = [pad_rows(ids, tokenizer().pad_token_id) for ids in rows]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in padded]


def move_with_unequal_shares() -> tuple[list[list[int]], int]:
    model = load(rebalance_every=1)
    outputs = generate_batches(model, batches_for(ProcessGroupRanks().rank), **settings(2))
    return [output.tolist() for output in outputs], model.moe.report().rebalancing.times


def test_a_rank_without_batches_left_moves_with_the_others() -> None:
    results = values_of(start_ranks(2, move_with_unequal_shares, **PATIENCE))
    model = load(parallel=False)
    assert results[0][1] == results[1][1] > 0
    for rank, (tokens, _) in enumerate(results):
        expected = generate_batches(model, batches_for(rank), **settings(2))
        assert tokens == [output.tolist() for output in expected]


def disagree() -> list[Exception]:
    model = load()
    rank = ProcessGroupRanks().rank
    raised: list[Exception] = []
    for placement in (
        placed("greedy" if rank else "contiguous", (8, 8)),
        placed("greedy", (8, 8), "another model"),
        placed("greedy", (6, 5, 5)),
    ):
        try:
            model.moe.rebalance(placement)
        except MoEError as error:
            raised.append(error)
    assert translated(model, sentences()[:4]) == translated(load(parallel=False), sentences()[:4])
    return [without_content(error) for error in raised]


def test_ranks_with_different_placements_all_stop_with_one_message() -> None:
    first, second = values_of(start_ranks(2, disagree, **PATIENCE))
    assert list(map(str, first)) == list(map(str, second))
    assert str(first[0]).startswith("ranks do not agree on where experts go: placement: rank 1 has greedy")
    assert "made for the model another model" in str(first[1])
    assert "made for 3 ranks; this job has 2" in str(first[2])
