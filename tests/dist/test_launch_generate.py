"""Language models on several ranks through the launcher: the file that one process writes, also when resumed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_moe_opt.cli import main
from fairseq_moe_opt.cli.journal import journal_path
from tests.helpers.fairseq_language_models import language_model_folder

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("--batch-size", "2", "--max-new-tokens", "8", "--top-p", "0.9", "--seed", "4")


def test_two_ranks_write_what_one_process_does(tmp_path: Path) -> None:
    folder, prompts = language_model_folder(tmp_path / "model"), tmp_path / "in.txt"
    words = ["the file", "a window is", "", "open", "it is one of the lists of all programs that are to be removed"]
    prompts.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    alone, output = tmp_path / "alone.txt", tmp_path / "out.txt"
    assert main(["generate", str(folder), str(prompts), *SETTINGS, "-o", str(alone)]) == 0
    # An odd number of batches, prompts of all lengths and a table of positions: one rank waits for the other.
    launch(folder, prompts, output)
    assert output.read_bytes() == alone.read_bytes()
    assert len(output.read_text(encoding="utf-8").splitlines()) == len(words)
    assert not journal_path(output).exists()


def launch(folder: Path, prompts: Path, output: Path, settings: tuple[str, ...] = SETTINGS) -> None:
    """Two ranks continue ``prompts``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "hf_integration.launch", "generate", str(folder), str(prompts), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen([*command, "-o", str(output), "--timeout", "60"], env={**environment, **world, "RANK": rank})
        for rank in "01"
    ]
    try:
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
