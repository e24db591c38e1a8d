"""fairseq's command lines with the plugin print what the branches' command lines printed."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq_cli import eval_lm
from fairseq_cli import generate as generate_command

import fairseq_moe_opt
from tests.helpers.goldens import FAIRSEQ_GOLDENS, read_json

fairseq_moe_opt.register_fairseq()

PLUGIN = Path(fairseq_moe_opt.__file__).parent
DATA = FAIRSEQ_GOLDENS / "data"
TRANSLATION = [
    "--batch-size",
    "8",
    "--beam",
    "5",
    "--max-len-a",
    "1.5",
    "--max-len-b",
    "10",
    "--required-batch-size-multiple",
    "1",
]
NLLB = (
    "--task translation_multi_simple_epoch --langs src,tgt --lang-pairs src-tgt --source-lang src --target-lang tgt "
    "--encoder-langtok src --decoder-langtok --gen-subset test --beam 4 --bpe sentencepiece --sacrebleu "
    "--enable-m2m-validation --add-data-source-prefix-tags --fp16 --is-moe --distributed-world-size 16 "
    "--distributed-port 29533 --max-sentences 36"
)
"""What NLLB's generate_multi.py passes, less what names a file."""

NLLB_OVERRIDES = (
    "{'world_size': 16, 'moe_eval_capacity_token_fraction': 1.0, 'use_moe_pad_mask': False, "
    "'pass_tokens_transformer_layer': False, 'replication_count': 1}"
)
SENTENCEPIECE = Path(__file__).parents[1] / "data" / "demo_small" / "spm.model"


def hypotheses(text: str) -> dict[str, list[str]]:
    """The fields of every ``S- T- H- D- P-`` line by its name; the score is the first field of an H line."""
    lines = [line.split("\t") for line in text.splitlines() if re.match(r"[STHDP]-\d+\t", line)]
    return {line[0]: line[1:] for line in lines}


def check_text(found: str, expected: str) -> None:
    """Same sentences and tokens; scores to rounding; the same last line of BLEU."""
    ours, theirs = hypotheses(found), hypotheses(expected)
    assert list(ours) == list(theirs)
    assert len(ours) == 5 * 48
    for name, fields in theirs.items():
        if name[0] in "ST":
            assert ours[name] == fields, name
        elif name[0] in "HD":
            assert ours[name][1] == fields[1], name
            assert float(ours[name][0]) == pytest.approx(float(fields[0]), abs=1e-4)
        else:
            numbers = [[float(number) for number in line[0].split()] for line in (ours[name], fields)]
            assert numbers[0] == pytest.approx(numbers[1], abs=3e-4)
    last = [text.strip().splitlines()[-1] for text in (found, expected)]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ("model", "text", "fraction", "file"),
    [
        ("A_top2_eom", "cli_ws1_cap1.00", "1.0", "checkpoint_last.pt"),
        ("A_top2_eom", "cli_ws1_cap0.25", "0.25", "checkpoint_last.pt"),
        ("A_top2_eom", "cli_ws1_cap0.25", "0.25", "checkpoint_single.pt"),
        ("A_top2_eom", "cli_ws2_cap0.25", "0.25", "checkpoint_last.pt"),
        ("A_top2_eom", "cli_ws2_cap1.00", "1.0", "checkpoint_single.pt"),
        ("C_top1", "cli_ws1_cap1.00", "1.0", "checkpoint_last.pt"),
        ("D_cmr", "cli_ws1_cap1.00", "1.0", "checkpoint_last.pt"),
    ],
)
def test_generate(
    model: str, text: str, fraction: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = f"{{'moe_eval_capacity_token_fraction': {fraction}}}"
    path = str(FAIRSEQ_GOLDENS / model / file)
    arguments = [str(DATA / "bin"), "--path", path, "--cpu", *TRANSLATION, "--model-overrides", overrides]
    monkeypatch.setattr(
        sys,
        "argv",
        ["fairseq-generate", *arguments, "--is-moe", "--user-dir", str(PLUGIN), "--results-path", str(tmp_path)],
    )
    generate_command.cli_main()
    found = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    check_text(found, (FAIRSEQ_GOLDENS / model / f"{text}.txt").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room for one process, whose work is that of the many that a published line asks for."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def take_one_core() -> None:
    """The same for a process of its own."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command line with the plugin, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN.parent), "OMP_NUM_THREADS": "1"}
    command = (*command, "--user-dir", str(PLUGIN))
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False, preexec_fn=take_one_core
    )


def installed(command: str) -> list[str]:
    """A console script of fairseq, run by this interpreter."""
    path = Path(sys.executable).with_name(command)
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return [sys.executable, str(path)]


def nllb_command(folder: Path, *more: str) -> list[str]:
    """The published flags for the small model, results into ``folder``."""
    path = ["--path", str(FAIRSEQ_GOLDENS / "F_multilingual" / "checkpoint_last.pt")]
    outputs = ["--results-path", str(folder), "--moe-report", str(folder / "report.json")]
    pieces = ["--sentencepiece-model", str(SENTENCEPIECE), "--model-overrides", NLLB_OVERRIDES]
    return [str(DATA / "bin"), *NLLB.split(), *path, *pieces, *outputs, *more]


@pytest.mark.parametrize("way", ["module", "script"])
def test_the_published_command_line_of_nllb(way: str, tmp_path: Path) -> None:
    """As written: half precision, on a CPU too, and a sentencepiece model to put hypotheses together with."""
    start = [sys.executable, "-m", "fairseq_cli.generate"] if way == "module" else installed("fairseq-generate")
    done = run(*start, *nllb_command(tmp_path))
    assert done.returncode == 0, done.stderr
    written = read_json(tmp_path / "report.json")
    assert written["options"]["capacity"] == "checkpoint"
    assert written["options"]["capacity_implied_by"] == "moe_eval_capacity_token_fraction"
    assert [layer["dropped_rows"] for layer in written["layers"]] == [0, 0, 0, 0]
    assert written["tokens"]["encoder"] > 48
    text = (FAIRSEQ_GOLDENS / "F_multilingual" / "cli_ws2_nllb_style.txt").read_text(encoding="utf-8")
    found = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    ours, theirs = hypotheses(found), hypotheses(text)
    assert list(ours) == list(theirs)
    # The goldens are of single precision, and of words without a sentencepiece model.
    same = [ours[name][1] == fields[1] for name, fields in theirs.items() if name[0] == "H"]
    assert sum(same) >= 46
    assert "BLEU" in found.strip().splitlines()[-1]
    assert " " not in ours["D-0"][1] and ours["D-0"][1] == ours["H-0"][1].replace(" ", "").lstrip("_")


def test_the_command_line_of_nllb_in_single_precision_prints_what_the_branch_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [word for word in nllb_command(tmp_path) if word not in {"--fp16", "--bpe", "sentencepiece"}]
    cut = arguments.index("--sentencepiece-model")
    arguments = [*arguments[:cut], *arguments[cut + 2 :]]
    arguments.remove("--sacrebleu")
    monkeypatch.setattr(sys, "argv", ["fairseq-generate", *arguments, "--cpu", "--user-dir", str(PLUGIN)])
    generate_command.cli_main()
    found = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    check_text(found, (FAIRSEQ_GOLDENS / "F_multilingual" / "cli_ws2_nllb_style.txt").read_text(encoding="utf-8"))


def test_the_published_command_line_of_the_language_models() -> None:
    path = str(FAIRSEQ_GOLDENS / "E_lm_moe_branch" / "checkpoint_last.pt")
    flags = "--gen-subset valid --sample-break-mode none --tokens-per-sample 32 --batch-size 1 --fp16"
    flags += " --output-word-probs --is-moe --distributed-world-size 8"
    overrides = ["--model-overrides", "{'world_size': 8, 'moe_eval_capacity_token_fraction': 0.05}"]
    start = [sys.executable, "-m", "fairseq_cli.eval_lm", str(DATA / "binlm"), "--path", path]
    done = run(*start, *flags.split(), *overrides)
    assert done.returncode == 0, done.stderr
    (loss,) = re.findall(r"Loss \(base 2\): ([\d.]+)", done.stderr)
    assert 4 < float(loss) < 7


def test_an_error_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    for part in ("shared", "rank-1"):
        shutil.copy(FAIRSEQ_GOLDENS / "A_top2_eom" / f"checkpoint_last-{part}.pt", tmp_path / f"x-{part}.pt")
    done = run(
        sys.executable,
        "-m",
        "fairseq_cli.generate",
        str(DATA / "bin"),
        "--path",
        str(tmp_path / "x.pt"),
        "--cpu",
        "--batch-size",
        "8",
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "x-rank-0.pt is missing" in last


def word_scores(lines: list[str]) -> dict[int, list[tuple[str, float]]]:
    """Words and their log-probabilities by sample."""
    scores = {}
    for line in lines:
        number, _, rest = line.partition(" ")
        if number.isdigit():
            scores[int(number)] = [(word, float(score)) for word, score in re.findall(r"(\S+) \[(-?[\d.]+)\]", rest)]
    return scores


@pytest.mark.parametrize(("text", "mode"), [("cli_evallm_cap1.0", "none"), ("cli_evallm_eos_cap1.0", "eos")])
def test_eval_lm(text: str, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = FAIRSEQ_GOLDENS / "E_lm_moe_branch"
    overrides = "{'world_size': 8, 'moe_eval_capacity_token_fraction': 1.0}"
    arguments = [str(DATA / "binlm"), "--path", str(model / "checkpoint_last.pt"), "--cpu", "--gen-subset", "test"]
    arguments += ["--sample-break-mode", mode, "--tokens-per-sample", "32", "--batch-size", "4", "--is-moe"]
    arguments += ["--output-word-probs", "--distributed-world-size", "8", "--model-overrides", overrides]
    monkeypatch.setattr(sys, "argv", ["fairseq-eval-lm", *arguments, "--user-dir", str(PLUGIN)])
    with caplog.at_level(logging.INFO):
        eval_lm.cli_main()
    printed = [entry.getMessage() for entry in caplog.records if entry.name == "fairseq_cli.eval_lm"]
    golden = (model / f"{text}.txt").read_text(encoding="utf-8").splitlines()
    found, expected = word_scores(printed), word_scores(golden)
    assert found.keys() == expected.keys() and expected
    for number, words in expected.items():
        assert [word for word, _ in found[number]] == [word for word, _ in words]
        assert [score for _, score in found[number]] == pytest.approx([score for _, score in words], abs=1e-4)
    loss = next(line for line in golden if "Loss" in line)
    assert loss.partition("Loss")[2] == next(line for line in printed if "Loss" in line).partition("Loss")[2]
