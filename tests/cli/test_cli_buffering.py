"""Buffered experts from the command line: translate, info, verify, cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import LANGUAGES, Run

SLOT_BYTES = (32 * 64 + 64 + 64 * 32 + 32) * 4
NLLB_54B = Path(__file__).resolve().parents[1] / "data" / "nllb_54b"


@pytest.fixture(scope="module")
def trace(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hf_integration import from_pretrained
    from hf_integration.translate import load_tokenizer, translate_lines

    path = tmp_path_factory.mktemp("trace") / "trace.json"
    model = from_pretrained(checkpoint, trace=str(path))
    tokenizer = load_tokenizer(checkpoint)
    list(translate_lines(model, tokenizer, ["a cat", "the dog sat."] * 8, "eng_Latn", "fra_Latn", batch_size=2))
    return path


def test_a_buffered_translation_is_the_same(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = b"a cat\nthe dog sat.\n"
    plain = run("translate", checkpoint, *LANGUAGES, stdin=text)
    report = tmp_path / "report.json"
    budget = ("--moe-expert-memory", "25%", "--moe-eviction", "lifo", "--moe-expert-pool", "layer")
    done = run("translate", checkpoint, *LANGUAGES, *budget, "--moe-report", report, stdin=text)
    assert (done.code, done.out) == (0, plain.out), done.err
    content = json.loads(report.read_text())
    assert (content["buffer"]["policy"], content["buffer"]["pool"], content["buffer"]["slots"]) == ("lifo", "layer", 4)


def test_a_trace_is_recorded_and_warms(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text, trace = b"a cat\nthe dog sat.\n", tmp_path / "trace.json"
    plain = run("translate", checkpoint, *LANGUAGES, "--moe-trace", trace, stdin=text)
    assert plain.code == 0 and len(json.loads(trace.read_text())["visits"]) > 2
    warm = run("translate", checkpoint, *LANGUAGES, "--moe-expert-memory", "50%", "--moe-warm-start", trace, stdin=text)
    assert (warm.code, warm.out) == (0, plain.out), warm.err


def test_verify_counts_a_buffered_run(run: Run, checkpoint: Path) -> None:
    done = run("verify", checkpoint, "--moe-expert-memory", "25%")
    assert done.code == 0, done.err
    assert any(line.strip().startswith("buffered, 25%") and "agrees" in line for line in done.out.splitlines())


def test_wrong_options_are_one_line(run: Run, checkpoint: Path) -> None:
    assert (
        "no effect with expert_memory='all'"
        in run("translate", checkpoint, *LANGUAGES, "--moe-eviction", "lru", stdin=b"a\n").error_line
    )
    assert f"smallest possible is {SLOT_BYTES} bytes" in run("info", checkpoint, "--expert-memory", "1KiB").error_line
    assert "without --expert-memory" in run("info", checkpoint, "--trace", "x.json").error_line


def test_info_says_what_will_be_resident(run: Run, checkpoint: Path, trace: Path) -> None:
    done = run("info", checkpoint, "--expert-memory", "25%")
    assert f"4 of 16 resident (25%), 16.4 KiB each; the smallest possible is {SLOT_BYTES} bytes" in done.out
    content = json.loads(run("info", checkpoint, "--expert-memory", "25%", "--trace", trace, "--json").out)["buffer"]
    assert (content["slots"], content["experts"], content["nbytes"]) == (4, 16, 4 * SLOT_BYTES)
    assert 0 < content["miss_rate"] < 1
    # At most two experts a token are asked for in the one sparse layer of the decoder.
    assert 0 < content["bytes_per_token"] <= 2 * SLOT_BYTES * content["miss_rate"] + 1
    assert "are read a token" in run("info", checkpoint, "--expert-memory", "25%", "--trace", trace).out


def test_the_static_memory_table_needs_no_weights(run: Run) -> None:
    done = run("info", NLLB_54B, "--static-memory-table")
    assert done.code == 0, done.err
    rows = {int(cells[0]): cells for cells in map(str.split, done.out.splitlines()) if cells and cells[0].isdigit()}
    assert rows[10][1:6] == ["15.239", "GiB", "2.251", "GiB", "1.148x"]
    assert rows[1][5] == "1.474x"
    content = json.loads(run("info", NLLB_54B / "config.json", "--static-memory-table", "--json", "--ranks", 4).out)
    assert [row["slots"] for row in content["decoder"]] == list(range(32, 0, -1))
    assert "3 ranks do not divide 128" in run("info", NLLB_54B, "--static-memory-table", "--ranks", 3).error_line


def test_cache_compares_policies(run: Run, checkpoint: Path, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curves.png"
    done = run("cache", checkpoint, "--trace", trace, "--plot", plot)
    assert done.code == 0, done.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(policy in done.out for policy in ("reuse", "lifo", "belady"))
    for phase in ("encoder", "decoder", "all"):
        content = json.loads(
            run("cache", checkpoint, "--trace", trace, "--phase", phase, "--json", "--pool", "layer").out
        )
        for row in content["rows"]:
            rates = row["miss_rates"]
            assert 0 < rates["belady"] == min(rates.values()) <= max(rates.values()) <= 1
            assert row["nbytes"] == row["slots"] * SLOT_BYTES
        assert content["rows"][-1]["slots"] == 16


def test_cache_refuses_what_does_not_fit(run: Run, checkpoint: Path, trace: Path, tmp_path: Path) -> None:
    assert (
        "'pool': 'both' is not one of global, layer"
        in run("cache", checkpoint, "--trace", trace, "--pool", "both").error_line
    )
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
    assert "recorded from another model" in run("cache", demo, "--trace", trace).error_line
    assert "cannot be read" in run("cache", checkpoint, "--trace", tmp_path / "none.json").error_line
