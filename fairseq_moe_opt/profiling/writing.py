"""A profile on disk: ``profile.json``, a PNG a picture, ``index.html`` with all of it, and the traces."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import write_trace
from fairseq_moe_opt.profiling.findings import findings
from fairseq_moe_opt.profiling.page import page
from fairseq_moe_opt.profiling.plots import draw, require_matplotlib
from fairseq_moe_opt.profiling.profile import Profile

JSON_NAME, PAGE_NAME = "profile.json", "index.html"
_DPI = 110


def check_folder(folder: Path, option: str) -> None:
    """InputError unless a profile can be written to ``folder``, and MoEError without matplotlib: before the work."""
    require_matplotlib()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder}: is a file; a folder is wanted")
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{option} {folder}: cannot be written: permission denied")


def write_profile(profile: Profile, folder: Path) -> list[Path]:
    """Write ``profile`` to ``folder``, which is made if need be; returns the files, the page first.

    Files that an earlier profile left there are written over, and pictures it had more are taken away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, bytes] = {}
    for name, figure in draw(profile):
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI)
        pictures[name] = stream.getvalue()
    content = {**profile.to_dict(), "findings": findings(profile)}
    files = {
        PAGE_NAME: page(profile, pictures).encode("utf-8"),
        JSON_NAME: (json.dumps(content, indent=1) + "\n").encode("utf-8"),
        **{f"{name}.png": one for name, one in pictures.items()},
    }
    _forget_earlier(folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    written = [folder / name for name in files]
    for one in profile.inputs:
        path = folder / f"trace-{file_name(one.label)}.json"
        write_trace(one.trace, path)
        written.append(path)
    return written


def file_name(label: str) -> str:
    """``label`` with nothing in it that a file's name should not have."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-.") or "input"


def _forget_earlier(folder: Path) -> None:
    """Pictures and traces of an earlier profile: one that said so in its own words, and lists them by its kinds."""
    if not (folder / JSON_NAME).is_file():
        return
    kinds = "time|memory|heat-.*|loads-.*|skew|reuse|correlation-.*|experts"
    for path in folder.iterdir():
        if re.fullmatch(rf"(?:{kinds})\.png|trace-.*\.json", path.name):
            path.unlink()
