"""What ranks compare at the start, and who is blamed when a collective fails."""

from __future__ import annotations

import pytest

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.parallel import FakeRanks, agree, follow_first, run_ranks
from fairseq_moe_opt.parallel.agreement import disagreements
from fairseq_moe_opt.parallel.roll_call import RollCall, verdict


def test_ranks_that_agree_go_on() -> None:
    assert run_ranks(3, lambda ranks: agree(ranks, {"checkpoint": "a1", "kernel": "loop"})) == [None] * 3


def test_every_rank_is_told_who_differs_and_in_what() -> None:
    def body(ranks: FakeRanks) -> str:
        with pytest.raises(ParallelError) as caught:
            agree(ranks, {"checkpoint": "b2" if ranks.rank == 2 else "a1", "kernel": "loop"})
        return str(caught.value)

    messages = run_ranks(3, body)
    assert set(messages) == {
        "ranks were not started alike: checkpoint: rank 2 has b2, rank 0 has a1. Start all of them with the same"
    }


def test_the_majority_is_taken_as_meant_and_rank_0_among_equals() -> None:
    assert list(disagreements([{"x": "b"}, {"x": "a"}, {"x": "a"}])) == ["x: rank 0 has b, rank 1 has a"]
    assert list(disagreements([{"x": "b"}, {"x": "a"}])) == ["x: rank 1 has a, rank 0 has b"]


def test_a_fact_that_one_rank_lacks_differs() -> None:
    assert list(disagreements([{"x": "a", "placement": "p"}, {"x": "a"}])) == [
        "placement: rank 1 has none, rank 0 has p"
    ]


def test_long_values_are_cut() -> None:
    (found,) = disagreements([{"options": "o" * 200}, {"options": "o" * 199}])
    assert len(found) < 160 and "ooo..." in found


def test_all_follow_rank_0() -> None:
    kernels = ("loop", "grouped_mm", "naive")
    assert run_ranks(3, lambda ranks: follow_first(ranks, kernels[ranks.rank])) == ["loop"] * 3


class Board:
    """A store in one process; one that is ``broken`` raises as torch's do."""

    def __init__(self, broken: bool = False) -> None:
        self.notes: dict[str, str] = {}
        self.broken = broken

    def set(self, key: str, value: str, /) -> None:
        if self.broken:
            raise RuntimeError("connection refused")
        self.notes[key] = value

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.notes for key in keys)

    def get(self, key: str, /) -> bytes:
        return self.notes[key].encode()


def call(board: Board, rank: int) -> RollCall:
    return RollCall(board, "0", rank, 3, patience=0.2)


def test_ranks_that_do_not_sign_are_missing() -> None:
    board = Board()
    assert set(call(board, 0).answers()) == {0}
    assert set(call(board, 2).answers()) == {0, 2}
    assert verdict(call(board, 2).answers(), [4, 5, 6]) == "no answer from rank 5 (dead or hanging)"


def test_a_rank_that_leaves_says_why() -> None:
    board = Board()
    call(board, 1).leave("MemoryError: no room")
    notes = call(board, 0).answers()
    assert verdict(notes, [0, 1, 2]) == "rank 1 stopped (MemoryError: no room)"


def test_a_store_that_is_gone_is_said_to_be() -> None:
    board = Board(broken=True)
    call(board, 1).leave("nobody hears this")
    assert "common store does not answer" in verdict(call(board, 0).answers(), [0, 1, 2])


def test_nobody_is_blamed_when_all_answer() -> None:
    assert verdict({0: "waiting", 1: "waiting"}, [0, 1]) == ""


def test_several_that_are_silent_are_all_named() -> None:
    assert verdict({1: "waiting"}, [0, 1, 2]) == "no answer from rank 0, rank 2 (dead or hanging)"


def test_a_reason_is_believed_though_the_store_fails_afterwards() -> None:
    board = Board()
    call(board, 0).leave("MemoryError: no room")
    read, waiter = board.get, call(board, 2)

    def read_once(key: str, /) -> bytes:
        board.check = fail  # type: ignore[method-assign,assignment]
        return read(key)

    def fail(keys: list[str], /) -> bool:
        raise RuntimeError("connection reset")

    board.get = read_once  # type: ignore[method-assign]
    assert verdict(waiter.answers(), [0, 1, 2]) == "rank 0 stopped (MemoryError: no room)"
