"""Shell commands of a page: taken apart, and their arguments parsed by the programs' own parsers.

Nothing is run here. A command that no parser here knows is an error, so a page cannot show one that nobody checks.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import click
import pytest
import typer

from tests.helpers.benchmark_modules import benchmark_modules
from tests.helpers.pages import ROOT, Block

PLACEHOLDERS: Mapping[str, str] = {
    "PATH": "examples/demo/model",
    "MODEL": "examples/demo/model",
    "FOLDER": "examples/demo/model",
    "FILE": "input.txt",
    "DATA": "tests/data/goldens/data/bin",
    "CHECKPOINT.pt": "tests/data/goldens/A_top2_eom/checkpoint_last.pt",
}
"""Words in capitals that stand for a reader's own files, to ones that are in the tree."""

USER_DIRECTORY = "$(moe-opt user-dir)"
_USER_DIRECTORY = str(ROOT / "fairseq_moe_opt")


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command in ``block``, a pipe's or ``&&``'s parts apart, redirections left out."""
    found, line = [], ""
    text = re.sub(r'"\$\(which ([\w-]+)\)"', r"\1", block.text.replace(f'"{USER_DIRECTORY}"', _USER_DIRECTORY))
    for part in text.replace("\\\n", " ").splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        line = ""
        found += [[PLACEHOLDERS.get(word, word) for word in command] for command in _split(words)]
    assert not line, f"{block}: a quotation has no end"
    return found


def _split(words: Sequence[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip or word in ("<", ">"):
            skip = word in ("<", ">")
        elif word in ("&&", "|", ";"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def check(words: Sequence[str]) -> None:
    """Parse one command. Raises (AssertionError, click's UsageError, SystemExit) where a program would refuse it."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, arguments = words[0], list(words[1:])
    if program == "cd":
        return
    checker = _PROGRAMS.get(program, _script if "/" in program else None)
    assert checker is not None, f"no parser knows {program!r}"
    checker(program, arguments)


def _parse(command: click.Command, name: str, arguments: Sequence[str]) -> None:
    """Let ``command``, or the one of its commands that is named, parse ``arguments``, all of them."""
    context = command.make_context(name, list(arguments))
    if isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        assert rest, f"{name}: no command given"
        found, chosen, left = command.resolve_command(context, rest)
        assert chosen is not None and found is not None
        chosen.make_context(found, left, parent=context)


@cache
def _application(module: str) -> Any:
    return typer.main.get_command(import_module(module).app)


def _moe_opt(program: str, arguments: Sequence[str]) -> None:
    _parse(_application("fairseq_moe_opt.cli"), program, arguments)


def _fairseq(program: str, arguments: Sequence[str]) -> None:
    pytest.importorskip("fairseq", reason="fairseq is not installed")
    from fairseq import options

    import fairseq_moe_opt

    fairseq_moe_opt.register_fairseq()
    name = re.sub(r"^fairseq[-_]", "", program).replace("_", "-")
    parser = {
        "generate": options.get_generation_parser,
        "interactive": lambda: options.get_generation_parser(interactive=True),
        "eval-lm": options.get_eval_lm_parser,
        "train": options.get_training_parser,
        "validate": options.get_validation_parser,
        "preprocess": options.get_preprocessing_parser,
    }[name]()
    options.parse_args_and_arch(parser, list(arguments))


def _python(program: str, arguments: Sequence[str]) -> None:
    if arguments[0] != "-m":
        return _script(arguments[0], arguments[1:])
    module, rest = arguments[1], list(arguments[2:])
    if module.startswith("fairseq_cli."):
        return _fairseq(f"fairseq-{module.removeprefix('fairseq_cli.')}", rest)
    assert module in ("hf_integration.launch", "fairseq_moe_opt.cli"), f"no parser knows the module {module!r}"
    _parse(_application(module), module, rest)


def _script(program: str, arguments: Sequence[str]) -> None:
    """A file of the tree: a benchmark's arguments are parsed, another's flags have to stand in its text."""
    path = ROOT / program
    assert path.is_file(), f"{program} is not in the tree"
    if path.parent == ROOT / "benchmarks":
        with benchmark_modules(path.stem) as (module,):
            application = typer.Typer(add_completion=False)
            application.command()(module.main)
            _parse(typer.main.get_command(application), program, arguments)
        return
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".py" or os.stat(path).st_mode & stat.S_IXUSR, f"{program} cannot be executed"
    for flag in (word for word in arguments if word.startswith("--")):
        assert flag in text, f"{program} has no {flag}"


def _launcher(program: str, arguments: Sequence[str]) -> None:
    """``torchrun`` and ``accelerate launch``: their own flags by their own parsers, then the launched program."""
    at = arguments.index("-m") if "-m" in arguments else None
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(list(arguments))
    else:
        assert arguments[0] == "launch"
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(list(arguments[1:]))
        if parsed.config_file is not None:
            assert (ROOT / parsed.config_file).is_file(), f"{parsed.config_file} is not in the tree"
    if at is None:
        check([parsed.training_script, *parsed.training_script_args])
    else:
        _python("python", arguments[at:])


def _make(program: str, arguments: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", text, flags=re.MULTILINE), f"the Makefile has no target {target}"


def _pip(program: str, arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    extras = {extra for word in arguments for found in re.findall(r"\[(.*?)\]", word) for extra in found.split(",")}
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in extras:
        assert f'"{extra}":' in text, f"setup.py has no extra {extra}"


_PROGRAMS: Mapping[str, Callable[[str, Sequence[str]], None]] = {
    "moe-opt": _moe_opt,
    "python": _python,
    "torchrun": _launcher,
    "accelerate": _launcher,
    "make": _make,
    "pip": _pip,
    **{
        f"fairseq-{name}": _fairseq
        for name in ("generate", "interactive", "eval-lm", "train", "validate", "preprocess")
    },
}

KNOWN_PROGRAMS = frozenset(_PROGRAMS)
"""Words that begin a command."""
