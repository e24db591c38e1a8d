"""Ranks that take turns: every stack is run by those that want it while the others take part, until all are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq_moe_opt.models._turns import Turns
from fairseq_moe_opt.parallel import Collectives, run_ranks

ENCODER, DECODER = 0, 1


@dataclass
class Layer:
    """Writes down when it takes part; every run of it meets all ranks, as an exchange does."""

    name: int
    ranks: Collectives
    log: list[tuple[int, bool]] = field(default_factory=list)

    def take_part(self) -> None:
        self.met(own=False)

    def met(self, own: bool) -> None:
        self.log.append((self.name, own))
        names = self.ranks.gather_objects(self.name)
        assert set(names) == {self.name}, "ranks are in different layers"


def runs(ranks: Collectives, wanted: Sequence[Sequence[int]]) -> list[tuple[int, bool]]:
    """What a rank went through that wants to run these stacks, one after the other."""
    log: list[tuple[int, bool]] = []
    layers = [Layer(name, ranks, log) for name in (ENCODER, DECODER)]
    turns = Turns(ranks)
    before = [turns.enter([layer]) for layer in layers]
    for stack in wanted[ranks.rank]:
        before[stack]()
        layers[stack].met(own=True)
    turns.finish()
    return log


def test_who_has_a_batch_left_begins_it_while_others_wait_and_nobody_runs_alone() -> None:
    # Rank 0 has two short batches, rank 1 a long one, rank 2 nothing at all.
    wanted = [[ENCODER, DECODER, ENCODER, DECODER], [ENCODER, DECODER, DECODER, DECODER], []]
    first, second, third = run_ranks(3, lambda ranks: runs(ranks, wanted))
    assert first == [(ENCODER, True), (DECODER, True), (ENCODER, True), (DECODER, True), (DECODER, False)]
    assert second == [(ENCODER, True), (DECODER, True), (ENCODER, False), (DECODER, True), (DECODER, True)]
    assert third == [(name, False) for name, _ in first]


def test_waiting_lets_others_run_and_says_whether_any_did() -> None:
    def body(ranks: Collectives) -> list[bool]:
        log: list[tuple[int, bool]] = []
        layer = Layer(DECODER, ranks, log)
        turns = Turns(ranks)
        take = turns.enter([layer])
        if ranks.rank == 0:
            waits = [turns.wait(), turns.wait()]
            turns.finish()
            return waits
        take()
        layer.met(own=True)
        turns.finish()
        return [own for _, own in log]

    assert run_ranks(2, body) == [[True, False], [True]]


def test_dense_models_take_no_turns() -> None:
    assert run_ranks(2, lambda ranks: (Turns(ranks).wait(), Turns(ranks).finish())) == [(False, None)] * 2
