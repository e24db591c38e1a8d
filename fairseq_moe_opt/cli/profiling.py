"""The body of ``moe-opt profile``: each text in each language once more, looked at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fairseq_moe_opt.cli.generating import for_its_model
from fairseq_moe_opt.cli.progress import Warnings, line_progress, status
from fairseq_moe_opt.cli.text_files import STANDARD, checked_line_count, decoded, open_lines
from fairseq_moe_opt.cli.translating import Translation, load_model
from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.options import MoEOptions

_ALONE_BATCHES = 4
"""Batches in which experts run one at a time."""


@dataclass(frozen=True)
class ProfileJob:
    """What to profile: ``job`` says with what, ``texts`` and ``targets`` are all combined; ``lines`` of each text."""

    job: Translation
    texts: tuple[str, ...]
    targets: tuple[str | None, ...]
    lines: int
    folder: Path


@dataclass(frozen=True)
class Written:
    """What there is to say in the end."""

    page: Path
    pictures: int
    findings: Sequence[str]


@dataclass(frozen=True)
class _Input:
    """Lines in one target language."""

    label: str
    lines: Sequence[str]
    target: str | None


def run_profile(wanted: ProfileJob, say: Callable[[str], None]) -> Written:
    """Profile the model, and write the folder.

    First a batch is run to warm up and to record memory, then some with their experts one at a time; only then are the
    inputs run, timed. Raises InputError for texts, languages or a folder that cannot be used.
    """
    MoEOptions.from_kwargs(**wanted.job.options)
    _quiet_allocator()
    from fairseq_moe_opt.profiling import check_folder, write_profile
    from fairseq_moe_opt.profiling.findings import findings

    check_folder(wanted.folder, "-o")
    inputs = _inputs(wanted)
    from hf_integration.text import check_languages

    job = for_its_model(wanted.job, wanted.targets)
    model, tokenizer = load_model(replace(job, languages=(job.languages[0], wanted.targets[0])))
    for target in wanted.targets:
        check_languages(tokenizer, job.languages[0], target)
    runner = _Runner(model, tokenizer, job, Warnings(say))
    profiler = model.moe.profiler()
    profiler.attach()
    try:
        first = [line for line in inputs[0].lines if line.strip()][: wanted.job.batch_size * _ALONE_BATCHES]
        with status("warming up"):
            profiler.record_memory()
            for _ in range(2):
                runner.run(replace(inputs[0], lines=first[: wanted.job.batch_size]))
            with profiler.one_by_one():
                runner.run(replace(inputs[0], lines=first))
        with line_progress(sum(len(one.lines) for one in inputs)) as advance:
            for one in inputs:
                start = time.perf_counter()
                with profiler.input(one.label) as recorded:
                    runner.run(one, advance)
                recorded.seconds += time.perf_counter() - start
    finally:
        profiler.detach()
    runner.warnings.finish()
    profile = model.moe.profile_of(profiler)
    with status("drawing"):
        files = write_profile(profile, wanted.folder)
    return Written(files[0], sum(file.suffix == ".png" for file in files), findings(profile))


@dataclass(frozen=True)
class _Runner:
    """Has the model read or translate lines, and throws away what comes of it."""

    model: Any
    tokenizer: Any
    job: Translation
    warnings: Warnings

    def run(self, one: _Input, advance: Callable[[int], None] = lambda _: None) -> None:
        if not getattr(self.model.config, "is_encoder_decoder", False):
            from hf_integration.reading import read_lines

            read_lines(self.model, self.tokenizer, one.lines, self.job.batch_size, advance)
            return
        from hf_integration.translate import translate_lines

        translations = translate_lines(
            self.model,
            self.tokenizer,
            one.lines,
            self.job.languages[0],
            one.target,
            batch_size=self.job.batch_size,
            generation=self.job.generation,
            on_progress=advance,
            on_truncated=lambda cut: self.warnings.add(self.job.truncation_message(cut)),
        )
        for _ in translations:
            pass


def _inputs(wanted: ProfileJob) -> list[_Input]:
    """Every text in every language, each with a label of its own; InputError for a text without a line."""
    if STANDARD in wanted.texts:
        raise InputError("a text is read several times: give files, not standard input")
    found = []
    for text, name in zip(wanted.texts, _text_names(wanted.texts), strict=True):
        lines = list(_lines(text, wanted.lines))
        if not any(line.strip() for line in lines):
            raise InputError(f"{text}: has no line to profile with")
        for target in dict.fromkeys(wanted.targets):
            named = target if target is not None and len(wanted.texts) == 1 else name
            both = f"{name} to {target}" if target is not None and len(wanted.texts) > 1 else named
            found.append(_Input(both, lines, target))
    return found


def _lines(text: str, most: int) -> Iterator[str]:
    checked_line_count(text)
    with open_lines(text) as stream:
        yield from islice(decoded(stream, text), most)


def _text_names(texts: Sequence[str]) -> list[str]:
    """Names of files without what is the same for all; whole paths where that is not enough."""
    names = [Path(text).stem for text in texts]
    if len(set(names)) == len(names):
        return names
    if len(set(texts)) < len(texts):
        raise InputError("the same text is given twice: there would be nothing to compare")
    return list(texts)


def _quiet_allocator() -> None:
    """torch warns, once, of every release of what was allocated before memory was recorded: all weights are."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
