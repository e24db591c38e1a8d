"""The body of ``moe-opt translate``: everything that can be wrong is found before the first weight is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq_moe_opt.cli.progress import Warnings, line_progress, status
from fairseq_moe_opt.cli.text_files import (
    STANDARD,
    check_destination,
    checked_line_count,
    decoded,
    line_writer,
    open_lines,
)
from fairseq_moe_opt.options import MoEOptions

if TYPE_CHECKING:
    from hf_integration.translate import Truncation


@dataclass(frozen=True)
class Translation:
    """What to translate, with what, to where; ``source`` may be ``-``, ``destination`` None is standard output."""

    checkpoint: str
    source: str
    destination: Path | None
    languages: tuple[str | None, str | None]
    batch_size: int
    generation: Mapping[str, Any]
    dtype: str | None
    device: str | None
    threads: int | None
    options: Mapping[str, Any]


def translate_file(job: Translation, say: Callable[[str], None]) -> None:
    """Do ``job``; ``say`` gets warnings and notes, one line each."""
    options = MoEOptions.from_kwargs(**job.options)
    total = _check_files(job, options, say)
    from hf_integration.translate import translate_lines

    model, tokenizer = load_model(job)
    warnings = Warnings(say)
    with (
        open_lines(job.source) as stream,
        line_writer(job.destination) as write,
        line_progress(total) as advance,
    ):
        for line in translate_lines(
            model,
            tokenizer,
            decoded(stream, job.source),
            *job.languages,
            batch_size=job.batch_size,
            generation=job.generation,
            on_progress=advance,
            on_truncated=lambda cut: warnings.add(truncation_message(cut)),
        ):
            write(line)
    warnings.finish()
    if options.profile:
        report = model.moe.report()
        steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.step_seconds.items())
        say(f"{report.seconds:.2f} s, of which in Mixture-of-Experts layers: {steps}")


def load_model(job: Translation) -> tuple[Any, Any]:
    """The model and the tokenizer of ``job``; what is wrong with its device or languages is found first."""
    import torch

    from hf_integration import from_pretrained
    from hf_integration.text import check_languages
    from hf_integration.translate import choose_device, choose_dtype, load_tokenizer, quiet_host

    quiet_host()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = choose_device(job.device)
    dtype = choose_dtype(job.checkpoint, job.dtype, device)
    tokenizer = load_tokenizer(job.checkpoint)
    check_languages(tokenizer, *job.languages)
    with status(f"loading {job.checkpoint}"):
        return from_pretrained(job.checkpoint, dtype=dtype, device=device, **job.options), tokenizer


def truncation_message(cut: Truncation) -> str:
    """One line on a line that was too long."""
    return (
        f"line {cut.line} has {cut.tokens:,} tokens, more than the {cut.limit:,} this model takes, "
        "and is cut there; split it into sentences to translate all of it"
    )


def _check_files(job: Translation, options: MoEOptions, say: Callable[[str], None]) -> int | None:
    """InputError for a text that cannot be read or a file that could not be written; the number of lines if known."""
    if job.destination is not None:
        check_destination(job.destination, "-o")
    if options.report is not None:
        check_destination(Path(options.report), "--moe-report")
    if job.source == STANDARD and sys.stdin.isatty():
        say("reading from the terminal, a sentence a line; Ctrl-D ends the text")
    total = checked_line_count(job.source)
    if total is None:
        with open_lines(job.source):
            pass
    return total
