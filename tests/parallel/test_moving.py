"""Experts that change ranks: the tables, and layers that give the same rows before, between and after moves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fairseq_moe_opt.build import ModuleShare, Rebalancer
from fairseq_moe_opt.errors import OptionError, ParallelError, PlacementError
from fairseq_moe_opt.moe import LayerConfig, LayerCounters, MoELayer, SoftmaxTopKRouter
from fairseq_moe_opt.moe.exchange_report import RebalanceReport
from fairseq_moe_opt.moe.module_experts import ModuleExperts, PackedModuleExperts, move_expert
from fairseq_moe_opt.parallel import ExpertSpread, FakeRanks, SlotMap, Transfer, run_ranks, settled, transfers
from fairseq_moe_opt.placement import Placement

NUM_EXPERTS, WIDTH, FFN_WIDTH = 6, 4, 8
EXPERT_BYTES = 4 * (2 * WIDTH * FFN_WIDTH + WIDTH + FFN_WIDTH)


def test_who_stays_keeps_its_slot_and_a_newcomer_takes_that_of_one_who_leaves() -> None:
    before = SlotMap(6, ((0, 1, 2), (3, 4, 5)))
    assert settled(before, SlotMap(6, ((1, 2, 5), (0, 3, 4)))).by_rank == ((5, 1, 2), (3, 4, 0))
    # Rank 0 gets fewer: 2 comes forward into the slot that 0 leaves. Rank 1 gets more: newcomers are the last.
    assert settled(before, SlotMap(6, ((2,), (0, 1, 3, 4, 5)))).by_rank == ((2,), (3, 4, 5, 0, 1))


def test_the_least_busy_holder_sends() -> None:
    # 0 and 1 are on ranks 0 and 1: rank 0 sends the first copy, rank 1 the second. 2 is on rank 2 alone.
    before = SlotMap(3, ((0, 1), (0, 1), (2,)))
    after = SlotMap(3, ((0, 2), (0, 1), (0, 1, 2)))
    assert transfers(before, after) == (Transfer(2, 2, 0), Transfer(0, 0, 2), Transfer(1, 1, 2))


def test_another_number_of_ranks_or_experts_is_refused() -> None:
    with pytest.raises(OptionError, match="is for 2 experts on 1 ranks, but the running one is for 2 on 2"):
        settled(SlotMap(2, ((0,), (1,))), SlotMap(2, ((0, 1),)))


@st.composite
def slot_maps(draw: st.DrawFn, num_ranks: int) -> SlotMap:
    """Every expert on one rank or more, and every rank with one or more."""
    homes = draw(
        st.lists(
            st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=2), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS
        )
    )
    held = [[expert for expert, ranks in enumerate(homes) if rank in ranks] for rank in range(num_ranks)]
    return SlotMap(NUM_EXPERTS, tuple(tuple(draw(st.permutations(one))) if one else (0,) for one in held))


@given(st.data())
def test_settled_and_transfers_of_any_two_placements(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 4))
    before, wanted = data.draw(slot_maps(num_ranks)), data.draw(slot_maps(num_ranks))
    after = settled(before, wanted)
    assert [sorted(one) for one in after.by_rank] == [sorted(one) for one in wanted.by_rank]
    for former, latter in zip(before.by_rank, after.by_rank, strict=True):
        kept = min(len(former), len(latter))
        assert all(latter[slot] == former[slot] for slot in range(kept) if former[slot] in latter)
    moves = transfers(before, after)
    holders = [set(one) for one in before.by_rank]
    assert all(move.expert in holders[move.source] for move in moves)
    for move in moves:
        assert move.expert not in holders[move.target]
        holders[move.target].add(move.expert)
    assert all(set(one) <= held for one, held in zip(after.by_rank, holders, strict=True))


def _experts() -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(3)
    pairs = [(nn.Linear(WIDTH, FFN_WIDTH), nn.Linear(FFN_WIDTH, WIDTH)) for _ in range(NUM_EXPERTS)]
    for module in (module for pair in pairs for module in pair):
        module.requires_grad_(False)
    return pairs


EXPERTS = _experts()
"""Made before any rank starts: ranks are threads, and the generator is theirs together."""


class Model:
    """One layer on one rank, and what moves its experts; the gate sends token t to expert t % 6 above all."""

    def __init__(self, ranks: FakeRanks | None, slot_map: SlotMap, packed: bool, every: int = 0) -> None:
        self.pairs = copy.deepcopy(EXPERTS)
        held: Sequence[int] = range(NUM_EXPERTS) if ranks is None else slot_map.by_rank[ranks.rank]
        for expert in set(range(NUM_EXPERTS)).difference(held):
            move_expert(self.pairs[expert], torch.device("meta"))
        self.store = (PackedModuleExperts if packed else ModuleExperts)([self.pairs[expert] for expert in held])
        spread = None if ranks is None else ExpertSpread(ranks, {"a": slot_map})
        exchange = None if spread is None else spread.exchange("a")
        counters = LayerCounters("a", "encoder", NUM_EXPERTS, exchange=None if exchange is None else exchange.counters)
        config = LayerConfig(kernel="grouped_mm" if packed else "loop")
        self.layer = MoELayer(gate, SoftmaxTopKRouter(NUM_EXPERTS, 2), self.store, config, counters, exchange=exchange)
        if spread is not None:
            share = ModuleShare(self.pairs, self.store, held)
            self.moving = Rebalancer(spread, {"a": self.layer}, {"a": share}, every)

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(tokens).output


def gate(tokens: Tensor) -> Tensor:
    """Logits (T, E) from the tokens' first number alone."""
    return -((tokens[:, :1] - torch.arange(NUM_EXPERTS)) ** 2)


def tokens_of(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randn(5 * rank + 3, WIDTH, generator=generator)
    tokens[:, 0] = torch.randint(0, NUM_EXPERTS, (len(tokens),), generator=generator)
    return tokens


def placement(slots: SlotMap, name: str = "test") -> Placement:
    return Placement({"a": slots.by_rank}, NUM_EXPERTS, slots.num_ranks, name)


@pytest.mark.parametrize("packed", [False, True])
@given(st.data())
def test_outputs_are_those_of_one_rank_through_any_moves(packed: bool, data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 3))
    way = data.draw(st.lists(slot_maps(num_ranks), min_size=2, max_size=4))

    def body(ranks: FakeRanks) -> tuple[list[Tensor], list[int], RebalanceReport, list[bool]]:
        model = Model(ranks, way[0], packed)
        outputs = [model(tokens_of(ranks.rank))]
        for target in way[1:]:
            model.moving.to(placement(target))
            outputs.append(model(tokens_of(ranks.rank)))
        here = [not pair[0].weight.is_meta for pair in model.pairs]
        return outputs, sorted(model.moving.placement.layers["a"][ranks.rank]), model.moving.report, here

    results = run_ranks(num_ranks, body)
    alone = Model(None, way[0], packed=False)
    for rank, (outputs, held, _, here) in enumerate(results):
        for output in outputs:
            torch.testing.assert_close(output, alone(tokens_of(rank)), rtol=1e-5, atol=1e-6)
        assert held == sorted(way[-1].by_rank[rank])
        assert [expert for expert in range(NUM_EXPERTS) if here[expert]] == held
    moved = sum(len(transfers(*pair)) for pair in pairwise(way))
    for _, _, report, _ in results:
        assert report.experts_moved == moved
        assert report.bytes_received == EXPERT_BYTES * report.experts_received
    assert sum(result[2].experts_received for result in results) == moved
    assert sum(result[2].bytes_sent for result in results) == moved * EXPERT_BYTES


def test_a_newcomer_takes_the_memory_of_the_one_that_leaves() -> None:
    before, after = SlotMap(6, ((0, 1, 2), (3, 4, 5))), SlotMap(6, ((1, 2, 5), (0, 3, 4)))

    def body(ranks: FakeRanks) -> tuple[set[int], set[int], object]:
        model = Model(ranks, before, packed=True)
        packed = model.store._packed
        places = [{pair[0].weight.data_ptr() for pair in model.pairs if not pair[0].weight.is_meta}]
        model.moving.to(placement(after))
        places.append({pair[0].weight.data_ptr() for pair in model.pairs if not pair[0].weight.is_meta})
        return places[0], places[1], model.store._packed is packed

    for former, latter, same_pack in run_ranks(2, body):
        assert former == latter and same_pack


def test_loads_of_all_ranks_decide_and_only_after_every_so_many_calls() -> None:
    """Rank 0's tokens want 0 and 1, which are together on rank 0: one of them leaves, for one that nobody wants."""
    together = SlotMap(6, ((0, 1, 2), (3, 4, 5)))

    def body(ranks: FakeRanks) -> list[tuple[tuple[int, ...], ...]]:
        model = Model(ranks, together, packed=False, every=2)
        tokens = torch.zeros(24 * (1 - ranks.rank), WIDTH)
        tokens[: len(tokens) // 2, 0] = 0.4
        tokens[len(tokens) // 2 :, 0] = 0.6
        seen = []
        for _ in range(5):
            model(tokens)
            model.moving.call_ended()
            seen.append(model.moving.placement.layers["a"])
        return seen

    first, second = run_ranks(2, body)
    assert first == second
    assert first[0] == together.by_rank != first[1]
    assert first[1] == first[2] == first[3] == first[4]
    assert len({0, 1}.intersection(first[1][0])) == 1


def test_without_a_single_row_nothing_moves() -> None:
    def body(ranks: FakeRanks) -> RebalanceReport:
        return Model(ranks, SlotMap.contiguous(6, 2), packed=False).moving.by_loads()

    assert {report.times for report in run_ranks(2, body)} == {0}


def refusal(way: list[Placement]) -> tuple[set[str], set[tuple[tuple[int, ...], ...]]]:
    """What ranks say that are each given their own placement, and where experts are then."""

    def body(ranks: FakeRanks) -> tuple[str, tuple[tuple[int, ...], ...]]:
        model = Model(ranks, SlotMap.contiguous(6, 2), packed=False)
        with pytest.raises((ParallelError, PlacementError)) as caught:
            model.moving.to(way[ranks.rank])
        return str(caught.value), model.moving.placement.layers["a"]

    messages, held = zip(*run_ranks(2, body), strict=True)
    return set(messages), set(held)


def test_different_placements_stop_every_rank_with_one_message() -> None:
    one, other = placement(SlotMap(6, ((0, 2, 4), (1, 3, 5)))), placement(SlotMap(6, ((1, 3, 5), (0, 2, 4))))
    messages, held = refusal([one, other])
    assert len(messages) == 1
    assert messages.pop().startswith("ranks do not agree on where experts go: placement: rank 1 has test ")
    assert held == {((0, 1, 2), (3, 4, 5))}
    messages, _ = refusal([placement(SlotMap.contiguous(6, 3))] * 2)
    assert messages == {"made for 3 ranks; this job has 2"}
