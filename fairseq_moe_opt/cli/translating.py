"""The body of ``moe-opt translate``: everything that can be wrong is found before the first weight is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
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
from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.options import MoEOptions

if TYPE_CHECKING:
    from hf_integration.expert_parallel import ExpertParallel
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

    @property
    def form(self) -> str:
        """What the lines that come out depend on beside the fields above, in words."""
        return ""

    def check_model(self) -> None:
        """InputError where the checkpoint is not for this kind of work."""
        from hf_integration.translate import is_language_model

        if is_language_model(self.checkpoint):
            raise InputError(f"{self.checkpoint}: is a language model, which translates nothing: see moe-opt generate")

    def lines(
        self, model: Any, tokenizer: Any, lines: Iterable[str], lines_before: int = 0, **told: Callable[[Any], None]
    ) -> Iterator[str]:
        """A line out for each of ``lines``, before which there were ``lines_before``."""
        from hf_integration.translate import translate_lines

        return translate_lines(
            model,
            tokenizer,
            lines,
            *self.languages,
            batch_size=self.batch_size,
            generation=self.generation,
            on_progress=told.get("on_progress"),
            on_truncated=told.get("on_truncated"),
        )

    def truncation_message(self, cut: Truncation) -> str:
        """One line on a line that was too long."""
        return (
            f"line {cut.line} has {cut.tokens:,} tokens, more than the {cut.limit:,} this model takes, "
            "and is cut there; split it into sentences to translate all of it"
        )


@dataclass(frozen=True)
class Output:
    """Where translations go: ``write`` takes the next line; ``kept`` lines of an earlier run are there already."""

    kept: int
    write: Callable[[str], None]


@contextmanager
def whole_output(destination: Path | None) -> Iterator[Output]:
    """All lines in one go."""
    with line_writer(destination) as write:
        yield Output(0, write)


@dataclass(frozen=True)
class Part:
    """What a process does of a translation: all of it, or as one of several ranks.

    Attributes:
        parallel: ranks that share the experts and the work.
        output: opens the destination.
        is_shown: whether it draws progress.
    """

    parallel: ExpertParallel | None = None
    output: Callable[[Path | None], AbstractContextManager[Output]] = whole_output
    is_shown: bool = True


def translate_file(job: Translation, say: Callable[[str], None], part: Part = Part()) -> None:
    """Do ``part`` of ``job``; ``say`` gets warnings and notes, one line each."""
    options = MoEOptions.from_kwargs(**job.options)
    total = _check_files(job, options, say)
    model, tokenizer = load_model(job, part)
    warnings = Warnings(say)
    with (
        open_lines(job.source) as stream,
        part.output(job.destination) as output,
        line_progress(total, is_shown=part.is_shown) as advance,
    ):
        advance(output.kept)
        for line in job.lines(
            model,
            tokenizer,
            islice(decoded(stream, job.source), output.kept, None),
            output.kept,
            on_progress=advance,
            on_truncated=lambda cut: warnings.add(job.truncation_message(replace(cut, line=cut.line + output.kept))),
        ):
            output.write(line)
    warnings.finish()
    if options.profile is True:
        report = model.moe.report()
        steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.step_seconds.items())
        say(f"{report.seconds:.2f} s, of which in Mixture-of-Experts layers: {steps}")


def load_model(job: Translation, part: Part = Part()) -> tuple[Any, Any]:
    """The model and the tokenizer of ``part`` of ``job``; what is wrong with its device or languages is found first."""
    import torch

    from hf_integration import from_pretrained
    from hf_integration.text import check_languages
    from hf_integration.translate import choose_device, choose_dtype, load_tokenizer, quiet_host

    quiet_host()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    job.check_model()
    device = choose_device(job.device)
    dtype = choose_dtype(job.checkpoint, job.dtype, device)
    tokenizer = load_tokenizer(job.checkpoint)
    check_languages(tokenizer, *job.languages)
    with status(f"loading {job.checkpoint}", is_shown=part.is_shown):
        model = from_pretrained(job.checkpoint, dtype=dtype, device=device, parallel=part.parallel, **job.options)
    return model, tokenizer


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
