"""The command line as such: version, help, light start, errors in one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_moe_opt
from fairseq_moe_opt.cli.flags import flag_name
from fairseq_moe_opt.options import field_choices, option_names
from tests.cli.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("info", "convert", "translate", "verify", "user-dir", "trace", "cache", "place")


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"moe-opt {fairseq_moe_opt.__version__}\n")


def test_user_dir_is_the_package(run: Run) -> None:
    folder = Path(run("user-dir").out.strip())
    assert folder.samefile(Path(fairseq_moe_opt.__file__).parent)
    assert (folder / "__init__.py").is_file()


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_command(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 0
    assert all(f" {command} " in done.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert f"moe-opt {command}" in done.out


def test_every_option_of_the_runtime_is_a_flag(run: Run) -> None:
    shown = run("translate", "--help").out
    assert {flag_name(name) for name in ("preset", *option_names())} == {
        word for word in shown.split() if word.startswith("--moe-")
    }


@pytest.mark.parametrize("option", field_choices())
def test_a_flag_refuses_values_the_option_refuses(run: Run, option: str) -> None:
    done = run("translate", "nowhere", flag_name(option), "nonsense")
    assert done.code == 2
    assert all(choice in done.error_line for choice in ("nonsense", *field_choices()[option]))


def test_options_that_contradict_each_other(run: Run, checkpoint: Path) -> None:
    done = run("translate", checkpoint, "--moe-gating", "static", "--moe-kernel", "loop")
    assert done.code == 2
    assert "no effect with gating='static'" in done.error_line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["translat"], ["No such command", "translat"]),
        (["translate"], ["Missing argument", "PATH"]),
        (["translate", "x", "--moe-kernal", "loop"], ["No such option", "--moe-kernel"]),
        (["translate", "x", "--batch-size", "0"], ["--batch-size"]),
        (["translate", "x", "--num-beams", "two"], ["--num-beams", "valid integer"]),
        (["translate", "x", "--dtype", "int8"], ["--dtype", "int8", "float16"]),
        (["translate", "x", "--max-length", "9", "--max-new-tokens", "9"], ["--max-length", "--max-new-tokens"]),
        (["verify", "x", "--tolerance", "-1"], ["--tolerance"]),
        (["convert", "x"], ["Missing argument", "DST"]),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Run, arguments: list[str], words: list[str]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert all(word.lower() in done.error_line.lower() for word in words), done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "weights"), 1, "Permission denied: 'weights'"),
        (RuntimeError("no memory\nlong trace"), 1, "unexpected RuntimeError: no memory (--debug shows where)"),
    ],
)
def test_errors_on_the_way(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fairseq_moe_opt.cli.info.inspect_checkpoint", fail)
    done = run("info", "x")
    assert done.code == code
    assert words in done.error_line


def test_an_interrupt_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fairseq_moe_opt.cli.info.inspect_checkpoint", interrupt)
    done = run("info", "x")
    assert (done.code, done.out, done.err.strip()) == (130, "", "")


def test_debug_shows_the_trace_wherever_it_stands(run: Run) -> None:
    for arguments in (["--debug", "info", "nowhere"], ["info", "nowhere", "--debug"]):
        done = run(*arguments)
        assert done.code == 2
        assert "Traceback" in done.err
        assert done.err.splitlines()[-1].startswith("moe-opt: nowhere")


def python(*arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **how,  # type: ignore[call-overload]
    )


def test_help_loads_no_torch() -> None:
    script = (
        "import sys; from fairseq_moe_opt.cli import main; code = main(['translate', '--help']);"
        "print(code, sorted({'torch', 'transformers', 'fairseq', 'hf_integration'} & set(sys.modules)))"
    )
    assert python("-c", script).stdout.splitlines()[-1] == "0 []"


def test_as_a_process(tmp_path: Path) -> None:
    done = python("-m", "fairseq_moe_opt.cli", "info", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"moe-opt: {tmp_path / 'nothing'}: no such file or folder\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m fairseq_moe_opt.cli translate --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1, 141)
    assert done.stderr == ""
