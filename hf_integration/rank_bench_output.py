"""What ``launch bench`` prints: rates of every way, and what each rank had to do."""

from __future__ import annotations

import statistics

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.sizes import readable
from hf_integration.rank_bench import BenchResult


def render(result: BenchResult, console: Console) -> None:
    """Two tables."""
    first = result.ways[0]
    console.print(
        f"{result.sentences:,} sentences, {result.source_tokens:,} tokens in, {result.target_tokens:,} out, "
        f"{len(first.ranks)} ranks; every way gave the same tokens",
        highlight=False,
    )
    console.print(_rates(result))
    console.print(_ranks(result))


def _rates(result: BenchResult) -> Table:
    rounds = len(result.ways[0].encoder_seconds)
    title = f"tokens a second of all ranks together, medians of {rounds} turns each"
    table = _table(title, ("exchange", "placement"), ("encoder", "decoder", "seconds a turn"))
    for way in result.ways:
        seconds = statistics.median(map(sum, zip(way.encoder_seconds, way.decoder_seconds, strict=True)))
        table.add_row(
            way.exchange, way.placement, f"{way.encoder_rate:,.0f}", f"{way.decoder_rate:,.0f}", f"{seconds:.2f}"
        )
    return table


def _ranks(result: BenchResult) -> Table:
    title = "what each rank did, in one turn more in which ranks meet before every exchange"
    table = _table(
        title,
        ("exchange", "placement"),
        ("rank", "encoder rows", "decoder rows", "sent", "exchanging", "waiting"),
    )
    for way in result.ways:
        for rank, share in enumerate(way.ranks):
            table.add_row(
                way.exchange,
                way.placement,
                str(rank),
                f"{way.load(rank, 'encoder'):.1%}",
                f"{way.load(rank, 'decoder'):.1%}",
                readable(share.bytes_leaving),
                f"{share.exchange_seconds:.2f} s",
                f"{share.waiting_seconds:.2f} s",
                end_section=rank == len(way.ranks) - 1,
            )
    return table


def _table(title: str, names: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in (*names, *numbers):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    return table
