"""The commands on traces: record one, and learn from it what to cache and where to place experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fairseq_moe_opt.cli.commands import (
    BatchSize,
    Checkpoint,
    ComputeDtype,
    Device,
    SrcLang,
    Threads,
    app,
    output_console,
    say,
)
from fairseq_moe_opt.cli.flags import with_moe_flags


@app.command()
@with_moe_flags("expert_memory", "host_memory", "eviction", "expert_pool", "prefetch")
def trace(
    path: Checkpoint,
    text: Annotated[
        str, typer.Argument(metavar="TEXT|-", help="UTF-8 text to translate or continue, a sentence a line")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="TRACE", help="file to write")],
    src_lang: SrcLang = None,
    tgt_lang: Annotated[
        list[str] | None, typer.Option("--tgt-lang", metavar="CODE", help="language to translate to; repeat for more")
    ] = None,
    batch_size: BatchSize = 16,
    num_beams: Annotated[int | None, typer.Option(min=1, help="beams; default: as moe-opt translate")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="most tokens of a line's result; default: as moe-opt translate or generate"),
    ] = None,
    choices: Annotated[bool, typer.Option("--choices", help="keep the experts of each token, too")] = False,
    dtype: ComputeDtype = None,
    device: Device = None,
    threads: Threads = None,
    *,
    moe_options: dict[str, Any],
) -> None:
    """Record which experts a text asks for, step by step, and their rows: for place, cache and --moe-warm-start."""
    from fairseq_moe_opt.cli.tracing import Recording, describe, record
    from fairseq_moe_opt.cli.translating import Translation

    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    job = Translation(
        checkpoint=path,
        source=text,
        destination=output,
        languages=(src_lang, None),
        batch_size=batch_size,
        generation={name: value for name, value in settings.items() if value is not None},
        dtype=None if dtype is None else dtype.value,
        device=device,
        threads=threads,
        options=moe_options,
    )
    typer.echo(f"{output}: {describe(record(Recording(job, tgt_lang or [None], choices), say))}")


@app.command()
def cache(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="checkpoint that the trace is of")],
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="trace, as --moe-trace records it")],
    pool: Annotated[str, typer.Option(help="global: one cache for all layers; layer: one each")] = "global",
    phase: Annotated[str, typer.Option(help="whose misses to show: encoder, decoder, all")] = "all",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the curves")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Miss rate against cache size, for every policy and for Belady's, which knows the future, from a trace."""
    from fairseq_moe_opt.cli.caching import draw, render_sweep, sweep, sweep_as_json

    found = sweep(path, trace, pool, phase)
    if plot is not None:
        draw(found, plot)
    if as_json:
        typer.echo(sweep_as_json(found))
    else:
        render_sweep(found, output_console())


@app.command("place")
def place_experts(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="trace, as moe-opt trace or --moe-trace records it")],
    ranks: Annotated[int, typer.Option(min=1, help="processes that share the experts")],
    strategy: Annotated[str, typer.Option(help="whose placement to write; the table has all names")] = "balanced",
    spare_slots: Annotated[int, typer.Option(min=0, help="room for replicas, all ranks of a layer together")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="nodes that the ranks are spread over, in order")] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="PATH", help="check that the trace is of it, and count bytes, not rows")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="C", min=1, help="and each rank's misses with C experts of a layer in memory")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="placement to write")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw loads, before and after")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare ways to spread experts over ranks, and write one: which rank holds which expert.

    The first half of the trace places and the second half tests, as in the paper.
    The placement that is written is made by the whole trace.
    """
    from fairseq_moe_opt.cli import placing_output
    from fairseq_moe_opt.cli.placing import PlaceJob, compare
    from fairseq_moe_opt.cli.progress import status
    from fairseq_moe_opt.cli.text_files import check_destination
    from fairseq_moe_opt.placement import write_placement

    for option, target in (("-o", output), ("--plot", plot)):
        if target is not None:
            check_destination(target, option)
    job = PlaceJob(trace, ranks, strategy, spare_slots, nodes, checkpoint, slots)
    with status("placing"):
        found = compare(job)
    if plot is not None:
        placing_output.draw(found, plot)
    if as_json:
        typer.echo(placing_output.as_json(found))
    else:
        placing_output.render(found, job, output_console())
    if output is not None:
        write_placement(found.placement, output)
        say(f"{output}: {strategy}, by all {found.steps:,} steps of the trace, for model {found.placement.fingerprint}")
