"""``python -m hf_integration.launch``: the commands of ``moe-opt`` that several ranks can do together.

Started by ``torchrun`` or ``accelerate launch``, once a rank. Ranks share the experts, and each translates batches of
its own; the files look as if one process had written them.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
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
from fairseq_moe_opt.cli.text_files import STANDARD, check_destination, open_lines
from fairseq_moe_opt.cli.translating import Output, Part, Translation, translate_file
from fairseq_moe_opt.errors import InputError, ParallelError
from fairseq_moe_opt.parallel import ProcessGroupRanks, agree, follow_first
from fairseq_moe_opt.placement import read_placement
from hf_integration.expert_parallel import ExpertParallel
from hf_integration.loading import local_folder
from hf_integration.translate import WINDOW_BATCHES

app = typer.Typer(name="python -m hf_integration.launch", add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Run on several ranks, which share the experts: start with torchrun or accelerate launch."""


@app.command()
@taking(commands.translation)
def translate(
    job: Translation,
    placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="which rank holds which expert; default: in order, equal parts")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a run that was stopped has left off")] = False,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="seconds after which a rank that is silent is given up")
    ] = 600,
) -> None:
    """Translate a file on several ranks; as moe-opt translate, and resumable."""
    _on_all_ranks(job, placement, resume, timeout)


@app.command()
@taking(generate_command.generation)
def generate(
    job: Generation,
    placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="which rank holds which expert; default: in order, equal parts")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a run that was stopped has left off")] = False,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="seconds after which a rank that is silent is given up")
    ] = 600,
) -> None:
    """Continue a file of prompts with a language model on several ranks; as moe-opt generate, and resumable."""
    _on_all_ranks(job, placement, resume, timeout)


def _on_all_ranks(job: Translation, placement: Path | None, resume: bool, timeout: float) -> None:
    if job.source == STANDARD or job.destination is None:
        raise InputError("ranks read the text and write the results as files: give FILE and -o OUT")
    device = own_device(job.device)
    ranks = join_world(device, timeout)
    with _one_message(), ranks.watched():
        _translate(replace(job, device=str(device)), job.destination, ranks, placement, resume)
    dist.destroy_process_group()


def own_device(name: str | None) -> torch.device:
    """The device asked for, else this rank's GPU where there are GPUs, else the CPU."""
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name or "cpu")


def join_world(device: torch.device, timeout: float) -> ProcessGroupRanks:
    """The ranks that the launcher has started, or this one alone where there was none; ``timeout`` in seconds.

    Raises ParallelError when a launcher announces more processes than it starts, as accelerate does for ``MULTI_CPU``.
    """
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        raise ParallelError(
            "the launcher was told to start several processes, but has started one that knows of no other: accelerate "
            "does so with distributed_type MULTI_CPU; use MULTI_GPU with use_cpu: true, as configs/accelerate/cpu2.yaml"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, "tcp://127.0.0.1:0", timeout=patience, rank=0, world_size=1)
    return ProcessGroupRanks(device=device, timeout=timeout)


def _translate(
    job: Translation, destination: Path, ranks: ProcessGroupRanks, placement: Path | None, resume: bool
) -> None:
    is_first = ranks.rank == 0
    check_destination(destination, "-o")
    content = _content(job)
    agree(ranks, content)
    found = None if placement is None else read_placement(placement, num_ranks=ranks.size)
    parallel = None if ranks.size == 1 else ExpertParallel(ranks, found)
    window = job.batch_size * WINDOW_BATCHES
    kept = read_journal(destination, content, window) if resume and is_first else []
    kept = follow_first(ranks, kept)
    output = partial(journaled_output, job=content, kept=kept) if is_first else partial(_no_output, kept=len(kept))
    translate_file(job, commands.say if is_first else _say_nothing, Part(parallel, output, is_first))


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


@contextmanager
def _one_message() -> Iterator[None]:
    """Of ranks that fail, let the first one say why; the others stop without a word."""
    try:
        yield
    except Exception:
        if not _fails_first():
            raise typer.Exit(commands.BAD_INPUT) from None
        raise


def _fails_first() -> bool:
    """Whether no other rank has said so before; True as well where that cannot be found out."""
    group = dist.group.WORLD
    try:
        return group is None or int(group.get_group_store().add("launch/failed", 1)) == 1
    except RuntimeError:
        return True


if __name__ == "__main__":
    code = commands.main(commands=app)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # ranks that failed are not waited for
