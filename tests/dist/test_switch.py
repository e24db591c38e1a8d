"""Switch Transformers with their experts spread over two gloo processes: the tokens of one. Checked with 5.23.0."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe_opt.parallel import EXCHANGES, ProcessGroupRanks
from fairseq_moe_opt.placement import Placement
from hf_integration import ExpertParallel, from_pretrained
from tests.helpers.compare import assert_close_relative
from tests.helpers.ranks import start_ranks, values_of
from tests.helpers.switch import batch, greedy, logits, tiny_switch

pytestmark = pytest.mark.dist

WAYS: tuple[dict[str, Any], ...] = ({}, {"expert_memory": "50%"})
LAYERS = ("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp")
UNEVEN = Placement(dict(zip(LAYERS, (((6, 1, 3), (0, 5, 2, 7, 4)), ((7,), (6, 5, 4, 3, 2, 1, 0))), strict=True)), 8, 2, "hand")


def run(folder: str) -> list[Any]:
    results = []
    for exchange in EXCHANGES:
        for placement, way in product((None, UNEVEN), WAYS):
            parallel = ExpertParallel(ProcessGroupRanks(), placement, exchange)
            model = from_pretrained(folder, parallel=parallel, capacity="checkpoint", **way)
            results.append((logits(model, batch()), greedy(model, batch()), model.moe.report().expert_bytes))
    return results


def run_undo(folder: str) -> list[bool]:
    model = from_pretrained(folder, parallel=ExpertParallel(ProcessGroupRanks()))
    elsewhere = any(parameter.is_meta for parameter in model.parameters())
    model.moe.undo()
    original = tiny_switch().state_dict()
    return [elsewhere, all(torch.equal(value, original[name]) for name, value in model.state_dict().items())]


def test_undo_reads_the_experts_of_the_other_process(tmp_path: Path) -> None:
    tiny_switch().save_pretrained(tmp_path)
    results = values_of(start_ranks(2, run_undo, str(tmp_path), timeout=60.0, deadline=90.0))
    assert results == [[True, True]] * 2


def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    tiny_switch(expert_capacity=2).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, capacity="checkpoint")
    expected, tokens = logits(model, batch()), greedy(model, batch())
    ranks = values_of(start_ranks(2, run, str(tmp_path), timeout=60.0, deadline=90.0))
    for results in ranks:
        assert len(results) == len(EXCHANGES) * len(WAYS) * 2
        for actual, generated, _ in results:
            assert_close_relative(actual, expected)
            assert torch.equal(generated, tokens)
    for (*_, first), (*_, second) in zip(*ranks, strict=True):
        assert first + second == model.moe.report().expert_bytes
    # In equal parts, then by the placement: 3 experts of one layer and 1 of the other.
    assert [one[2] * 16 // model.moe.report().expert_bytes for one in ranks[0][:4]] == [8, 8, 4, 4]
