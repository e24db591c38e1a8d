"""``hf_integration.launch`` as processes: one file whoever does what, one message when a rank is gone, and resuming."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fairseq_moe_opt.cli import main
from fairseq_moe_opt.cli.journal import journal_path, journaled_output, read_journal
from fairseq_moe_opt.errors import InputError, ParallelError
from fairseq_moe_opt.parallel import join_world

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "demo" / "model"
LANGUAGES = ("--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn")
# One line a batch: windows of 32 lines.
SETTINGS = ("--num-beams", "1", "--max-new-tokens", "8", "--batch-size", "1")
TIMEOUT, DEADLINE = 10.0, 200.0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """63 lines, one of them blank."""
    with gzip.open(ROOT / "examples" / "demo" / "demo.tsv.gz", "rt", encoding="utf-8") as stream:
        lines = list(dict.fromkeys(line.split("\t")[1] for line in stream))[:63]
    path = tmp_path_factory.mktemp("text") / "in.txt"
    path.write_text("".join(f"{line}\n" for line in [*lines[:5], "", *lines[6:]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(text: Path) -> bytes:
    output = text.with_name("alone.txt")
    assert main(["translate", str(MODEL), str(text), *LANGUAGES, *SETTINGS, "-o", str(output)]) == 0
    return output.read_bytes()


def launch_command(text: Path, output: Path, *more: str) -> list[str]:
    arguments = (str(MODEL), str(text), *LANGUAGES, *SETTINGS, "-o", str(output), "--timeout", str(TIMEOUT), *more)
    return ["-m", "hf_integration.launch", "translate", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_for_first_window(output: Path) -> None:
    journal, start = journal_path(output), time.monotonic()
    while not journal.exists() or journal.read_bytes().count(b"\n") < 33:
        assert time.monotonic() < start + DEADLINE, "no window was done in time"
        time.sleep(0.02)


def test_a_rank_that_is_killed_stops_all_and_another_start_goes_on(
    text: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    output, port = tmp_path / "out.txt", free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, *launch_command(text, output)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        wait_for_first_window(output)
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, said = ranks[0].communicate(timeout=DEADLINE)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 2 and time.monotonic() < killed + 2 * TIMEOUT
    (message,) = [line for line in said.splitlines() if line.startswith("moe-opt: ")]
    assert "no answer from rank 1 (dead or hanging)" in message
    assert not output.exists()

    kept = journal_path(output).read_bytes()
    config = str(ROOT / "configs" / "accelerate" / "cpu2.yaml")
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", free_port()]
    subprocess.run(
        [sys.executable, *accelerate, *launch_command(text, output, "--resume")],
        env=environment(),
        check=True,
        timeout=DEADLINE,
    )
    assert kept.count(b"\n") >= 33
    assert output.read_bytes() == undisturbed
    assert os.listdir(tmp_path) == ["out.txt"]


JOB = {"text": "a", "dtype": "None"}


def test_a_journal_keeps_whole_windows_and_goes_when_all_is_written(tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    with pytest.raises(KeyboardInterrupt), journaled_output(output, JOB, []) as sink:
        for line in ("a", "b\u2028", "c"):
            sink.write(line)
        raise KeyboardInterrupt
    assert not output.exists()
    with journal_path(output).open("a", encoding="utf-8") as journal:
        journal.write('"cut o')
    assert read_journal(output, JOB, 2) == ["a", "b\u2028"]
    with journaled_output(output, JOB, read_journal(output, JOB, 2)) as sink:
        assert sink.kept == 2
        sink.write("d")
    assert output.read_text(encoding="utf-8").split("\n") == ["a", "b\u2028", "d", ""]
    assert os.listdir(tmp_path) == ["out.txt"] and read_journal(output, JOB, 2) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "b", "dtype": "None"}\n', "another text"), ("what?\n", "is not a journal"), ("[]\n", "is not")],
)
def test_a_journal_of_something_else_is_refused(tmp_path: Path, content: str, message: str) -> None:
    journal_path(tmp_path / "out.txt").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_journal(tmp_path / "out.txt", JOB, 2)


def test_a_launcher_that_starts_fewer_processes_than_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # What accelerate's MULTI_CPU leaves in the environment of its only process.
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ParallelError, match=r"MULTI_CPU; use MULTI_GPU with use_cpu: true"):
        join_world(torch.device("cpu"), 1.0)
