"""Traces: recorded as routed, the same after writing and reading, and refused when they are anything else."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe import Routing
from fairseq_moe_opt.moe.dispatch import plan
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceRecorder, TraceVisit, check_trace, read_trace, write_trace
from fairseq_moe_opt.moe.types import Dispatch, ExpertKey

LAYERS = (TraceLayer("enc", "encoder", 4), TraceLayer("dec", "decoder", 3))
TRACE = Trace(
    LAYERS,
    (
        TraceVisit("enc", (0, 2, 3), 3, (1, 1, 2)),
        TraceVisit("dec", (1,), 1, (1,)),
        TraceVisit("dec", (1, 2), 1, (1, 1)),
    ),
)


def observe(recorder: TraceRecorder, layer: str, experts: list[list[int]], num_experts: int) -> None:
    index = torch.tensor(experts)
    routing = Routing(index, torch.ones(index.shape), num_experts)
    recorder.observe(layer, routing, plan(routing))


def test_a_recorder_keeps_what_each_forward_needs() -> None:
    recorder = TraceRecorder(LAYERS, limit=3)
    observe(recorder, "enc", [[3, 0], [2, 4], [3, 4]], 4)  # 4 is a choice that is not computed
    observe(recorder, "dec", [[3, 3]], 3)  # nothing routed
    observe(recorder, "dec", [[1, 3]], 3)
    observe(recorder, "dec", [[2, 1]], 3)
    observe(recorder, "dec", [[0, 1]], 3)  # past the limit
    assert recorder.trace() == TRACE


def test_choices_of_tokens_are_kept_on_request_up_to_a_limit(tmp_path: Path) -> None:
    recorder = TraceRecorder(LAYERS, choices_limit=6)
    observe(recorder, "enc", [[3, 0], [4, 4], [2, 4]], 4)  # a token of padding, and a second choice not computed
    observe(recorder, "dec", [[1, 2]], 3)  # past the limit
    first, second = recorder.trace().visits
    assert first == TraceVisit("enc", (0, 2, 3), 3, (1, 1, 1), ((3, 0), (2,)))
    assert (second.counts, second.choices) == ((1, 1), ())
    write_trace(recorder.trace(), tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == recorder.trace()


def test_observing_waits_for_nothing() -> None:
    index = torch.empty(3, 2, dtype=torch.int64, device="meta")  # reading a value of it would raise
    recorder = TraceRecorder(LAYERS, choices_limit=100)
    plan_on_host = Dispatch(index, index, (2, 0, 1, 3))
    recorder.observe("enc", Routing(index, index, 4), plan_on_host)
    with pytest.raises(NotImplementedError):
        recorder.trace()


def test_a_copied_recorder_starts_anew_with_the_same_limits() -> None:
    recorder = TraceRecorder(LAYERS, limit=1, choices_limit=6)
    observe(recorder, "enc", [[0, 1]], 4)
    for copied in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert copied.trace() == Trace(LAYERS, ())
        observe(copied, "dec", [[1, 2]], 3)
        observe(copied, "dec", [[1, 2]], 3)
        assert copied.trace().visits == (TraceVisit("dec", (1, 2), 1, (1, 1), ((1, 2),)),)


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    old = {"format": 1, "layers": [vars(LAYERS[1])], "visits": [[0, 5, [0, 2]]]}
    (tmp_path / "trace.json").write_text(json.dumps(old))
    assert read_trace(tmp_path / "trace.json").visits == (TraceVisit("dec", (0, 2), 5),)


def test_reads_what_it_writes(tmp_path: Path) -> None:
    write_trace(TRACE, tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == TRACE
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]
    assert TRACE.phase("decoder") == TRACE.visits[1:]
    assert TRACE.hottest()[0] == ExpertKey("dec", 1)


BAD = {
    "nothing": (None, "cannot be read: No such file"),
    "text": ("hello", "is not a trace"),
    "another object": ("{}", "is not a trace: KeyError 'format'"),
    "a later format": ('{"format": 3}', "is a trace of format 3, this is for format 2"),
    "an unknown layer": (
        json.dumps({"format": 1, "layers": [], "visits": [[0, 1, [1]]]}),
        "is not a trace: IndexError",
    ),
    "an unknown expert": (
        json.dumps({"format": 1, "layers": [vars(LAYERS[0])], "visits": [[0, 1, [4]]]}),
        "enc has 4 experts, but a visit names others",
    ),
    "experts out of order": (
        json.dumps({"format": 2, "layers": [vars(LAYERS[0])], "visits": [[0, 1, [2, 1], [1, 1]]]}),
        "enc: the experts of a visit do not ascend",
    ),
    "a count too few": (
        json.dumps({"format": 2, "layers": [vars(LAYERS[0])], "visits": [[0, 1, [1, 2], [1]]]}),
        r"enc: a visit needs 2 experts, but its counts are \[1\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    if content is not None:
        (tmp_path / "trace.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"trace\.json: .*{message}"):
        read_trace(tmp_path / "trace.json")


def test_a_trace_of_another_model_is_refused() -> None:
    check_trace(TRACE, LAYERS, "trace.json")
    with pytest.raises(CheckpointError, match=r"trace\.json: was recorded from another model"):
        check_trace(TRACE, LAYERS[:1], "trace.json")
