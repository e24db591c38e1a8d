"""Traces from the command line: recorded from text, and placed by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit, read_trace, write_trace
from fairseq_moe_opt.placement import Cluster, evaluate, history_of, place, read_placement
from tests.cli.conftest import LANGUAGES, Run

LINES = ["a cat", "the dog sat.", "", "one more"] * 4
BALANCED = ("--ranks", 2, "--strategy", "balanced")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Two layers of 8 experts; neighbours are hot together, one pair in a step."""
    layers = (TraceLayer("encoder.1.ffn", "encoder", 8), TraceLayer("decoder.1.ffn", "decoder", 8))
    visits = []
    for step in range(12):
        pair = 2 * (step % 4)
        visits.append(TraceVisit("encoder.1.ffn", tuple(range(8)), 16, (1, 2, 3, 4, 5, 6, 7, 4)))
        visits += [TraceVisit("decoder.1.ffn", (pair, pair + 1), 4, (5, 3))] * 3
    return Trace(layers, tuple(visits))


@pytest.fixture
def trace_file(trace: Trace, tmp_path: Path) -> Path:
    write_trace(trace, tmp_path / "trace.json")
    return tmp_path / "trace.json"


def test_a_trace_counts_every_routed_row(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    report, target = tmp_path / "report.json", tmp_path / "trace.json"
    plain = run("translate", checkpoint, text, *LANGUAGES, "--moe-report", report)
    assert plain.code == 0, plain.err
    done = run("trace", checkpoint, text, "-o", target, *LANGUAGES)
    assert done.code == 0, done.err
    found = read_trace(target)
    assert f"{len(found.visits):,} forwards" in done.out and found.fingerprint in done.out
    layers = {layer["name"]: layer for layer in json.loads(report.read_text())["layers"]}
    for name, layer in layers.items():
        visits = [visit for visit in found.visits if visit.layer == name]
        # Padding is among the tokens but not among the rows.
        assert sum(sum(visit.counts) for visit in visits) == sum(layer["expert_rows"])
        assert sum(visit.tokens for visit in visits) == layer["tokens"]
    assert all(not visit.choices for visit in found.visits)


def test_a_trace_goes_on_over_languages_and_keeps_choices(
    run: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    one, both = tmp_path / "one.json", tmp_path / "both.json"
    budget = ("--moe-expert-memory", "50%")
    assert run("trace", checkpoint, text, "-o", one, *LANGUAGES, "--num-beams", 1, "--batch-size", 4).code == 0
    more = ("--tgt-lang", "deu_Latn", "--num-beams", 1, "--batch-size", 4, "--choices", *budget)
    done = run("trace", checkpoint, text, "-o", both, *LANGUAGES, *more)
    assert done.code == 0, done.err
    first, found = read_trace(one), read_trace(both)
    assert len(found.visits) > len(first.visits)
    assert [(v.experts, v.counts) for v in found.visits[: len(first.visits)]] == [
        (v.experts, v.counts) for v in first.visits
    ]
    for visit in found.visits:
        chosen = np.bincount([expert for token in visit.choices for expert in token], minlength=8)
        assert {e: int(chosen[e]) for e in np.flatnonzero(chosen)} == dict(
            zip(visit.experts, visit.counts, strict=True)
        )


def test_what_cannot_be_traced_is_one_line(run: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    target = ("-o", tmp_path / "t.json")
    assert "Missing option" in run("trace", checkpoint, text, *LANGUAGES).error_line
    both = run("trace", checkpoint, "-", *target, *LANGUAGES, "--tgt-lang", "deu_Latn")
    assert "standard input can be read once" in both.error_line
    assert "xyz_Latn" in run("trace", checkpoint, text, *target, *LANGUAGES, "--tgt-lang", "xyz_Latn").error_line
    (tmp_path / "empty").write_text("\n\n")
    assert "has no line to translate" in run("trace", checkpoint, tmp_path / "empty", *target, *LANGUAGES).error_line
    assert not (tmp_path / "t.json").exists()


def test_the_table_is_the_papers_protocol(run: Run, trace: Trace, trace_file: Path) -> None:
    done = run("place", trace_file, *BALANCED, "--json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert content["row_bytes"] is None and content["fingerprint"] == trace.fingerprint
    first, second = history_of(trace).halves()
    for score in content["scores"]:
        if score["strategy"] == "lower bound":
            continue
        balance = evaluate(place(first, Cluster.even(2, 8), score["strategy"]), second)
        (name,) = (layer.name for layer in trace.layers if layer.phase == score["phase"])
        assert score["avg_max_load"] == pytest.approx(balance[name].avg_max_load)
        assert score["max_load"] == pytest.approx(balance[name].max_load)
    loads = {(score["phase"], score["strategy"]): score["avg_max_load"] for score in content["scores"]}
    assert loads["decoder", "contiguous"] == 1.0  # a pair is on one rank, which gets all of 8 rows
    assert loads["decoder", "balanced"] == loads["decoder", "lower bound"] == 5 / 8
    # Of 8 rows, 4 of each rank's own: the busiest gets 8, all from or to the other rank, twice.
    sent = {(score["phase"], score["strategy"]): score["busiest_rank"] for score in content["scores"]}
    assert sent["decoder", "contiguous"] == 2 * (4 + 0)
    assert sent["decoder", "balanced"] == 2 * (5 / 2 + 3 / 2)


def test_a_placement_is_written_by_the_whole_trace(run: Run, trace: Trace, trace_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "placement.json"
    done = run("place", trace_file, *BALANCED, "--spare-slots", 2, "-o", target)
    assert done.code == 0
    assert "by all 36 steps of the trace" in done.err
    assert all(
        word in done.out for word in ("balanced *", "lower bound", "encoder: 2 ranks and 2 spare slots", "0.5000")
    )
    cluster = Cluster.even(2, 8, spare_slots=2)
    expected = place(history_of(trace), cluster, "balanced", fingerprint=trace.fingerprint)
    assert read_placement(target, fingerprint=trace.fingerprint, num_ranks=2) == expected


def test_misses_of_ranks_are_shown(run: Run, trace_file: Path) -> None:
    scores = json.loads(run("place", trace_file, *BALANCED, "--slots", 1, "--json").out)["scores"]
    misses = {score["strategy"]: score["misses"] for score in scores if score["phase"] == "decoder"}
    assert set(misses["balanced"]) == {"lifo", "reuse", "belady"}
    # A pair on one rank drives itself out of its one slot, within each of its three steps: 2, 1 and 1 misses of 6.
    assert misses["contiguous"]["lifo"]["overall"] == pytest.approx((2 + 1 + 1) / 6)
    # Alone on its rank, an expert misses in the first of the three.
    assert misses["balanced"]["lifo"] == {"worst": pytest.approx(1 / 3), "overall": pytest.approx(1 / 3)}
    assert "1 experts a layer in each rank's cache" in run("place", trace_file, *BALANCED, "--slots", 1).out


def test_a_checkpoint_gives_bytes_and_is_compared(run: Run, checkpoint: Path, text: Path, trace_file: Path) -> None:
    target = trace_file.with_name("recorded.json")
    assert run("trace", checkpoint, text, "-o", target, *LANGUAGES, "--batch-size", 2).code == 0
    rows, counted = (
        json.loads(run("place", target, *BALANCED, *more, "--json").out) for more in ((), ("--checkpoint", checkpoint))
    )
    assert counted["row_bytes"] == 32 * 4
    assert counted["scores"][0]["busiest_rank"] == pytest.approx(128 * rows["scores"][0]["busiest_rank"])
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
    assert "recorded from another model" in run("place", target, *BALANCED, "--checkpoint", demo).error_line


def test_a_plot_states_the_finding(run: Run, trace_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fairseq_moe_opt.cli.placing import PlaceJob, compare
    from fairseq_moe_opt.cli.placing_output import finding

    plot = tmp_path / "loads.png"
    assert run("place", trace_file, *BALANCED, "--plot", plot).code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = compare(PlaceJob(trace_file, 2, "balanced"))
    assert (
        finding(found, "decoder")
        == "decoder: balanced gives the busiest of 2 ranks 62.5 % of a step's rows, contiguous 100.0 %"
    )


def test_without_matplotlib_a_plot_says_what_to_install(
    run: Run, trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("place", trace_file, *BALANCED, "--plot", tmp_path / "loads.png")
    assert (done.code, done.error_line) == (
        2,
        "moe-opt: --plot needs matplotlib: pip install 'fairseq-moe-opt[plots]'",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", 2, "--strategy", "best"), "'best' is not one of contiguous, greedy"),
        (("--ranks", 3, "--nodes", 2), "must divide the 3 ranks; got 2"),
        (("--ranks", 2, "--spare-slots", 9), "must be 0 to 8"),
        ((), "Missing option '--ranks'"),
    ],
)
def test_wrong_options_are_one_line(run: Run, trace_file: Path, arguments: tuple[object, ...], message: str) -> None:
    assert message in run("place", trace_file, *arguments).error_line


def test_a_trace_that_cannot_place_says_why(run: Run, trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(Trace(trace.layers, (TraceVisit("encoder.1.ffn", (1,)),)), path)
    assert "not how many rows they got: record it anew" in run("place", path, *BALANCED).error_line
    write_trace(Trace(trace.layers, trace.visits[:4]), path)
    assert "both halves of every layer's steps must have some" in run("place", path, *BALANCED).error_line


def test_exact_is_left_out_with_its_reason_where_it_takes_too_long(run: Run, tmp_path: Path) -> None:
    visits = [TraceVisit("a", tuple(range(64)), 64, (1,) * 63 + (step,)) for step in range(1, 5)]
    write_trace(Trace((TraceLayer("a", "decoder", 64),), tuple(visits)), tmp_path / "trace.json")
    done = run("place", tmp_path / "trace.json", "--ranks", 8)
    assert done.code == 0
    assert "exact is left out: option 'strategy': 'exact' takes up to 256 experts times ranks" in " ".join(
        done.out.split()
    )
