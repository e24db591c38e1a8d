"""Waiting for a late rank is told from exchanging, and nothing is timed where nobody asked."""

from __future__ import annotations

import time

import torch

from fairseq_moe_opt.parallel import Collectives, TimedRanks, run_ranks

LATE = 0.2


def everything(ranks: Collectives) -> list[object]:
    """One of each collective; what came of it."""
    sent = torch.arange(4.0).view(4, 1) + 10 * ranks.rank
    received = torch.empty(4, 1)
    ranks.all_to_all(received, sent).wait()
    total = torch.full((2,), float(ranks.rank + 1))
    ranks.add_up(total)
    return [received.flatten().tolist(), total.tolist(), ranks.maximum(ranks.rank), ranks.gather_objects(ranks.rank)]


def timed(ranks: Collectives) -> tuple[list[object], list[object], tuple[float, float], tuple[float, float]]:
    plain, measured = everything(ranks), TimedRanks(ranks)
    assert (measured.rank, measured.size) == (ranks.rank, ranks.size)
    off = everything(measured)
    before = measured.waiting, measured.exchanging
    measured.is_on = True
    if ranks.rank == 1:
        time.sleep(LATE)
    on = everything(measured)
    after = measured.waiting, measured.exchanging
    measured.reset()
    assert (measured.waiting, measured.exchanging) == (0.0, 0.0)
    assert plain == off
    return plain, on, before, after


def test_waiting_and_exchanging() -> None:
    punctual, late = run_ranks(2, timed)
    for plain, on, before, (waiting, exchanging) in (punctual, late):
        assert on == plain
        assert before == (0.0, 0.0)
        assert exchanging > 0 and waiting > 0
    assert punctual[0] == [[0.0, 1.0, 10.0, 11.0], [3.0, 3.0], 1, [0, 1]]
    # The punctual one waits for the other, and its exchanges take no longer for that.
    assert punctual[3][0] > LATE / 2 > punctual[3][1]
    assert late[3][0] < punctual[3][0]
