"""Load histories: normalisation, halves, files, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit
from fairseq_moe_opt.placement import LoadHistory, history_of, read_history


def history(*rows: list[int]) -> LoadHistory:
    return LoadHistory({"a": np.array(rows, dtype=np.int64)})


def test_shares_are_of_the_batch() -> None:
    np.testing.assert_array_equal(history([1, 3], [5, 0]).shares("a"), [[0.25, 0.75], [1.0, 0.0]])


def test_empty_batches_say_nothing() -> None:
    np.testing.assert_array_equal(history([0, 0], [1, 1], [0, 0]).shares("a"), [[0.5, 0.5]])


def test_halves_split_by_batches_and_the_odd_one_tests() -> None:
    first, second = history([1, 0], [2, 0], [3, 0], [4, 0], [5, 0]).halves()
    assert first.layers["a"].tolist() == [[1, 0], [2, 0]]
    assert second.layers["a"].tolist() == [[3, 0], [4, 0], [5, 0]]


def test_a_half_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match="layer 'a': not one row was routed in its 1 batches"):
        history([0, 0], [1, 0]).halves()
    with pytest.raises(InputError, match="in its 0 batches"):
        history([1, 0]).halves()


def test_counts_are_copied_and_read_only() -> None:
    counts = np.ones((2, 2), dtype=np.int64)
    kept = LoadHistory({"a": counts})
    counts[0, 0] = 7
    assert kept.layers["a"][0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        kept.layers["a"][0, 0] = 7


def test_histories_can_be_sent() -> None:
    sent = pickle.loads(pickle.dumps(history([1, 3])))
    assert sent.layers["a"].tolist() == [[1, 3]]
    assert not sent.layers["a"].flags.writeable


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "at least one layer"),
        ({"a": np.ones(3, dtype=np.int64)}, r"layer 'a': counts must be \(batches, experts\); got the shape \(3,\)"),
        ({"a": np.ones((2, 2))}, "layer 'a': counts must be whole numbers, 0 or more; got float64"),
        ({"a": np.array([[1, -1]])}, "layer 'a': counts must be whole numbers, 0 or more"),
        ({"a": np.ones((2, 0), dtype=np.int64)}, r"got the shape \(2, 0\)"),
        ({"a": np.ones((1, 2), dtype=int), "b": np.ones((1, 3), dtype=int)}, "one number of experts; got"),
    ],
)
def test_what_is_no_history(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoadHistory(layers)


def test_files_of_counts_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **{"encoder.3": np.array([[1, 2]]), "decoder.3": np.array([[3, 0], [0, 4]])})
    read = read_history(tmp_path / "t.npz")
    assert {name: counts.tolist() for name, counts in read.layers.items()} == {
        "encoder.3": [[1, 2]],
        "decoder.3": [[3, 0], [0, 4]],
    }
    assert read.num_experts == 2


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    np.save(tmp_path / "one.npy", np.ones((2, 2)))
    np.savez(tmp_path / "float.npz", a=np.ones((2, 2)))
    np.savez(tmp_path / "objects.npz", a=np.array([[None, {}]]))
    for name in ("missing.npz", "text.npz", "one.npy", "float.npz", "objects.npz"):
        with pytest.raises(InputError, match=name):
            read_history(tmp_path / name)


ENCODER, DECODER = TraceLayer("enc", "encoder", 3), TraceLayer("dec", "decoder", 3)
VISITS = (
    TraceVisit("enc", (0, 2), 9, (5, 1)),
    TraceVisit("dec", (1,), 2, (2,)),
    TraceVisit("dec", (0, 1), 2, (1, 1)),
)


def test_a_layers_visits_in_a_trace_are_its_batches() -> None:
    found = history_of(Trace((ENCODER, DECODER), VISITS))
    assert {name: counts.tolist() for name, counts in found.layers.items()} == {
        "enc": [[5, 0, 1]],
        "dec": [[0, 2, 0], [1, 1, 0]],
    }
    assert list(history_of(Trace((ENCODER, DECODER), VISITS), "decoder").layers) == ["dec"]


@pytest.mark.parametrize(
    ("trace", "phase", "message"),
    [
        (Trace((DECODER,), (TraceVisit("dec", (1,)),)), None, "not how many rows they got: record it anew"),
        (Trace((DECODER,), VISITS[1:]), "encoder", "needs at least one layer"),
        (Trace((ENCODER, DECODER), VISITS[1:]), None, "layer 'enc': not one row was routed in its 0 batches"),
        (Trace((TraceLayer("enc", "encoder", 4), DECODER), VISITS), None, "needs one number of experts"),
    ],
)
def test_a_trace_that_is_no_history(trace: Trace, phase: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        history_of(trace, phase)
