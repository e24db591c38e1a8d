"""Dispatch: integers worked out by hand, and the inverse by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.moe import Routing
from fairseq_moe_opt.moe.dispatch import combine, gather, plan, segments


def routing_of(index: list[list[int]], num_experts: int, weight: list[list[float]] | None = None) -> Routing:
    expert_index = torch.tensor(index, dtype=torch.int64).reshape(len(index), -1 if index else 2)
    weights = torch.ones(expert_index.shape) if weight is None else torch.tensor(weight)
    return Routing(expert_index, weights, num_experts)


def test_rows_are_grouped_by_expert_then_token() -> None:
    # choices: t0 -> e2, e0; t1 -> e0, dropped; t2 -> e2, e1
    dispatch = plan(routing_of([[2, 0], [0, 3], [2, 1]], 3))
    assert dispatch.source.tolist() == [0, 1, 2, 0, 2]  # e0: t0 t1 | e1: t2 | e2: t0 t2
    assert dispatch.counts == (2, 1, 2)
    assert dispatch.position.tolist() == [[3, 0], [1, 5], [4, 2]]  # 5 == R: the zero row
    assert [(s.expert, s.start, s.stop) for s in segments(dispatch.counts)] == [(0, 0, 2), (1, 2, 3), (2, 3, 5)]


def test_empty_experts_have_no_segment() -> None:
    dispatch = plan(routing_of([[3], [3]], 5))
    assert dispatch.counts == (0, 0, 0, 2, 0)
    assert [s.expert for s in segments(dispatch.counts)] == [3]


def test_no_tokens() -> None:
    dispatch = plan(Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 4))
    assert dispatch.counts == (0, 0, 0, 0) and dispatch.num_rows == 0 and segments(dispatch.counts) == ()
    assert combine(torch.zeros(1, 3), dispatch, torch.empty(0, 2)).shape == (0, 3)


def test_everything_dropped_reads_the_zero_row() -> None:
    dispatch = plan(routing_of([[2, 2], [2, 2]], 2))
    assert dispatch.num_rows == 0
    assert combine(torch.zeros(1, 3), dispatch, torch.zeros(2, 2)).tolist() == [[0.0] * 3] * 2


def test_combine_weights_each_choice() -> None:
    routing = routing_of([[1, 0], [0, 2]], 2, [[0.75, 0.25], [0.5, 0.0]])
    dispatch = plan(routing)  # sorted rows: e0: t0, t1 | e1: t0
    rows = torch.tensor([[4.0], [8.0], [16.0], [0.0]])
    assert combine(rows, dispatch, routing.weight).tolist() == [[0.75 * 16 + 0.25 * 4], [0.5 * 8]]


def test_dropped_choice_does_not_read_another_rows_infinity() -> None:
    routing = routing_of([[0, 1], [1, 1]], 1, [[1.0, 0.0], [0.0, 0.0]])
    rows = torch.tensor([[float("inf")], [0.0]])
    assert combine(rows, plan(routing), routing.weight).tolist() == [[float("inf")], [0.0]]


@given(st.data())
def test_position_inverts_source(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, 3))
    index = data.draw(
        st.lists(st.lists(st.integers(0, num_experts), min_size=top_k, max_size=top_k), min_size=1, max_size=12)
    )
    dispatch = plan(routing_of(index, num_experts))
    flat = [expert for row in index for expert in row]
    assert list(dispatch.counts) == [flat.count(expert) for expert in range(num_experts)]
    tokens = torch.arange(float(len(index))).unsqueeze(1)
    padded = torch.cat((gather(tokens, dispatch.source), torch.tensor([[-1.0]])))
    for token, row in enumerate(index):
        for choice, expert in enumerate(row):
            read = padded[dispatch.position[token, choice]].item()
            assert read == (-1.0 if expert == num_experts else token)
