"""What the plugin mends of fairseq on current Python, torch and NumPy, without environment variables."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq.data import data_utils
from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq_cli import interactive

import fairseq_moe_opt
from tests.helpers.goldens import FAIRSEQ_GOLDENS

fairseq_moe_opt.register_fairseq()

PLUGIN = str(Path(fairseq_moe_opt.__file__).parent)


def test_namespaces_load_and_foreign_classes_do_not(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(arch="transformer")}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["args"].arch == "transformer"
    torch.save({"args": Path("/")}, tmp_path / "y.pt")
    with pytest.raises(Exception, match="Path"):
        torch.load(tmp_path / "y.pt")


def test_length_buckets() -> None:
    assert data_utils.get_buckets(np.array([1, 2, 3, 4, 5, 6, 7, 8]), 4).tolist() == [2, 4, 6, 8]


def test_blocks_that_end_with_sentences() -> None:
    sentences = [torch.tensor([5, 6, 2]), torch.tensor([7, 2])]
    blocks = TokenBlockDataset(sentences, [3, 2], block_size=None, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in blocks] == [[5, 6, 2], [7, 2]]


@pytest.mark.parametrize(("model", "task"), [("A_top2_eom", "translation"), ("E_lm_moe_branch", "language_modeling")])
def test_interactive(
    model: str, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line in, one hypothesis out, from rank files."""
    data = FAIRSEQ_GOLDENS / "data" / ("binlm" if model.startswith("E") else "bin")
    line = "t4 t9 t46\n" if model.startswith("E") else "s4 s9 s46\n"
    arguments = [str(data), "--task", task, "--path", str(FAIRSEQ_GOLDENS / model / "checkpoint_last.pt"), "--cpu"]
    arguments += ["--beam", "5", "--max-len-a", "1.5", "--max-len-b", "10", "--moe-gating", "static", "--is-moe"]
    monkeypatch.setattr(sys, "argv", ["fairseq-interactive", *arguments, "--user-dir", PLUGIN])
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    interactive.cli_main()
    (found,) = [row.split("\t") for row in capsys.readouterr().out.splitlines() if row.startswith("H-0")]
    if model == "A_top2_eom":
        assert found[2] == "t31 t6 t25"
        assert float(found[1]) == pytest.approx(-0.5571235, abs=1e-4)
    else:
        assert found[2].startswith("t4 t9 t46")
