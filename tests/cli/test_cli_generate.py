"""``moe-opt`` on language models: generate, convert, info, verify and trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fairseq_moe_opt.moe.trace import read_trace
from tests.cli.conftest import Run
from tests.helpers.fairseq_language_models import GOLDEN, language_model_folder
from tests.helpers.goldens import FAIRSEQ_GOLDENS

FEW = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model_folder(tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("the file\n\na window is\n", encoding="utf-8")
    return path


def test_a_line_out_for_each_line_in(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    done = run("generate", folder, prompts, *FEW)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("the file") and lines[2].startswith("a window is")
    assert run("generate", folder, *FEW, "--moe-expert-memory", "40%", stdin=prompts.read_bytes()).out == done.out
    output = tmp_path / "out.txt"
    assert run("generate", folder, prompts, *FEW, "--no-prompt", "-o", output).code == 0
    without = output.read_text(encoding="utf-8").splitlines()
    assert [lines[0], lines[1], lines[2]] == ["the file" + without[0], without[1], "a window is" + without[2]]
    records = [json.loads(line) for line in run("generate", folder, prompts, *FEW, "--json").out.splitlines()]
    assert [one["prompt"] + one["text"] for one in records] == lines


def test_drawing_and_beams(run: Run, folder: Path, prompts: Path) -> None:
    drawn = [run("generate", folder, prompts, *FEW, "--top-p", 0.9, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(run("generate", folder, prompts, *FEW, "--num-beams", 3).out.splitlines()) == 3
    wrong = run("generate", folder, prompts, "--no-sample", "--top-k", 3)
    assert wrong.code == 2 and "--top-k has no effect without --do-sample" in wrong.error_line


def test_each_command_says_whose_model_it_is(run: Run, folder: Path, checkpoint: Path, prompts: Path) -> None:
    wrong = run("translate", folder, prompts, "--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn")
    assert wrong.code == 2 and "is a language model" in wrong.error_line and "moe-opt generate" in wrong.error_line
    wrong = run("generate", checkpoint, prompts)
    assert wrong.code == 2 and "is a translation model: see moe-opt translate" in wrong.error_line


def test_info_and_verify(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    shown = run("info", folder).out
    assert "fairseq_moe_lm" in shown and "decoder 1 (layers 1)" in shown
    found = json.loads(run("info", folder, "--json").out)
    assert (found["top_k"], found["width"]) == (2, 16)
    for text in ((), ("--text", prompts)):
        done = run("verify", folder, *text, "--stock", "--moe-expert-memory", "40%")
        assert done.code == 0, done.out + done.err
        assert "all agree" in done.out and "buffered, 40%" in done.out and "DIFFERS" not in done.out
    wrong = run("verify", folder, "--src-lang", "eng_Latn")
    assert wrong.code == 2 and "knows no languages" in wrong.error_line


def test_a_trace_counts_every_token(run: Run, folder: Path, prompts: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.npz"
    done = run("trace", folder, prompts, "-o", trace, *FEW)
    assert done.code == 0, done.err
    found = read_trace(trace)
    assert {layer.phase for layer in found.layers} == {"decoder"} and len(found.visits) >= 2
    wrong = run("trace", folder, prompts, "-o", trace, "--tgt-lang", "fra_Latn")
    assert wrong.code == 2 and "knows no languages" in wrong.error_line


def test_convert_writes_a_folder_without_a_tokenizer_where_nothing_gives_one(run: Run, tmp_path: Path) -> None:
    done = run("convert", FAIRSEQ_GOLDENS / GOLDEN, tmp_path / "model")
    assert done.code == 0 and "no tokenizer" in done.out
    assert run("verify", tmp_path / "model").code == 0
    wrong = run("generate", tmp_path / "model")
    assert wrong.code == 2 and "has no tokenizer" in wrong.error_line
