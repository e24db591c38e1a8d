"""Exchanges between fake ranks against the layer of one process, and what their counters say."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fairseq_moe_opt.build import LayerSpec, build_layer
from fairseq_moe_opt.errors import OptionError, ParallelError
from fairseq_moe_opt.moe import (
    LayerCounters,
    LayerReport,
    MoELayer,
    PackedExperts,
    ResidentPackedExperts,
    Routing,
    SoftmaxTopKRouter,
    available_kernels,
)
from fairseq_moe_opt.moe.exchange_report import ExchangeCounters, ExchangeReport, Traffic
from fairseq_moe_opt.moe.local_exchange import LocalExchange
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import (
    AllReduceExchange,
    AllToAllExchange,
    Collectives,
    FakeRanks,
    PaddedAllToAllExchange,
    SlotMap,
    run_ranks,
)
from tests.helpers.compare import assert_close_relative
from tests.helpers.layers import random_experts
from tests.helpers.parallel_layers import (
    dynamic_layer,
    experts_of,
    moved,
    packed_on,
    part_of,
    random_routing,
    static_layer,
)

WIDTH = 8


def slices_of(lengths: Sequence[int]) -> list[slice]:
    stops = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]


def on_one(packed: PackedExperts, tokens: Tensor, routing: Routing, kernel: str = "auto") -> Tensor:
    with torch.no_grad():
        layer = dynamic_layer(packed, range(routing.num_experts), None, routing.num_experts, kernel)
        return layer.apply(tokens, routing)


def own_tokens(
    slot_map: SlotMap, packed: PackedExperts, tokens: Tensor, routing: Routing, lengths: Sequence[int], kernel: str
) -> list[tuple[Tensor, LayerReport]]:
    """All-to-all: every rank has its own slice of the tokens."""

    def body(ranks: FakeRanks) -> tuple[Tensor, LayerReport]:
        exchange = AllToAllExchange(ranks, slot_map)
        layer = dynamic_layer(packed, slot_map.by_rank[ranks.rank], exchange, slot_map.num_experts, kernel)
        rows = slices_of(lengths)[ranks.rank]
        with torch.no_grad():
            return layer.apply(tokens[rows], part_of(routing, rows)), layer.counters.snapshot()

    return run_ranks(slot_map.num_ranks, body)


def same_tokens(
    slot_map: SlotMap, packed: PackedExperts, tokens: Tensor, routing: Routing
) -> list[tuple[Tensor, LayerReport]]:
    """All-reduce: every rank has all of the tokens."""

    def body(ranks: FakeRanks) -> tuple[Tensor, LayerReport]:
        exchange = AllReduceExchange(ranks, slot_map)
        layer = dynamic_layer(packed, slot_map.by_rank[ranks.rank], exchange, slot_map.num_experts)
        with torch.no_grad():
            return layer.apply(tokens, routing), layer.counters.snapshot()

    return run_ranks(slot_map.num_ranks, body)


@st.composite
def worlds(draw: st.DrawFn, *, replicas: bool) -> tuple[SlotMap, Tensor, Routing, list[int]]:
    """A placement, the tokens and routing of all ranks, and how many tokens each has."""
    num_ranks, num_experts = draw(st.integers(1, 5), "W"), draw(st.integers(1, 9), "E")
    lengths = draw(st.lists(st.integers(0, 7), min_size=num_ranks, max_size=num_ranks), "tokens")
    rank = st.integers(0, num_ranks - 1)
    homes = [draw(st.sets(rank, min_size=1, max_size=3 if replicas else 1)) for _ in range(num_experts)]
    order = draw(st.permutations(range(num_experts)))
    by_rank = tuple(tuple(expert for expert in order if one in homes[expert]) for one in range(num_ranks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), "seed"))
    routing = random_routing(
        sum(lengths),
        num_experts,
        draw(st.integers(1, min(3, num_experts)), "K"),
        generator,
        skew=draw(st.sampled_from([0.0, 3.0])),
        padding=draw(st.sampled_from([0.0, 0.4, 1.0])),
    )
    tokens = torch.randn(sum(lengths), WIDTH, generator=generator)
    return SlotMap(num_experts, by_rank), tokens, routing, lengths


@given(worlds(replicas=False), st.sampled_from(available_kernels()))
def test_all_to_all_equals_one_process_bit_for_bit(
    world: tuple[SlotMap, Tensor, Routing, list[int]], kernel: str
) -> None:
    """Every expert computes the same rows in the same order: by source rank, and ranks' tokens are in rank order."""
    slot_map, tokens, routing, lengths = world
    packed = random_experts(slot_map.num_experts)
    parts = own_tokens(slot_map, packed, tokens, routing, lengths, kernel)
    with torch.no_grad():
        layer = dynamic_layer(packed, range(slot_map.num_experts), None, slot_map.num_experts, kernel)
        expected = layer.apply(tokens, routing)
    assert torch.equal(torch.cat([output for output, _ in parts]), expected)


@given(worlds(replicas=True))
def test_replicas_change_rounding_at_most(world: tuple[SlotMap, Tensor, Routing, list[int]]) -> None:
    slot_map, tokens, routing, lengths = world
    packed = random_experts(slot_map.num_experts)
    expected = on_one(packed, tokens, routing)
    outputs = [output for output, _ in own_tokens(slot_map, packed, tokens, routing, lengths, "auto")]
    assert_close_relative(torch.cat(outputs), expected)
    for output, _ in same_tokens(slot_map, packed, tokens, routing):
        assert_close_relative(output, expected)


@given(worlds(replicas=False))
def test_all_reduce_equals_one_process_bit_for_bit(world: tuple[SlotMap, Tensor, Routing, list[int]]) -> None:
    slot_map, tokens, routing, _ = world
    packed = random_experts(slot_map.num_experts)
    expected = on_one(packed, tokens, routing)
    for output, _ in same_tokens(slot_map, packed, tokens, routing):
        assert torch.equal(output, expected)


@given(st.data())
def test_static_gating_pads_to_the_largest_rank_and_equals_one_process(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 4))
    num_experts = num_ranks * data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=num_ranks, max_size=num_ranks))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    routing = random_routing(sum(lengths), num_experts, min(2, num_experts), generator, padding=0.2)
    tokens = torch.randn(sum(lengths), WIDTH, generator=generator)
    packed = random_experts(num_experts)
    held = SlotMap.contiguous(num_experts, num_ranks).by_rank

    def body(ranks: FakeRanks) -> tuple[Tensor, LayerReport]:
        layer = static_layer(packed, held[ranks.rank], PaddedAllToAllExchange(ranks, num_experts), num_experts)
        rows = slices_of(lengths)[ranks.rank]
        with torch.no_grad():
            return layer.apply(tokens[rows], part_of(routing, rows)), layer.counters.snapshot()

    parts = run_ranks(num_ranks, body)
    assert_close_relative(torch.cat([output for output, _ in parts]), on_one(packed, tokens, routing))
    capacity = max(lengths)
    for _, report in parts:
        assert report.exchange is not None
        assert report.computed_rows == num_experts * capacity
        calls = 1 if capacity else 0
        for direction in ("dispatch", "combine"):
            traffic = report.exchange.traffic[direction]
            assert (traffic.calls, traffic.elements_sent) == (calls, num_experts * capacity * WIDTH)


def test_counters_by_hand() -> None:
    """Rank 0 holds experts 0 and 1, rank 1 holds 2. Rank 0 sends 1, 0, 2 rows to them; rank 1 sends 0, 1, 0."""
    routing = Routing(torch.tensor([[0], [2], [2], [1], [3]]), torch.ones(5, 1), 3)
    packed = random_experts(3)
    reports = [
        report
        for _, report in own_tokens(SlotMap(3, ((0, 1), (2,))), packed, torch.randn(5, WIDTH), routing, [3, 2], "auto")
    ]
    first, second = (report.exchange for report in reports)
    assert first is not None and second is not None
    assert (first.kind, first.rank, second.rank, first.num_ranks) == ("all-to-all", 0, 1, 2)
    # Rows computed are the receiver's, routed ones the sender's.
    assert [report.computed_rows for report in reports] == [2, 2] and (first.slot_rows, second.slot_rows) == (
        (1, 1),
        (2,),
    )
    assert [report.routed_rows for report in reports] == [3, 1]
    assert [report.expert_rows for report in reports] == [(1, 0, 2), (0, 1, 0)]
    row = WIDTH * 4
    # One row of rank 0 stays, two leave, one arrives from rank 1.
    assert first.traffic["dispatch"] == Traffic(1, 3 * WIDTH, 2 * WIDTH, 3 * row, 2 * row, 2 * row, row)
    assert first.traffic["combine"] == Traffic(1, 2 * WIDTH, 3 * WIDTH, 2 * row, 3 * row, row, 2 * row)
    # Three int64 counts are sent, one of them away; four arrive, two of them from rank 1.
    assert first.traffic["counts"] == Traffic(1, 3, 4, 24, 32, 8, 16)


def test_counters_of_the_all_reduce() -> None:
    routing = Routing(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 3)
    for _, report in same_tokens(SlotMap.contiguous(3, 2), random_experts(3), torch.randn(2, WIDTH), routing):
        assert report.exchange is not None
        assert report.exchange.traffic["combine"].elements_sent == 4 * WIDTH  # K * T * D, on every rank
        assert report.exchange.traffic["dispatch"] == Traffic()
        assert sum(report.exchange.slot_rows) == report.computed_rows
        assert report.tokens == 2


def test_counters_start_again() -> None:
    def body(ranks: FakeRanks) -> tuple[Traffic, Traffic]:
        slot_map = SlotMap.contiguous(4, 2)
        layer = dynamic_layer(random_experts(4), slot_map.by_rank[ranks.rank], AllToAllExchange(ranks, slot_map), 4)
        with torch.no_grad():
            for _ in range(2):
                layer.apply(torch.ones(3, WIDTH), Routing(torch.tensor([[0], [1], [3]]), torch.ones(3, 1), 4))
        before = layer.counters.snapshot().exchange
        layer.counters.reset()
        after = layer.counters.snapshot().exchange
        assert before is not None and after is not None and set(after.slot_rows) == {0}
        return before.traffic["dispatch"], after.traffic["dispatch"]

    for before, after in run_ranks(2, body):
        assert (before.calls, before.elements_sent) == (2, 6 * WIDTH) and after == Traffic()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_travels_unchanged(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    routing = random_routing(9, 5, 2, generator)
    tokens = torch.randn(9, WIDTH, generator=generator).to(dtype)
    packed = random_experts(5, dtype=dtype)
    # Row by row: a GEMM of 16-bit numbers may round a row otherwise in other company.
    parts = own_tokens(SlotMap(5, ((4, 0), (1,), (3, 2))), packed, tokens, routing, [4, 0, 5], "naive")
    assert torch.equal(torch.cat([output for output, _ in parts]), on_one(packed, tokens, routing, "naive"))


@pytest.mark.parametrize("kind", [AllToAllExchange, AllReduceExchange, LocalExchange])
def test_one_host_synchronisation_a_layer(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronising = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__")
    calls: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        original = getattr(torch.Tensor, name)

        def call(self: Tensor, *arguments: object, **options: object) -> object:
            calls.append(name)
            return original(self, *arguments, **options)

        return call

    held = SlotMap(5, ((3, 1, 0, 4, 2),))
    routing = random_routing(6, 5, 2, torch.Generator().manual_seed(1))

    def body(ranks: FakeRanks) -> list[str]:
        exchange = LocalExchange(5) if kind is LocalExchange else kind(ranks, held)
        layer = dynamic_layer(random_experts(5), held.by_rank[0], exchange, 5, "loop")
        with torch.no_grad(), monkeypatch.context() as patch:
            for name in synchronising:
                patch.setattr(torch.Tensor, name, counted(name))
            layer.apply(torch.randn(6, WIDTH), routing)
        return calls

    assert run_ranks(1, body) == [["tolist"]]


def test_on_the_chosen_device(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    routing = random_routing(12, 6, 2, generator, padding=0.2)
    tokens = torch.randn(12, WIDTH, generator=generator)
    packed = random_experts(6)
    expected = on_one(packed, tokens, routing)
    there = moved(routing, device)
    on_device = packed_on(packed, device)
    slot_map = SlotMap(6, ((5, 0, 3), (1, 2, 4)))
    parts = own_tokens(slot_map, on_device, tokens.to(device), there, [7, 5], "loop")
    assert_close_relative(torch.cat([output for output, _ in parts]).cpu(), expected)
    for output, _ in same_tokens(slot_map, on_device, tokens.to(device), there):
        assert_close_relative(output.cpu(), expected)


def test_a_placement_for_another_number_of_ranks_is_refused() -> None:
    for kind in (AllToAllExchange, AllReduceExchange):
        with pytest.raises(OptionError, match="'placement': is for 3 ranks, but 2 share the experts"):
            run_ranks(2, lambda ranks, kind=kind: kind(ranks, SlotMap.contiguous(6, 3)))


def test_static_gating_needs_equal_parts() -> None:
    with pytest.raises(OptionError, match="2 ranks cannot share 7 experts; use 'dynamic'"):
        run_ranks(2, lambda ranks: PaddedAllToAllExchange(ranks, 7))


@pytest.mark.parametrize("kind", [AllToAllExchange, AllReduceExchange])
@pytest.mark.parametrize("through", ["tokens", "weights"])
def test_gradients_between_ranks_are_refused(kind: type, through: str) -> None:
    packed = random_experts(2)
    packed.fc1_weight.requires_grad_(through == "weights")
    tokens = torch.randn(2, WIDTH, requires_grad=through == "tokens")
    routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    with pytest.raises(ParallelError, match="gradients do not flow between ranks"):
        run_ranks(
            2,
            lambda ranks: dynamic_layer(packed, [ranks.rank], kind(ranks, SlotMap.contiguous(2, 2)), 2).apply(
                tokens, routing
            ),
        )


def test_the_first_rank_that_fails_is_the_one_reported() -> None:
    def body(ranks: Collectives) -> None:
        if ranks.rank == 1:
            raise MemoryError("no room")
        ranks.maximum(1)

    with pytest.raises(MemoryError, match="no room"):
        run_ranks(3, body)


def test_fake_ranks_check_that_both_ends_agree() -> None:
    def body(ranks: Collectives) -> None:
        ranks.all_to_all(torch.empty(2, 1), torch.ones(2, 1), [1, 1], [0, 2] if ranks.rank else [1, 1])

    with pytest.raises(ParallelError, match="rank 1 sends"):
        run_ranks(2, body)


def test_copied_counters_stay_those_of_their_exchange() -> None:
    counters = ExchangeCounters("all-to-all", 1, 2, 3)
    counters.add_rows((1, 0, 2))
    layer = LayerCounters("a", "encoder", 6, exchange=counters)
    for again, own in (copy.deepcopy((layer, counters)), pickle.loads(pickle.dumps((layer, counters)))):
        assert again.exchange is own
        assert own.snapshot() == ExchangeReport("all-to-all", 1, 2, again.snapshot().exchange.traffic, (0, 0, 0))


def test_the_composition_root_checks_the_store_against_the_exchange() -> None:
    spec = LayerSpec("layer.3", "decoder", SoftmaxTopKRouter(6, 2))
    store = ResidentPackedExperts(random_experts(4))

    def build(ranks: FakeRanks, held: SlotMap, options: MoEOptions) -> MoELayer:
        exchange, padded = AllToAllExchange(ranks, held), PaddedAllToAllExchange(ranks, 6)
        return build_layer(spec, options, torch.nn.Identity(), store, exchange=exchange, padded_exchange=padded)

    uneven = SlotMap(6, ((0, 1, 2, 3), (2, 3, 4, 5)))
    layers = run_ranks(2, lambda ranks: build(ranks, uneven, MoEOptions()))
    assert [layer.counters.snapshot().exchange.rank for layer in layers] == [0, 1]
    message = r"layer.3 routes to 6 experts, 3 of them on this rank, but has 4"
    with pytest.raises(OptionError, match=message):
        run_ranks(2, lambda ranks: build(ranks, SlotMap.contiguous(6, 2), MoEOptions()))
    with pytest.raises(OptionError, match=message):
        run_ranks(2, lambda ranks: build(ranks, uneven, MoEOptions(gating="static")))
    with pytest.raises(OptionError, match=r"layer.3 routes to 6 experts but has 4"):
        build_layer(spec, MoEOptions(), torch.nn.Identity(), store)


def test_experts_are_taken_in_slot_order() -> None:
    packed = random_experts(4)
    assert torch.equal(experts_of(packed, (3, 1)).fc1_weight, packed.fc1_weight[[3, 1]])
