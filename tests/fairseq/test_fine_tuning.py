"""A checkpoint fine-tuned by fairseq-train runs in both front ends, and says the same in both."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq_cli import generate as generate_command
from fairseq_cli import train

import fairseq_moe_opt
from fairseq_moe_opt.checkpoints import convert
from tests.helpers.fairseq_runs import EOS, PAD, arrays, generate, load
from tests.helpers.goldens import FAIRSEQ_GOLDENS

PLUGIN = str(Path(fairseq_moe_opt.__file__).parent)
MODEL = FAIRSEQ_GOLDENS / "A_top2_eom"
DATA = FAIRSEQ_GOLDENS / "data" / "bin"
FLAGS = (
    "-s src -t tgt --arch transformer_moe --encoder-layers 4 --decoder-layers 4 --encoder-embed-dim 64 "
    "--encoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4 --encoder-normalize-before "
    "--decoder-normalize-before --share-all-embeddings --max-source-positions 64 --max-target-positions 64 "
    "--moe-freq 2 --moe-expert-count 8 --moe-gating-use-fp32 --moe-second-expert-policy all --use-moe-pad-mask "
    "--moe-eom 0.2 --moe-eval-capacity-token-fraction 1.0 --moe-capacity checkpoint "
    "--criterion moe_label_smoothed_cross_entropy "
    "--label-smoothing 0.1 --moe-gate-loss-wt 0.01 --dropout 0.1 --optimizer adam --lr 1e-3 --cpu --max-tokens 600 "
    "--train-subset test --valid-subset test --num-batch-buckets 2 --no-epoch-checkpoints --disable-validation"
)
STARTS = {
    "rank files": ["--finetune-from-model", str(MODEL / "checkpoint_last.pt")],
    "one file": [
        *("--restore-file", str(MODEL / "checkpoint_single.pt")),
        *("--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"),
    ],
}


def command(monkeypatch: pytest.MonkeyPatch, main: Any, *arguments: str) -> None:
    """Run a command line of fairseq in this process."""
    monkeypatch.setattr(sys, "argv", ["fairseq", *arguments, "--user-dir", PLUGIN])
    main()


def tuned(monkeypatch: pytest.MonkeyPatch, folder: Path, start: str) -> Path:
    """The checkpoint after a few updates and, in a second run that goes on from the first, a few more."""
    for more in (["--max-update", "3", *STARTS[start]], ["--max-update", "5"]):
        command(monkeypatch, train.cli_main, str(DATA), *FLAGS.split(), "--save-dir", str(folder), *more)
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize("start", STARTS)
def test_tuned_and_converted_it_says_the_same(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_integration import from_pretrained

    path = tuned(monkeypatch, tmp_path / "run", start)
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"checkpoint_last-shared.pt", "checkpoint_last-rank-0.pt"}
    before, _ = load(MODEL / "checkpoint_last.pt", DATA)
    model, task = load(path, DATA)
    changed = [float((new - old).abs().max()) for new, old in zip(model.parameters(), before.parameters(), strict=True)]
    assert 0 < max(changed) < 0.1

    convert(path, tmp_path / "hf")
    twin = from_pretrained(tmp_path / "hf", dtype="float32")
    golden = arrays("A_top2_eom", "cap1.00")
    source = golden["b0.src_tokens"]
    theirs = twin.generate(
        input_ids=source,
        attention_mask=(source != PAD).long(),
        num_beams=1,
        max_new_tokens=40,
        forced_eos_token_id=None,
    )
    for (best, *_), row in zip(generate(model, task, golden, "b0", beam=1), theirs, strict=True):
        tokens = best["tokens"].tolist()
        assert tokens[-1] == EOS and len(tokens) > 3
        assert row[1 : len(tokens) + 1].tolist() == tokens

    command_line = [str(DATA), "--path", str(path), "--cpu", "--beam", "1", "--batch-size", "6"]
    command(monkeypatch, generate_command.cli_main, *command_line, "--results-path", str(tmp_path))
    text = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    written = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", text, flags=re.MULTILINE))
    for number, (best, *_) in zip(golden["b0.ids"].tolist(), generate(model, task, golden, "b0", 1), strict=True):
        assert written[str(number)] == task.target_dictionary.string(best["tokens"])
