"""Files that the system holds no copy of, so that reading them starts cold."""

from __future__ import annotations

import os
from pathlib import Path

from fairseq_moe_opt.checkpoints.ranges import drop_pages


def forget(path: Path) -> None:
    """Have the system drop its copy of a file, once it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        drop_pages(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def forget_folder(folder: Path) -> None:
    """The same of every file in ``folder``, at any depth."""
    for path in folder.rglob("*"):
        if path.is_file():
            forget(path)
