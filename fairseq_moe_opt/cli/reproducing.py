"""The body of ``moe-opt reproduce``: the demo's routing is recorded here, because it takes Transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_moe_opt.cli.tracing import Recording, record
from fairseq_moe_opt.cli.translating import Translation
from fairseq_moe_opt.moe.trace import Trace
from fairseq_moe_opt.presets import configs_folder
from fairseq_moe_opt.reproduction import Context, Line, read_plan, reproduce
from fairseq_moe_opt.reproduction.runner import Output, page_in

BATCH_SIZE = 16


@dataclass(frozen=True)
class Reproduction:
    """What to measure, and where to.

    Attributes:
        scale: of the plan.
        folder, page: results and pictures; the Markdown page, in the folder if not given.
        only: sections, all if none.
        model: checkpoint whose routing is recorded; None for the demo's, where it is.
        plots: whether to draw.
        plan: a file, or None for the project's.
    """

    scale: str
    folder: Path
    page: Path | None
    only: tuple[str, ...]
    model: Path | None
    plots: bool
    plan: Path | None


def run(wanted: Reproduction, say: Callable[[str], None]) -> tuple[Path, list[Line]]:
    """Measure and write; returns the page, and the lines that are not reached."""
    plan = read_plan(wanted.scale, wanted.plan)
    context = Context(plan, lambda: record_demo(wanted.model or demo_model(), plan.languages, say), say)
    output = Output(wanted.folder, wanted.page or page_in(wanted.folder), wanted.plots)
    sections = reproduce(context, output, wanted.only)
    return output.page, [line for section in sections for line in section.lines if line.is_reached is False]


def demo_model() -> Path | None:
    """The demo checkpoint, in this folder or in the checkout that runs; None where there is none."""
    for root in (Path(), Path(__file__).resolve().parents[2]):
        folder = root / "examples" / "demo" / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def record_demo(model: Path | None, languages: Sequence[str], say: Callable[[str], None]) -> Trace | None:
    """Translate the project's own sentences greedily from the first language to the others; see who is asked for."""
    if model is None:
        return None
    job = Translation(
        checkpoint=str(model),
        source=str(sentences_path()),
        destination=None,
        languages=(languages[0], None),
        batch_size=BATCH_SIZE,
        generation={"num_beams": 1},
        dtype="float32",
        device="cpu",
        threads=None,
        options={},
    )
    return record(Recording(job, languages[1:], choices=False), say)


def sentences_path() -> Path:
    """The sentences that the demo's routing is recorded on."""
    return configs_folder() / "reproduce_sentences.txt"
