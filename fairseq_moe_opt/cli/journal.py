"""Lines that survive a process that is killed: a journal beside the output, until that is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fairseq_moe_opt.cli.text_files import line_writer
from fairseq_moe_opt.cli.translating import Output
from fairseq_moe_opt.errors import InputError


def journal_path(destination: Path) -> Path:
    """Where the journal of an output is."""
    target = destination.resolve()
    return target.with_name(f".{target.name}.journal")


def read_journal(destination: Path, job: Mapping[str, str], window: int) -> list[str]:
    """The lines of whole windows of ``window`` lines that an earlier run of the same ``job`` has left; none without.

    ``job`` is what the lines depend on, by name; InputError names what the journal was written for instead.
    """
    path = journal_path(destination)
    if not path.exists():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was cut off
    if not whole:
        return []
    try:
        written_for, *lines = map(json.loads, whole)
        different = [name for name in job if written_for[name] != job[name]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is not a journal of this program; delete it, or leave out --resume") from error
    if different:
        raise InputError(
            f"{path}: was written with another {different[0]}; use the same, or leave out --resume to start anew"
        )
    return lines[: len(lines) - len(lines) % window]


@contextmanager
def journaled_output(destination: Path, job: Mapping[str, str], kept: Sequence[str]) -> Iterator[Output]:
    """An output that begins with the lines ``kept`` and notes every line in a journal as it comes.

    The output gets its name when all lines are there, and the journal goes; on any error the journal stays.
    """
    path = journal_path(destination)
    with path.open("w", encoding="utf-8") as journal, line_writer(destination) as write:
        journal.write(json.dumps(dict(job)) + "\n")
        add = _adder(write, lambda line: journal.write(json.dumps(line) + "\n"), journal.flush)
        for line in kept:
            add(line)
        yield Output(len(kept), add)
    path.unlink()


def _adder(
    write: Callable[[str], None], note: Callable[[str], object], flush: Callable[[], None]
) -> Callable[[str], None]:
    def add(line: str) -> None:
        note(line)
        flush()
        write(line)

    return add
