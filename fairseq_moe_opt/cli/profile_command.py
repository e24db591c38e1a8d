"""``moe-opt profile``: where a model's time and memory go, and which experts texts and languages ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fairseq_moe_opt.cli.commands import BatchSize, Checkpoint, ComputeDtype, Device, SrcLang, Threads, app, say
from fairseq_moe_opt.cli.flags import with_moe_flags


@app.command()
@with_moe_flags(
    "gating",
    "capacity",
    "kernel",
    "expert_dtype",
    "expert_memory",
    "host_memory",
    "eviction",
    "expert_pool",
    "prefetch",
    "host_compute",
)
def profile(
    path: Checkpoint,
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help="UTF-8 texts, a sentence a line, to compare")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="folder to write")],
    src_lang: SrcLang = None,
    tgt_lang: Annotated[
        list[str] | None, typer.Option("--tgt-lang", metavar="CODE", help="language to translate to; repeat to compare")
    ] = None,
    batch_size: BatchSize = 16,
    lines: Annotated[int, typer.Option("--lines", min=1, help="lines of each text, the first ones")] = 256,
    num_beams: Annotated[int | None, typer.Option(min=1, help="beams; default: as moe-opt translate")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="most tokens of a translation")] = None,
    dtype: ComputeDtype = None,
    device: Device = None,
    threads: Threads = None,
    *,
    moe_options: dict[str, Any],
) -> None:
    """Time by component, memory of a forward, and who asks for which expert: JSON, pictures and one page.

    Every text in every target language is an input, and all are compared. A
    language model reads the texts; a translation model translates them.
    """
    from fairseq_moe_opt.cli.profiling import ProfileJob, run_profile
    from fairseq_moe_opt.cli.translating import Translation

    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    job = Translation(
        checkpoint=path,
        source=text[0],
        destination=None,
        languages=(src_lang, None),
        batch_size=batch_size,
        generation={name: value for name, value in generation.items() if value is not None},
        dtype=None if dtype is None else dtype.value,
        device=device,
        threads=threads,
        options=moe_options,
    )
    done = run_profile(ProfileJob(job, tuple(text), tuple(tgt_lang or [None]), lines, output), say)
    for sentence in done.findings:
        typer.echo(sentence)
    typer.echo(f"{done.page}: {done.pictures} pictures, and profile.json beside it")
