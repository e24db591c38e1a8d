"""Routers: tables worked out by hand, one rule a test."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, SoftmaxTopKRouter, Top1Router
from fairseq_moe_opt.moe.routing import first_come_slots
from tests.helpers.layers import logits_for


def test_top2_normalises_the_two_gates() -> None:
    routing = GShardTop2Router(4).route(logits_for([(3, 1)], 4))
    assert routing.expert_index.tolist() == [[3, 1]]
    first = math.e**2 / (math.e**2 + math.e)
    assert routing.weight[0].tolist() == pytest.approx([first, 1 - first])


def test_capacity_serves_all_first_choices_before_any_second() -> None:
    # e0 is first choice of t0, t1 and second of t2: with C = 2 only the first choices fit.
    logits = logits_for([(0, 1), (0, 2), (1, 0)], 3)
    routing = GShardTop2Router(3, CapacityRule(2 / 3)).route(logits)
    assert routing.capacity == 2
    assert routing.expert_index.tolist() == [[0, 1], [0, 2], [1, 3]]
    assert routing.weight[2].tolist() == pytest.approx([1.0, 0.0])  # normalised after dropping
    assert int(routing.dropped) == 1


def test_second_choices_queue_behind_first_choices_that_were_dropped_too() -> None:
    # Three first choices of e0 with C = 1; the second choice's slot counts all three, dropped ones included.
    logits = logits_for([(0, 1), (0, 2), (0, 3), (1, 0)], 4)
    routing = GShardTop2Router(4, CapacityRule(0.25)).route(logits, with_slots=True)
    assert routing.slot[:, 0].tolist() == [0, 1, 2, 0]
    assert routing.slot[3, 1].item() == 3
    assert routing.slot[0, 1].item() == 1  # behind t3's first choice of e1
    assert routing.expert_index.tolist() == [[0, 4], [4, 2], [4, 3], [1, 4]]


def test_normalising_before_dropping_loses_the_dropped_weight() -> None:
    logits = logits_for([(0, 1), (0, 2), (1, 0)], 3)
    routing = GShardTop2Router(3, CapacityRule(2 / 3), normalize_before_dropping=True).route(logits)
    assert routing.weight[2].tolist() == pytest.approx([math.e / (math.e + 1), 0.0])


def test_batch_priority_serves_the_surest_rows_first() -> None:
    logits = torch.stack([logits_for([(0, 1)], 2, 1.5)[0], logits_for([(0, 1)], 2, 9.0)[0]])
    plain = GShardTop2Router(2, CapacityRule(0.5)).route(logits)
    prioritised = GShardTop2Router(2, CapacityRule(0.5), batch_prioritized=True).route(logits)
    assert plain.expert_index[:, 0].tolist() == [0, 2]
    assert prioritised.expert_index[:, 0].tolist() == [2, 0]


def test_padding_rows_go_nowhere_and_take_no_slot() -> None:
    logits = logits_for([(0, 1), (0, 1)], 2)
    routing = GShardTop2Router(2, CapacityRule(0.5)).route(logits, torch.tensor([True, False]))
    assert routing.expert_index.tolist() == [[2, 2], [0, 1]]
    assert routing.weight[0].tolist() == [0.0, 0.0]
    assert int(routing.dropped) == 0


def test_training_formula_and_fixed_capacity() -> None:
    rule = CapacityRule(1.0)
    assert rule.capacity(10, 4, 2, training=True) == 6  # 2 * ceil(10 / 4)
    assert rule.capacity(10, 4, 1, training=True) == 3
    assert rule.capacity(10, 4, 2, training=False) == 10
    assert CapacityRule(-1.0).capacity(10, 4, 2, training=False) == 6
    assert CapacityRule(-1.0, fixed=64).capacity(10, 4, 2, training=False) == 64
    assert CapacityRule(0.1).capacity(11, 4, 2, training=False) == 2
    assert CapacityRule(0.25, eval_length=512).capacity(11, 4, 2, training=False) == 128


def test_random_policy_keeps_the_second_expert_as_often_as_it_should() -> None:
    logits = logits_for([(0, 1)], 2, 1.0, 0.0).repeat(4000, 1)  # g2 = 1 / (1 + e) = 0.269
    torch.manual_seed(0)
    routing = GShardTop2Router(2, second_expert_policy="random").route(logits)
    kept = (routing.expert_index[:, 1] == 1).float().mean().item()
    assert kept == pytest.approx(2 / (1 + math.e), abs=0.03)
    assert routing.weight[routing.expert_index[:, 1] == 2][:, 0].tolist() == pytest.approx(
        [1.0] * int(4000 * (1 - kept)), abs=1e-6
    )


def test_sampling_policy_draws_second_experts_in_proportion() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    routing = GShardTop2Router(3, second_expert_policy="sampling").route(logits)
    assert routing.expert_index[:, 0].unique().tolist() == [0]
    share = (routing.expert_index[:, 1] == 1).float().mean().item()
    assert share == pytest.approx(math.e / (math.e + 1), abs=0.03)  # Gumbel-max over the two that are left


def test_top1_keeps_the_raw_probability() -> None:
    routing = Top1Router(2, CapacityRule(0.5)).route(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert routing.expert_index.tolist() == [[0], [2]]
    assert routing.weight[0, 0].item() == pytest.approx(math.e / (math.e + 1))
    assert routing.weight[1, 0].item() == 0.0


def test_a_capacity_of_each_sequence() -> None:
    # Two sequences of three tokens: all of the first ask for expert 0, two of the second for 1.
    first = torch.tensor([0, 0, 0, 1, 0, 1])
    logits = torch.nn.functional.one_hot(first, 2).float()
    router = Top1Router(2, CapacityRule(0.0, fixed=1, per_sequence=True))
    routing = router.route(logits, sequences=2, with_slots=True)
    assert routing.expert_index.flatten().tolist() == [0, 2, 2, 1, 0, 2]
    assert routing.dropped == 3 and routing.capacity == 2
    assert routing.slot.flatten().tolist() == [0, 2, 2, 1, 1, 2]  # 2 is past the end of a buffer of two
    assert (routing.weight[:, 0] > 0).tolist() == [True, False, False, True, True, False]
    padded = router.route(logits, torch.tensor([True, False, False, False, False, True]), sequences=2)
    assert padded.expert_index.flatten().tolist() == [2, 0, 2, 1, 0, 2]
    assert padded.dropped == 1
    whole = router.route(logits)  # one sequence, where none are told apart
    assert whole.expert_index.flatten().tolist() == [0, 2, 2, 1, 2, 2]
    wide = Top1Router(2, CapacityRule(0.0, fixed=3, per_sequence=True)).route(logits, sequences=2)
    assert wide.slot is None and wide.dropped is None and wide.capacity == 6
    assert router.route(torch.empty(0, 2), sequences=0).expert_index.shape == (0, 1)


def test_softmax_top_k_normalises_over_the_chosen() -> None:
    routing = SoftmaxTopKRouter(4, 3).route(torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    assert routing.expert_index.tolist() == [[1, 3, 2]]
    assert routing.weight.sum().item() == pytest.approx(1.0)
    raw = SoftmaxTopKRouter(4, 4, normalize=False).route(torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    assert raw.weight.sum().item() == pytest.approx(1.0) and raw.weight.shape == (1, 4)


def test_half_precision_gates_in_float32_and_answers_in_the_models_dtype() -> None:
    logits = torch.randn(6, 8).to(torch.bfloat16)
    routing = GShardTop2Router(8).route(logits)
    wide = GShardTop2Router(8).route(logits.float())
    assert routing.weight.dtype == torch.bfloat16
    assert torch.equal(routing.weight, wide.weight.to(torch.bfloat16))
    assert GShardTop2Router(8).route(logits.float(), model_dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_early_rounding_can_change_the_first_choice() -> None:
    # Two probabilities that bfloat16 cannot tell apart: the first of them wins, as in Transformers.
    logits = torch.tensor([[1.0, 1.0001, 0.0]])
    assert GShardTop2Router(3).route(logits).expert_index[0, 0] == 1
    early = GShardTop2Router(3, round_early=True).route(logits, model_dtype=torch.bfloat16)
    assert early.expert_index[0].tolist() == [0, 1]
    assert Top1Router(3).route(logits).expert_index.item() == 1
    assert Top1Router(3, round_early=True).route(logits, model_dtype=torch.bfloat16).expert_index.item() == 0


def test_aux_loss_of_uniform_and_of_collapsed_routing() -> None:
    collapsed = GShardTop2Router(4).route(torch.tensor([[50.0, 0, 0, 0]] * 5), with_aux_loss=True)
    assert collapsed.aux_loss.item() == pytest.approx(4.0)  # E^2 * mean_e: only e0, 1 * 1 / 4 * 16
    uniform = GShardTop2Router(4).route(torch.eye(4) * 1e-4, with_aux_loss=True)
    assert uniform.aux_loss.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("router", [GShardTop2Router(4), Top1Router(4), SoftmaxTopKRouter(4)])
def test_no_tokens(router: GShardTop2Router | Top1Router | SoftmaxTopKRouter) -> None:
    routing = router.route(torch.empty(0, 4), with_slots=True)
    assert routing.expert_index.shape == (0, router.top_k) == routing.weight.shape


def test_refusals_name_the_option() -> None:
    with pytest.raises(OptionError, match=r"second_expert_policy.*'best' is not one of all, sampling, random"):
        GShardTop2Router(4, second_expert_policy="best")
    with pytest.raises(OptionError, match=r"num_experts.*at least 2 experts, not 1"):
        GShardTop2Router(1)
    with pytest.raises(OptionError, match=r"top_k.*5 is not between 1 and num_experts=4"):
        SoftmaxTopKRouter(4, 5)


@given(st.data())
def test_slots_equal_cumulative_sums_over_masks(data: st.DataObject) -> None:
    num_experts, top_k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
    rows = st.lists(st.integers(0, num_experts), min_size=top_k, max_size=top_k)
    index = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=10)))
    order = torch.tensor(data.draw(st.permutations(range(len(index)))))
    slots = first_come_slots(index, num_experts, order)
    used: dict[int, int] = {}
    for choice in range(top_k):
        for row in order.tolist():
            expert = int(index[row, choice])
            assert expert == num_experts or slots[row, choice] == used.get(expert, 0)
            used[expert] = used.get(expert, 0) + 1
