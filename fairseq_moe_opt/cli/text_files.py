"""Lines in, lines out: UTF-8 read lazily with numbered errors, and outputs that are whole or not there."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fairseq_moe_opt.errors import InputError

STANDARD = "-"
_BOM = b"\xef\xbb\xbf"
_BREAKS = dict.fromkeys(map(ord, "\r\n"), " ")


@contextmanager
def open_lines(name: str) -> Iterator[BinaryIO]:
    """The file ``name``, or standard input for ``-``, in bytes; InputError where it cannot be read."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        stream = Path(name).open("rb")  # noqa: SIM115 - closed below; only opening it is to be caught here
    except OSError as error:
        raise InputError(f"{name}: {_reason(error)}") from error
    with stream:
        yield stream


def decoded(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Every line without its end (``\\n`` or ``\\r\\n``); InputError names the first line that is not UTF-8."""
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = "standard input" if name == STANDARD else name
            raise InputError(
                f"{shown}, line {number}: is not UTF-8 (byte 0x{line[error.start]:02x} at position "
                f"{error.start + 1}); convert it first, for instance with iconv -t UTF-8"
            ) from error
        yield text.removesuffix("\n").removesuffix("\r")


def checked_line_count(name: str) -> int | None:
    """How many lines a regular file has, all of them valid UTF-8; None where it can be read only once."""
    if name == STANDARD or not _is_regular(Path(name)):
        return None
    with open_lines(name) as stream:
        return sum(1 for _ in decoded(stream, name))


def check_destination(path: Path, option: str) -> None:
    """InputError unless a file can be put at ``path``: found out before the work, not after it."""
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; a file is wanted")
    if not folder.is_dir():
        raise InputError(f"{option} {path}: folder {folder} does not exist")
    if not os.access(path if path.exists() and not _is_regular(path) else folder, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written: permission denied")


@contextmanager
def line_writer(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes one line. None is standard output.

    A file gets its name when all lines are written; on any error nothing is left, and a former file stays. What
    is no regular file (a pipe, ``/dev/null``) is written to directly.
    """
    if path is None:
        yield _writer(sys.stdout.buffer)
        sys.stdout.buffer.flush()
    elif path.exists() and not _is_regular(path):
        with path.open("wb") as stream:
            yield _writer(stream)
    else:
        target = path.resolve()
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as stream:
                yield _writer(stream)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _writer(stream: BinaryIO) -> Callable[[str], None]:
    def write(line: str) -> None:
        # One line out for one line in, whatever is in it.
        stream.write(line.translate(_BREAKS).encode("utf-8", errors="replace") + b"\n")

    return write


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _reason(error: OSError) -> str:
    reasons = {FileNotFoundError: "no such file", IsADirectoryError: "is a folder; a text file is wanted"}
    return reasons.get(type(error), f"cannot be read: {error.strerror}")
