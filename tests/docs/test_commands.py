"""Every command of README.md and docs/ is spelt as its program has it, and runs, unless it is marked.

A mark stands behind the block's language: ``gpu`` and ``nodes`` for what this machine may lack, ``long`` for what takes
more than seconds or needs a reader's own files. ``make docs-check`` runs those of the long ones that it can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.page_commands import check, commands_of
from tests.helpers.pages import PAGES, ROOT, Block, blocks_of

MARKS = frozenset({"", "gpu", "nodes", "long"})
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
QUICK = [block for block in BLOCKS if block.language in ("bash", "python") and not block.mark]
LONG = [block for block in BLOCKS if block.language in ("bash", "python") and block.mark == "long"]
SENTENCES = "Read a list of your most frequently visited websites\nThe page could not be loaded.\nOpen the file.\n"
MINUTES = 10


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that looks like the tree, with a text, for what a command writes."""
    for path in ROOT.iterdir():
        if path.name not in ("demo-output", "input.txt"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "input.txt").write_text(SENTENCES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_marks_are_those_that_mean_something(block: Block) -> None:
    assert block.mark in MARKS


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_commands_are_accepted_by_their_programs(block: Block, place: Path) -> None:
    found = commands_of(block)
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("words", [["moe-opt", "translate", "--no-such-flag"], ["moe-opt", "nothing"], ["make", "tea"]])
def test_a_command_that_is_spelt_wrong_is_found(words: list[str], place: Path) -> None:
    with pytest.raises((AssertionError, SystemExit, Exception)):
        check(words)


def test_an_unknown_program_is_found() -> None:
    with pytest.raises(AssertionError, match="no parser knows 'frobnicate'"):
        check(["frobnicate", "x"])


@pytest.mark.parametrize("block", QUICK, ids=str)
def test_blocks_without_a_mark_run(block: Block, place: Path) -> None:
    run(block)


@pytest.mark.docs_long
@pytest.mark.parametrize("block", LONG, ids=str)
def test_long_blocks_run(block: Block, place: Path) -> None:
    run(block)


def run(block: Block) -> None:
    """Run ``block`` in the current folder as a reader would."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, block.text], env=environment, capture_output=True, text=True, check=False, timeout=60 * MINUTES
    )
    assert done.returncode == 0, done.stdout + done.stderr
