"""Routers against 102 direct calls of the branches' ``top1gating`` and ``top2gating``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, Routing, Top1Router
from fairseq_moe_opt.moe.static_gating import combine_weights
from tests.helpers.goldens import FAIRSEQ_GOLDENS, read_arrays, read_json

CASES: list[dict[str, Any]] = read_json(FAIRSEQ_GOLDENS / "gating" / "gating_cases.json")


@cache
def arrays() -> Mapping[str, Tensor]:
    return read_arrays(FAIRSEQ_GOLDENS / "gating" / "gating_cases.npz")


def router_of(case: dict[str, Any]) -> GShardTop2Router | Top1Router:
    rule = CapacityRule(case["fraction"], eval_length=case["capacity_length"])
    if case["kind"] == "top1":
        return Top1Router(case["E"], capacity=rule, fp32_gating=case["use_fp32"])
    return GShardTop2Router(
        case["E"],
        capacity=rule,
        second_expert_policy=case["policy"],
        normalize_before_dropping=case["normalize_before"],
        batch_prioritized=case["bpr"],
        fp32_gating=case["use_fp32"],
    )


def route(case: dict[str, Any]) -> Routing:
    logits = arrays()[f"{case['case']}.logits"].to(getattr(torch, case["dtype"]))
    padding = arrays().get(f"{case['case']}.mask")
    return router_of(case).route(logits, padding, training=case["train_mode"], with_slots=True, with_aux_loss=True)


def recorded(case: dict[str, Any]) -> dict[tuple[int, int, int], float]:
    """(token, expert, slot) of every non-zero combine weight, and the weight."""
    places = arrays()[f"{case['case']}.nz_sec"].tolist()
    weights = arrays()[f"{case['case']}.nz_w"].tolist()
    return {tuple(place): weight for place, weight in zip(places, weights, strict=True)}


def routed(routing: Routing) -> dict[tuple[int, int, int], float]:
    """The same of a routing."""
    assert routing.slot is not None
    found: dict[tuple[int, int, int], float] = {}
    for token, (experts, slots, weights) in enumerate(
        zip(routing.expert_index.tolist(), routing.slot.tolist(), routing.weight.tolist(), strict=True)
    ):
        for expert, slot, weight in zip(experts, slots, weights, strict=True):
            if expert != routing.num_experts and weight != 0:
                found[token, expert, slot] = weight
    return found


def tolerance(case: dict[str, Any]) -> float:
    """A unit in the last place or two of the dtype the weights are computed and kept in."""
    return 2 * torch.finfo(getattr(torch, case["dtype"])).eps


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['kind']}")
def test_routing_is_the_branches_own(case: dict[str, Any]) -> None:
    routing, expected = route(case), recorded(case)
    assert routing.capacity == int(arrays()[f"{case['case']}.capacity"])
    found = routed(routing)
    assert found.keys() == expected.keys()
    assert all(found[place] == pytest.approx(expected[place], rel=tolerance(case)) for place in expected)
    assert routing.weight.dtype == getattr(torch, case["combine_dtype"].removeprefix("torch."))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['kind']}")
def test_load_balancing_loss_is_the_branches_own(case: dict[str, Any]) -> None:
    loss = route(case).aux_loss
    assert loss is not None
    expected = float(arrays()[f"{case['case']}.l_aux"])
    # Without fp32 gating the branch averages in the gate's own dtype.
    epsilon = 1e-6 if case["use_fp32"] else torch.finfo(getattr(torch, case["dtype"])).eps
    assert float(loss) == pytest.approx(expected, rel=4 * epsilon)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['kind']}")
def test_static_masks_are_the_branches_own(case: dict[str, Any]) -> None:
    routing, expected = route(case), recorded(case)
    assert routing.capacity is not None
    combine = combine_weights(routing, routing.capacity)
    assert {tuple(place) for place in combine.nonzero().tolist()} == expected.keys()


def test_cases_cover_the_rules() -> None:
    """The table would still pass if half of it were lost: say what it must hold."""
    assert len(CASES) == 102
    assert {case["kind"] for case in CASES} == {"top1", "top2"}
    assert {case["fraction"] for case in CASES} >= {1.0, 0.25, 0.1, 0.05, -1.0}
    assert {case["pad"] for case in CASES} == {"none", "none_false", "some", "all"}
    top2 = [case for case in CASES if case["kind"] == "top2"]
    rules = ("bpr", "normalize_before", "train_mode", "use_fp32")
    assert all({case[rule] for case in top2} == {True, False} for rule in rules)
