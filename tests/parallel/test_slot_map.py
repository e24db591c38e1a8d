"""Where experts are and which rows go where: integers worked out by hand, properties by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.parallel import SlotMap, group_ranks
from fairseq_moe_opt.parallel.slot_map import Blocks, Shares, block_order, by_slot, sort_rows, unsort_rows


def blocks_of(slot_map: SlotMap, sender: int, sizes: list[int]) -> tuple[list[int], list[int]]:
    blocks = Shares(slot_map, sender).blocks(torch.tensor(sizes))
    return blocks.starts.tolist(), blocks.counts.tolist()


def test_the_drawing() -> None:
    # Experts a, b, c are 0, 1, 2; rank 0 holds (a, c), rank 1 (b, c). Rows of rank 0 by expert: a a b c c c.
    slot_map = SlotMap(3, ((0, 2), (1, 2)))
    starts, counts = blocks_of(slot_map, 0, [2, 1, 3])
    assert counts == [2, 1, 1, 2] and starts == [0, 3, 2, 4]
    order = block_order(Blocks(torch.tensor(starts), torch.tensor(counts)), 6)
    assert ["aabccc"[row] for row in order] == list("aacbcc")
    # Rank 0 receives a a c from rank 0 and a c from rank 1, and computes a a a c c.
    inward = block_order(by_slot(torch.tensor([[2, 1], [1, 1]])), 5)
    assert inward.tolist() == [0, 1, 3, 2, 4]


def test_senders_begin_with_different_replicas() -> None:
    slot_map = SlotMap(1, ((0,), (0,), (0,)))
    assert [blocks_of(slot_map, sender, [1])[1] for sender in range(3)] == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [blocks_of(slot_map, sender, [7])[1] for sender in range(3)] == [[2, 2, 3], [2, 3, 2], [3, 2, 2]]


def test_what_follows_the_experts_in_sizes_is_not_sent() -> None:
    assert blocks_of(SlotMap.contiguous(2, 2), 0, [3, 4, 99, 98]) == ([0, 3], [3, 4])


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "lengths"), [(8, 4, [2, 2, 2, 2]), (7, 3, [3, 2, 2]), (2, 4, [1, 1, 0, 0])]
)
def test_contiguous(num_experts: int, num_ranks: int, lengths: list[int]) -> None:
    slot_map = SlotMap.contiguous(num_experts, num_ranks)
    assert list(slot_map.num_slots) == lengths and slot_map.physical == tuple(range(num_experts))


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        (((0, 1), (3,)), "rank 1 is given expert 3, but a layer has 3"),
        (((0, -1), (1, 2)), "rank 0 is given expert -1"),
        (((0, 1, 1), (2,)), r"rank 0 is given the same expert twice: \[0, 1, 1\]"),
        (((0,), (2,)), "no rank holds expert 1"),
    ],
)
def test_maps_that_cannot_be_right_are_refused(by_rank: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(OptionError, match=f"'placement': {message}"):
        SlotMap(3, by_rank)


@given(st.data())
def test_blocks_cut_every_experts_rows_evenly(data: st.DataObject) -> None:
    num_experts, num_ranks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    homes = [data.draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)) for _ in range(num_experts)]
    by_rank = tuple(tuple(e for e in reversed(range(num_experts)) if r in homes[e]) for r in range(num_ranks))
    slot_map = SlotMap(num_experts, by_rank)
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts))
    starts, counts = blocks_of(slot_map, data.draw(st.integers(0, num_ranks - 1)), sizes)
    rows = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    order = block_order(Blocks(torch.tensor(starts), torch.tensor(counts)), sum(sizes)).tolist()
    assert sorted(order) == list(range(len(rows)))
    sent = [expert for expert, count in zip(slot_map.physical, counts, strict=True) for _ in range(count)]
    assert [rows[row] for row in order] == sent
    for expert in range(num_experts):
        parts = [count for p, count in zip(slot_map.physical, counts, strict=True) if p == expert]
        assert sum(parts) == sizes[expert] and max(parts) - min(parts) <= 1


def test_unsorting_undoes_sorting() -> None:
    rows, order = torch.randn(7, 3), torch.randperm(7)
    assert torch.equal(unsort_rows(sort_rows(rows, order), order, torch.empty(7, 3)), rows)
    assert torch.equal(unsort_rows(sort_rows(rows, None), None, torch.empty(7, 3)), rows)


def test_groups_of_consecutive_ranks() -> None:
    assert group_ranks(6, 3) == ((0, 1, 2), (3, 4, 5)) and group_ranks(2, 1) == ((0,), (1,))
    with pytest.raises(OptionError, match=r"'ep_size': 4 does not divide the 6 ranks; right would be 1, 2, 3, 6"):
        group_ranks(6, 4)
    with pytest.raises(OptionError, match="ep_size"):
        group_ranks(6, 0)
