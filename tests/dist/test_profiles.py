"""Profiles of several processes: each in a folder of its own, with what that process computed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fairseq_moe_opt.moe.trace import read_trace
from fairseq_moe_opt.parallel import ProcessGroupRanks, own_file, own_folder, own_number
from hf_integration import ExpertParallel, from_pretrained
from tests.helpers.ranks import start_ranks, values_of
from tests.helpers.switch import batch, greedy, tiny_switch

pytestmark = pytest.mark.dist


def profiled(folder: str, profiles: str) -> int | None:
    """Three sentences on the second rank, one on the first; the process's number without being told of ranks."""
    ranks = ProcessGroupRanks()
    model = from_pretrained(folder, parallel=ExpertParallel(ranks), profile=profiles)
    rows = slice(2 * ranks.rank + 1)
    for _ in range(2):  # the second of each phase is recorded instead of timed
        greedy(model, {name: value[rows] for name, value in batch().items()})
    model.moe.undo()
    return own_number(None)


def test_ranks_write_a_folder_each(tmp_path: Path) -> None:
    tiny_switch().save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "model"), str(tmp_path / "profile"))
    assert values_of(start_ranks(2, profiled, *arguments, timeout=60.0, deadline=120.0)) == [0, 1]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-0", "rank-1"]
    traces = [read_trace(tmp_path / "profile" / f"rank-{rank}" / "trace-all-calls.json") for rank in range(2)]
    # One sentence on the first rank, three on the second, of 12 tokens with padding, which goes to experts here.
    assert [{sum(visit.counts) for visit in trace.phase("encoder")} for trace in traces] == [{12}, {36}]
    assert all((tmp_path / "profile" / f"rank-{rank}" / "index.html").is_file() for rank in range(2))


def test_a_process_alone_writes_where_it_is_told() -> None:
    assert own_number(None) is None
    assert own_file("out/report.json", None) == Path("out/report.json") and own_folder("out", None) == Path("out")
    assert own_file("out/report.json", 3) == Path("out/report.rank-3.json")
    assert own_folder("out/v1.2", 3) == Path("out/v1.2/rank-3")
