"""Every command of README.md and docs/ is spelt as its program has it, and runs, unless it is marked.

A mark stands behind the block's language: ``gpu`` and ``nodes`` for what this machine may lack, ``long`` for what takes
more than seconds or needs a reader's own files. ``make docs-check`` runs those of the long ones that it can.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import fairseq_moe_opt
from fairseq_moe_opt import cli
from tests.helpers.page_commands import KNOWN_PROGRAMS, PLACEHOLDERS, check, commands_of
from tests.helpers.pages import PAGES, ROOT, Block, blocks_of

MARKS = frozenset({"", "gpu", "nodes", "long"})
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
QUICK = [block for block in BLOCKS if block.language in ("bash", "python") and not block.mark]
SETS_UP = frozenset({"make", "pip"})
"""Programs that would change the environment they are tested in: `make setup` and the tests themselves run them."""
LONG = [
    block
    for block in BLOCKS
    if block.mark == "long" and not (block.language == "bash" and SETS_UP & {words[0] for words in commands_of(block)})
]
SENTENCES = "The page could not be loaded.\nOpen the file.\n" * 20  # two batches: placing needs as many
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


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.language], ids=str)
def test_a_block_without_a_language_shows_no_command(block: Block) -> None:
    first_words = {line.split()[0] for line in block.text.splitlines() if line.strip()}
    assert not first_words & KNOWN_PROGRAMS


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_commands_are_accepted_by_their_programs(block: Block, place: Path) -> None:
    found = commands_of(block)
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("words", [["moe-opt", "translate", "--no-such-flag"], ["moe-opt", "nothing"], ["make", "tea"]])
def test_a_command_that_is_spelt_wrong_is_found(words: list[str], place: Path) -> None:
    with pytest.raises(Exception, match=r"No such (option|command)|has no target tea"):
        check(words)


def test_an_unknown_program_is_found() -> None:
    with pytest.raises(AssertionError, match="no parser knows 'frobnicate'"):
        check(["frobnicate", "x"])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_blocks_can_be_compiled(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", QUICK, ids=str)
def test_blocks_without_a_mark_run(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where programs have functions to call."""
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "page"})
        return
    for program, *arguments in commands_of(block):
        if program == "moe-opt":
            assert cli.main(arguments) == 0
        else:
            # fairseq takes no notice of a plugin's folder that this process has imported already.
            fairseq_moe_opt.register_fairseq()
            name = program.removeprefix("fairseq-").replace("-", "_")
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            import_module(f"fairseq_cli.{name}").cli_main()


@pytest.mark.docs_long
@pytest.mark.parametrize("block", LONG, ids=str)
def test_long_blocks_run(block: Block, place: Path) -> None:
    """As a reader would: in a shell, or an interpreter of its own."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    text = re.sub(r"[A-Z]+(?:\.pt)?\b", lambda word: PLACEHOLDERS.get(word[0], word[0]), block.text)
    done = subprocess.run(
        [*program, text], env=environment, capture_output=True, text=True, check=False, timeout=60 * MINUTES
    )
    assert done.returncode == 0, done.stdout + done.stderr
