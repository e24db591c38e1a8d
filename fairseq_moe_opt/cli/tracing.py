"""The body of ``moe-opt trace``: translate or continue a text only to see which experts it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fairseq_moe_opt.cli.generating import for_its_model
from fairseq_moe_opt.cli.progress import Warnings, line_progress
from fairseq_moe_opt.cli.text_files import STANDARD, check_destination, checked_line_count, decoded, open_lines
from fairseq_moe_opt.cli.translating import Translation, load_model
from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.moe.trace import Trace, write_trace
from fairseq_moe_opt.options import MoEOptions

MOST_CHOICES = 8_000_000
"""Choices of single tokens that a trace keeps where they are asked for, at 2 bytes each while recording."""


@dataclass(frozen=True)
class Recording:
    """What to record: ``job`` (its destination is the trace), to each of ``targets``; ``choices`` of tokens too."""

    job: Translation
    targets: Sequence[str | None]
    choices: bool


def record(wanted: Recording, say: Callable[[str], None]) -> Trace:
    """Translate the text to each target language, or continue it with a language model, write the trace, and return it.

    ``say`` gets warnings. Raises InputError for a text or a language that cannot be used, or without any line.
    """
    job = wanted.job
    MoEOptions.from_kwargs(**job.options)
    if job.source == STANDARD and len(wanted.targets) > 1:
        raise InputError("standard input can be read once: give a file to trace several target languages")
    if job.destination is not None:
        check_destination(job.destination, "-o")
    total = checked_line_count(job.source)
    from hf_integration.text import check_languages

    job = for_its_model(job, wanted.targets)
    model, tokenizer = load_model(replace(job, languages=(job.languages[0], wanted.targets[0])))
    for target in wanted.targets:
        check_languages(tokenizer, job.languages[0], target)
    recorder = model.moe.record(choices_limit=MOST_CHOICES if wanted.choices else 0)
    with line_progress(None if total is None else total * len(wanted.targets)) as advance:
        for target in wanted.targets:
            _translate(model, tokenizer, replace(job, languages=(job.languages[0], target)), advance, say)
    trace: Trace = recorder.trace()
    if not trace.visits:
        raise InputError(f"{job.source}: has no line to translate, so there is nothing to record")
    if job.destination is not None:
        write_trace(trace, job.destination)
    return trace


def _translate(
    model: Any, tokenizer: Any, job: Translation, advance: Callable[[int], None], say: Callable[[str], None]
) -> None:
    warnings = Warnings(say)
    with open_lines(job.source) as stream:
        lines = job.lines(
            model,
            tokenizer,
            decoded(stream, job.source),
            on_progress=advance,
            on_truncated=lambda cut: warnings.add(job.truncation_message(cut)),
        )
        for _ in lines:
            pass
    warnings.finish()


def describe(trace: Trace) -> str:
    """One line on what a trace holds."""
    phases = dict.fromkeys(layer.phase for layer in trace.layers)
    counts = ", ".join(f"{len(trace.phase(phase)):,} of the {phase}'s layers" for phase in phases)
    return f"{len(trace.visits):,} forwards ({counts}), model {trace.fingerprint}"
