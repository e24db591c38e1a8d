"""docs/fairseq.md: its Python runs, and its shell commands are spelt with flags that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq import options

import fairseq_moe_opt

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "fairseq.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}(?: \w+)?\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_python_on_the_page_runs() -> None:
    code = "\n".join(blocks("python")) + "\nprint(sum(layer.calls for layer in report.layers))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["0"]), done.stderr


def test_the_training_command_on_the_page_is_accepted() -> None:
    fairseq_moe_opt.register_fairseq()
    (line,) = [block for block in blocks("bash") if block.startswith("fairseq-train")]
    words = line.replace("\\\n", " ").split()[1:]
    at = words.index("--user-dir")
    del words[at : at + 3]  # --user-dir "$(moe-opt user-dir)"
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    assert (args.arch, args.moe_expert_count, args.moe_gate_loss_wt) == ("transformer_moe", 16, 0.01)


def test_every_moe_flag_on_the_page_exists() -> None:
    fairseq_moe_opt.register_fairseq()
    known: set[str] = set()
    training = "data --arch transformer_moe --criterion moe_label_smoothed_cross_entropy"
    for parser, line in (
        (options.get_training_parser(), training),
        (options.get_generation_parser(), "data --path x.pt"),
    ):
        options.parse_args_and_arch(parser, line.split())
        known |= set(parser._option_string_actions)
    shown = set(re.findall(r"--(?:moe|cmr)-[a-z0-9-]+", PAGE))
    assert len(shown) > 15
    assert shown <= known
