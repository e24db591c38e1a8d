"""The command that measures the paper's tables and figures here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fairseq_moe_opt.cli.commands import app, say


@app.command()
def reproduce(
    quick: Annotated[bool, typer.Option("--quick", help="small models, 10 minutes instead of an hour")] = False,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="for results.json and the pictures")
    ] = Path("reproduction"),
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FILE.md", help="Markdown page to write; default: README.md in the folder"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="SECTION", help="measure this section alone, keep the others; repeat for more"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="NLLB-MoE checkpoint whose routing to record; default: the demo's"),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="draw pictures, or do without matplotlib")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; fewer are faster beside busy processes")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="what to measure; default: the project's own")
    ] = None,
) -> None:
    """Measure the paper's tables and figures on this machine: paper, here, ratio.

    Written section by section: results.json, pictures, and one Markdown page,
    which says what was scaled, what is not reached, and why.
    """
    # Before torch is there: its profiler tells of every start on standard error otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from fairseq_moe_opt.cli.reproducing import Reproduction, run

    if threads is not None:
        torch.set_num_threads(threads)
    scale = "quick" if quick else "full"
    written, missed = run(Reproduction(scale, output, page, tuple(only or ()), model, plots, plan), say)
    for line in missed:
        say(f"not reached: {line.what}: {line.here}, paper {line.paper.text}")
    typer.echo(f"{written}: written")
