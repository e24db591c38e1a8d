"""Section by section: measure, keep, draw, and write the page, so that a run that is killed keeps what it has."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.reproduction.config import Plan
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.drawing import save
from fairseq_moe_opt.reproduction.machine import describe
from fairseq_moe_opt.reproduction.page import Picture, Told, page_of
from fairseq_moe_opt.reproduction.results import Section
from fairseq_moe_opt.reproduction.sections import PARTS, get_part, section_names

RESULTS = "results.json"
_PAGE = "README.md"


@dataclass(frozen=True)
class Output:
    """Where results go.

    Attributes:
        folder: of ``results.json`` and the pictures.
        page: the Markdown page; it links to the pictures by relative paths.
        plots: whether pictures are drawn.
    """

    folder: Path
    page: Path
    plots: bool = True

    def link(self, file: str) -> str:
        """From the page to ``file`` of the folder."""
        return Path(os.path.relpath(self.folder / file, self.page.parent)).as_posix()


def page_in(folder: Path) -> Path:
    """The page's place where nobody chose one."""
    return folder / _PAGE


def reproduce(context: Context, output: Output, only: Sequence[str] = ()) -> list[Section]:
    """Measure the sections ``only`` (none: all) and write each as soon as it is there; returns all of the folder's.

    With ``only``, sections that are in the folder already stay.

    Raises OptionError for a section that does not exist, InputError where the folder's results are of another scale,
    MoEError where static and dynamic gating do not compute the same.
    """
    names = [name for name in section_names() if not only or name in only]
    for name in only:
        get_part(name)
    output.folder.mkdir(parents=True, exist_ok=True)
    kept = _read(output.folder / RESULTS, context.plan.scale_name) if only else {}
    for name in names:
        context.say(f"section {name}")
        started = time.monotonic()
        section = get_part(name).measure(context)
        kept[name] = {
            **section.to_dict(),
            "minutes": round((time.monotonic() - started) / 60, 2),
            "pictures": _draw(section, output),
            "machine": describe(),
        }
        kept = {one: kept[one] for one in section_names() if one in kept}
        _write_whole(
            output.folder / RESULTS,
            json.dumps({"scale": context.plan.scale_name, "plan": asdict(context.plan), "sections": kept}, indent=1)
            + "\n",
        )
        output.page.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(output.page, page_text(context.plan, output, kept))
    return [Section.from_dict(one) for one in kept.values()]


def _draw(section: Section, output: Output) -> list[dict[str, str]]:
    """Draw a section's pictures; file and title of each."""
    found = []
    for file, figure in PARTS[section.name].draw(section.data) if output.plots else ():
        save(figure, output.folder / file)
        found.append({"file": file, "title": figure.axes[0].get_title().replace("\n", ", ")})
    return found


def page_text(plan: Plan, output: Output, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The page on ``sections``, which are those of a ``results.json``."""
    told = []
    for content in sections.values():
        pictures = tuple(Picture(output.link(one["file"]), one["title"]) for one in content["pictures"])
        told.append(Told(Section.from_dict(content), content["machine"], content["minutes"], pictures))
    return page_of(plan, told, output.link(RESULTS))


def _read(path: Path, scale: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, sections = content["scale"], dict(content["sections"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not results of moe-opt reproduce ({error})") from error
    if found != scale:
        raise InputError(f"{path}: has results of scale {found!r}; give another folder for {scale!r}")
    return {name: one for name, one in sections.items() if name in PARTS}


def _write_whole(path: Path, text: str) -> None:
    """To a temporary name first, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
