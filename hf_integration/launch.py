"""``python -m hf_integration.launch``: the commands of ``moe-opt`` that several ranks can do together.

Started by ``torchrun`` or ``accelerate launch``, once a rank. Ranks share the experts, and each translates batches of
its own; the files look as if one process had written them.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import distributed as dist

from fairseq_moe_opt.checkpoints import checkpoint_fingerprint, open_index
from fairseq_moe_opt.cli import commands, generate_command
from fairseq_moe_opt.cli.flags import taking
from fairseq_moe_opt.cli.generating import Generation
from fairseq_moe_opt.cli.journal import journaled_output, read_journal
from fairseq_moe_opt.cli.text_files import STANDARD, check_destination, decoded, open_lines
from fairseq_moe_opt.cli.translating import Output, Part, Translation, translate_file
from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.parallel import (
    ALL_REDUCE,
    ALL_TO_ALL,
    ProcessGroupRanks,
    agree,
    follow_first,
    one_message,
    own_device,
)
from fairseq_moe_opt.placement import read_placement
from hf_integration import rank_bench, rank_bench_output
from hf_integration.expert_parallel import ExpertParallel
from hf_integration.loading import local_folder, read_config
from hf_integration.text import check_languages, is_blank, source_limit
from hf_integration.translate import WINDOW_BATCHES, choose_dtype, encode_texts, load_tokenizer, quiet_host
from hf_integration.world import join_world

app = typer.Typer(name="python -m hf_integration.launch", add_completion=False, pretty_exceptions_enable=False)


class Exchange(str, enum.Enum):
    """How ranks share their work."""

    ALL_TO_ALL = ALL_TO_ALL
    ALL_REDUCE = ALL_REDUCE


PlacementFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="which rank holds which expert; default: in order, equal parts")
]
ExchangeName = Annotated[
    Exchange,
    typer.Option(
        help="all-to-all: every rank has batches of its own; all-reduce: all compute each batch together, for few "
        "lines at a time"
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where a run that was stopped has left off")]
Timeout = Annotated[float, typer.Option(min=1.0, help="seconds after which a rank that is silent is given up")]


@app.callback()
def root() -> None:
    """Run on several ranks, which share the experts: start with torchrun or accelerate launch."""


@app.command()
@taking(commands.translation)
def translate(
    job: Translation,
    placement: PlacementFile = None,
    exchange: ExchangeName = Exchange.ALL_TO_ALL,
    resume: Resume = False,
    timeout: Timeout = 600,
) -> None:
    """Translate a file on several ranks; as moe-opt translate, and resumable."""
    _on_all_ranks(job, placement, exchange, resume, timeout)


@app.command()
@taking(generate_command.generation)
def generate(
    job: Generation,
    placement: PlacementFile = None,
    exchange: ExchangeName = Exchange.ALL_TO_ALL,
    resume: Resume = False,
    timeout: Timeout = 600,
) -> None:
    """Continue a file of prompts with a language model on several ranks; as moe-opt generate, and resumable."""
    _on_all_ranks(job, placement, exchange, resume, timeout)


def _on_all_ranks(job: Translation, placement: Path | None, exchange: Exchange, resume: bool, timeout: float) -> None:
    if job.source == STANDARD or job.destination is None:
        raise InputError("ranks read the text and write the results as files: give FILE and -o OUT")
    device = own_device(job.device)
    ranks = join_world(device, timeout)
    with one_message(typer.Exit(commands.BAD_INPUT)), ranks.watched():
        parallel = _parallel(ranks, placement, exchange)
        _translate(replace(job, device=str(device)), job.destination, ranks, parallel, resume)
    dist.destroy_process_group()


@app.command()
@taking(commands.translation)
def bench(
    job: Translation,
    placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="placement to compare with experts in order, equal parts")
    ] = None,
    exchange: Annotated[
        list[Exchange] | None, typer.Option(help="only this exchange; repeat for more; default: both")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed turns of each way")] = 3,
    sentences: Annotated[int, typer.Option(min=1, help="sentences to make up where no FILE is given")] = 64,
    length: Annotated[int, typer.Option(min=1, help="tokens of a made-up sentence, and of its translation")] = 24,
    timeout: Timeout = 600,
) -> None:
    """Time a translation on these ranks: each exchange, without and with a placement. -o writes JSON.

    All ways are in memory at once, and have to give the same tokens before any is timed.
    """
    for name in ("report", "trace"):
        if job.options.get(name) is not None:
            raise InputError(f"--moe-{name} has no effect here: give it to translate")
    device = own_device(job.device)
    ranks = join_world(device, timeout)
    with one_message(typer.Exit(commands.BAD_INPUT)), ranks.watched():
        found = None if placement is None else read_placement(placement, num_ranks=ranks.size)
        placements = (None,) if found is None else (None, found)
        ways = [rank_bench.Way(one.value, where) for where in placements for one in exchange or Exchange]
        quiet_host()
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        work = _bench_work(job, device, (sentences, length))
        loading = {"dtype": choose_dtype(job.checkpoint, job.dtype, device), "device": device, **job.options}
        result = rank_bench.measure(job.checkpoint, loading, work, ways, ranks, rounds)
        if ranks.rank == 0:
            rank_bench_output.render(result, commands.output_console())
            if job.destination is not None:
                job.destination.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def _parallel(ranks: ProcessGroupRanks, placement: Path | None, exchange: Exchange) -> ExpertParallel | None:
    """How the experts are spread; None where one process has them all."""
    found = None if placement is None else read_placement(placement, num_ranks=ranks.size)
    return None if ranks.size == 1 else ExpertParallel(ranks, found, exchange.value)


def _translate(
    job: Translation, destination: Path, ranks: ProcessGroupRanks, parallel: ExpertParallel | None, resume: bool
) -> None:
    is_first = ranks.rank == 0
    check_destination(destination, "-o")
    content = _content(job)
    agree(ranks, content)
    window = job.batch_size * WINDOW_BATCHES
    kept = read_journal(destination, content, window) if resume and is_first else []
    kept = follow_first(ranks, kept)
    output = partial(journaled_output, job=content, kept=kept) if is_first else partial(_no_output, kept=len(kept))
    translate_file(job, commands.say if is_first else _say_nothing, Part(parallel, output, is_first))


def _bench_work(job: Translation, device: torch.device, made_up: tuple[int, int]) -> rank_bench.Work:
    """The sentences of the file, or made-up ones, so many of so many tokens, and as many tokens of each translation."""
    tokenizer = load_tokenizer(job.checkpoint)
    check_languages(tokenizer, *job.languages)
    config = read_config(local_folder(job.checkpoint))
    how = {} if (limit := source_limit(config)) is None else {"truncation": True, "max_length": limit}
    languages = dict(zip(("src_lang", "tgt_lang"), job.languages, strict=True))
    generation, texts = dict(job.generation), ["."]  # one is enough for the language's token
    if job.source != STANDARD:
        with open_lines(job.source) as stream:
            texts = [line for line in decoded(stream, job.source) if not is_blank(line)]
        if not texts:
            raise InputError(f"{job.source}: has no line to translate, so there is nothing to time")
    rows, forced = encode_texts(tokenizer, texts, languages, **how)
    if job.source == STANDARD:
        count, length = made_up
        rows = rank_bench.made_up_rows(count, min(length, limit or length), config.vocab_size)
        generation |= {"min_new_tokens": length, "max_new_tokens": length}
    padding = tokenizer.pad_token_id or 0
    batches = rank_bench.text_batches(rows, job.batch_size, padding, device)
    return rank_bench.Work(batches, generation, forced, padding)


def _content(job: Translation) -> dict[str, str]:
    """What the translation depends on, by name."""
    with open_lines(job.source) as stream:
        text = hashlib.sha256(stream.read()).hexdigest()
    return {
        "text": text[:16],
        "checkpoint": checkpoint_fingerprint(open_index(local_folder(job.checkpoint))),
        "pair of languages": " to ".join(map(str, job.languages)),
        "batch size": str(job.batch_size),
        "generation setting": str(sorted(job.generation.items())),
        "form": job.form,
        "dtype": str(job.dtype),
    }


@contextmanager
def _no_output(destination: Path, kept: int) -> Iterator[Output]:
    yield Output(kept, _say_nothing)


def _say_nothing(_: str) -> None:
    pass


if __name__ == "__main__":
    code = commands.main(commands=app)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # ranks that failed are not waited for
