"""``moe-opt profile`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

pytest.importorskip("matplotlib")

BOTH = ("--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn", "--tgt-lang", "deu_Latn")
SHORT = ("--num-beams", 1, "--max-new-tokens", 6)
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"


def text(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_demo_model_in_two_languages(run: Run, tmp_path: Path) -> None:
    lines = ["Open the file.", "", "The page could not be loaded.", "Save the changes?", "Close all windows."]
    source = text(tmp_path, "ui.txt", *lines)
    done = run("profile", DEMO, source, "-o", tmp_path / "out", *BOTH, *SHORT, "--batch-size", 2)
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "out" / "profile.json").read_text(encoding="utf-8"))
    assert done.out.splitlines()[:-1] == content["findings"]
    assert done.out.splitlines()[-1].startswith(f"{tmp_path}/out/index.html: 11 pictures")
    french, german = content["inputs"]
    assert (french["label"], german["label"]) == ("fra_Latn", "deu_Latn")
    for one in content["inputs"]:
        for phase in ("encoder", "decoder"):
            assert abs(one["phases"][phase]["components_sum_difference"]) < 0.05
        assert one["seconds"] > sum(phase["seconds"] for phase in one["phases"].values())
    # The encoder reads the same text; the decoder writes another language.
    comparison = content["comparison"]
    assert comparison["model.encoder.layers.3.ffn"]["mean_overlap"] == pytest.approx(1)
    assert comparison["model.decoder.layers.3.ffn"]["mean_overlap"] < 0.8
    assert set(content["memory"]["forwards"]) == {"encoder", "decoder"}
    assert content["layers"][0]["waste_factor"] == 8


def test_texts_are_compared_too_and_experts_may_be_buffered(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    texts = [text(tmp_path, f"{name}.txt", "a cat", "the dog") for name in ("news", "law")]
    flags = ("--moe-expert-memory", "50%", "--lines", 1)
    done = run("profile", checkpoint, *texts, "-o", tmp_path / "out", *BOTH[:4], *SHORT, *flags)
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "out" / "profile.json").read_text(encoding="utf-8"))
    assert [one["label"] for one in content["inputs"]] == ["news to fra_Latn", "law to fra_Latn"]
    assert content["about"]["options"]["expert_memory"] == "50%"
    assert all(one["layers"]["model.encoder.layers.1.ffn"]["batches"] == 1 for one in content["inputs"])


def test_what_cannot_be_profiled_is_said_before_the_work(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    good, empty = text(tmp_path, "good.txt", "a cat"), text(tmp_path, "empty.txt", " ")
    for arguments, message in (
        ((empty,), "has no line to profile with"),
        ((good, good), "the same text is given twice"),
        (("-",), "give files, not standard input"),
        ((tmp_path / "none.txt",), "no such file"),
        ((good, "--tgt-lang", "xxx_Latn"), "xxx_Latn"),
    ):
        done = run("profile", checkpoint, *arguments, "-o", tmp_path / "out", *BOTH[:4])
        assert done.code == 2 and message in done.error_line
    done = run("profile", checkpoint, good, "-o", good, *BOTH[:4])
    assert done.code == 2 and "is a file; a folder is wanted" in done.error_line
    assert not (tmp_path / "out").exists()
