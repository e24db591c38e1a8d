"""Nothing half-written under a final name: all is made in a temporary folder beside it and renamed at the end."""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq_moe_opt.errors import CheckpointError


def staging_place(folder: Path) -> Path:
    """Where to make what is to lie in ``folder``: there, or beside it when it does not exist yet.

    Raises CheckpointError when the folder above does not exist either.
    """
    wanted = folder.absolute()
    place = wanted if wanted.is_dir() else wanted.parent
    if not place.is_dir():
        raise CheckpointError(folder, f"cannot be made: folder {place} does not exist")
    return place


@contextmanager
def temporary_folder(place: Path, name: str = "moe-opt") -> Iterator[Path]:
    """A folder in ``place`` that is gone afterwards, unless the block has renamed it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=place))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` (free, or an empty folder) that takes its name if all goes well."""
    with temporary_folder(target.absolute().parent, target.name) as folder:
        yield folder
        os.rename(folder, target.absolute())


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` if all goes well: all of them, or none.

    A file that is there already stays if it is the same; CheckpointError if it is another.
    """
    with temporary_folder(staging_place(folder)) as made:
        yield made
        if folder.is_dir():
            _move_all(made, folder)
        else:
            os.rename(made, folder.absolute())


def _move_all(made: Path, folder: Path) -> None:
    moves = [(found, folder / found.name) for found in sorted(made.iterdir())]
    for source, target in moves:
        if target.exists() and not filecmp.cmp(source, target, shallow=False):
            raise CheckpointError(target, "exists already and is another; convert into a folder of its own")
    done: list[Path] = []
    try:
        for source, target in moves:
            if not target.exists():
                os.rename(source, target)
                done.append(target)
    except BaseException:
        for target in done:
            target.unlink(missing_ok=True)
        raise
