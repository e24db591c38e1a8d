"""What expert parallelism sends, and how long that takes: uneven all-to-all beside static gating's padded one.

Both run in the same processes on gloo, over the same tokens, routing and experts; their layers' outputs are compared,
what they hand to collectives is counted and checked against the paper's k*S*D and E*C*D, then they take turns for
several rounds. Times are those of the slowest rank, medians over rounds, ratios taken within a round. Routing is even
and ranks have equal numbers of tokens, which suits the padded side. A cost model fitted to plain all-to-alls of the
same run then predicts more ranks: predictions, not measurements, and of a network like this machine's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from _exchange_model import CostModel, Sample, fit
from _exchange_ranks import PADDED, UNEVEN, Measured, Setting, measure
from _machine import write_results
from rich.console import Console
from rich.table import Table

RANKS = (2, 4)
PAPER_SIZES = (Setting(128, 1.0, tokens=1024, width=2048), Setting(512, 0.05, tokens=1024, width=1024))
"""Layers of the paper's translation and language models, with 1024 tokens a rank: predicted only."""

PREDICTED_RANKS = (8, 16, 32, 64, 128, 256, 512)
TABLE_WIDTH = 140
TOLERANCE = 1e-5
RESULTS = Path(__file__).resolve().parent / "results" / "exchange.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class BenchmarkError(Exception):
    """The sides differ in their output, or hand over something else than they should."""


@dataclass(frozen=True)
class Row:
    """One side with one number of ranks.

    Attributes:
        side: ``uneven all-to-all`` or ``padded all-to-all``.
        num_ranks, num_experts, capacity: W, E, C.
        elements: numbers a rank hands over in each direction, its own share included; the same on every rank.
        bytes_there, bytes_back: the same in bytes, to the experts and back.
        bytes_leaving: of both directions and the sizes, those that leave a rank; the most of any rank.
        seconds: of every round, the slowest rank's.
        difference: of the two sides' outputs, relative; the largest of any rank.
    """

    side: str
    num_ranks: int
    num_experts: int
    capacity: int
    elements: int
    bytes_there: int
    bytes_back: int
    bytes_leaving: int
    seconds: list[float]
    difference: float


def rows_of(setting: Setting, found: Sequence[Measured]) -> Iterator[Row]:
    """A row a side; BenchmarkError when outputs differ or elements are not exactly the paper's."""
    difference = max(one.difference for one in found)
    if not difference <= TOLERANCE:
        raise BenchmarkError(f"the sides' outputs differ by {difference:.1e}, E={setting.num_experts}")
    for side in (UNEVEN, PADDED):
        check_elements(setting, side, [one.traffic[side] for one in found])
        traffic = found[0].traffic[side]
        yield Row(
            side=side,
            num_ranks=len(found),
            num_experts=setting.num_experts,
            capacity=setting.capacity,
            elements=setting.elements(side),
            bytes_there=traffic["dispatch"]["bytes_sent"],
            bytes_back=traffic["combine"]["bytes_sent"],
            bytes_leaving=max(sum(way["bytes_leaving"] for way in one.traffic[side].values()) for one in found),
            seconds=[max(times) for times in zip(*(one.seconds[side] for one in found), strict=True)],
            difference=difference,
        )


def check_elements(setting: Setting, side: str, by_rank: Sequence[dict[str, dict[str, int]]]) -> None:
    """BenchmarkError unless every rank handed over exactly k*S*D or E*C*D, there and back, and got as much."""
    expected = setting.elements(side)
    for rank, traffic in enumerate(by_rank):
        for direction in ("dispatch", "combine"):
            for what in ("elements_sent", "elements_received"):
                if traffic[direction][what] != expected:
                    raise BenchmarkError(
                        f"{side}, rank {rank}, {direction}: {what} is {traffic[direction][what]}, not {expected}"
                    )


def samples_of(found: Sequence[Measured]) -> list[Sample]:
    """The probes, the slowest rank's of each."""
    peers = len(found) - 1
    probes = zip(*(one.probes for one in found), strict=True)
    return [Sample(peers, ranks[0][0], max(seconds for _, seconds in ranks)) for ranks in probes]


def speedup(rows: Sequence[Row], row: Row) -> float:
    """How many times faster than the padded side of the same ranks and experts: median of ratios within a round."""
    (other,) = (
        one for one in rows if (one.side, one.num_ranks, one.num_experts) == (PADDED, row.num_ranks, row.num_experts)
    )
    return median(theirs / ours for ours, theirs in zip(row.seconds, other.seconds, strict=True))


def measured_table(rows: Sequence[Row], settings: Sequence[Setting]) -> Table:
    """Bytes and times."""
    sizes = settings[0]
    table = Table(
        title=f"a rank's share of one layer's exchange: S={sizes.tokens}, D={sizes.width}, k={sizes.top_k}, float32"
    )
    for heading in ("ranks", "experts", "C"):
        table.add_column(heading, justify="right")
    table.add_column("side", no_wrap=True)
    for heading in (
        "numbers\neach way",
        "KiB each way",
        "KiB that leave\nthe rank, in all",
        "ms there\nand back",
        "x padded",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.num_ranks),
            str(row.num_experts),
            str(row.capacity) if row.side == PADDED else "",
            row.side,
            f"{row.elements:,}",
            f"{row.bytes_there / 1024:,.0f}",
            f"{row.bytes_leaving / 1024:,.0f}",
            f"{1e3 * median(row.seconds):.2f}",
            f"{speedup(rows, row):.2f}",
            end_section=row.side == PADDED,
        )
    return table


def predictions(model: CostModel, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """What ``model`` says of more ranks; none for more ranks than experts, or ranks that do not divide them."""
    return [
        {
            "kind": "prediction",
            "num_ranks": num_ranks,
            "num_experts": setting.num_experts,
            "capacity": setting.capacity,
            "tokens": setting.tokens,
            "width": setting.width,
            "seconds": {side: model.predict(setting, side, num_ranks) for side in (UNEVEN, PADDED)},
        }
        for setting in settings
        for num_ranks in PREDICTED_RANKS
        if setting.num_experts % num_ranks == 0
    ]


def predicted_table(predicted: Sequence[dict[str, Any]], model: CostModel) -> Table:
    """Marked as what it is."""
    table = Table(
        title=(
            f"PREDICTIONS, not measured: {1e6 * model.latency:.0f} us a message, {model.bandwidth / 1e6:,.0f} MB/s a "
            f"rank (median error of the fit {model.error:.0%})"
        )
    )
    for heading in ("experts", "S", "D", "ranks", f"{UNEVEN}, ms", f"{PADDED}, ms", "x padded"):
        table.add_column(heading, justify="right")
    for one in predicted:
        uneven, padded = one["seconds"][UNEVEN], one["seconds"][PADDED]
        table.add_row(
            *(str(one[name]) for name in ("num_experts", "tokens", "width", "num_ranks")),
            f"{1e3 * uneven:.2f}",
            f"{1e3 * padded:.2f}",
            f"{padded / uneven:.2f}",
            end_section=one["num_ranks"] == max(PREDICTED_RANKS) or one["num_ranks"] == one["num_experts"],
        )
    return table


@app.command()
def main(
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="processes; repeat for more")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each rank; 2 * tokens must be a multiple of 512")] = 256,
    width: Annotated[int, typer.Option(min=1, help="model width D")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="rounds, in each of which both sides run once")] = 15,
    seed: Annotated[int, typer.Option(help="of tokens, routing and experts")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="few experts: shows that all runs, measures nothing")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="where results go [default: results/exchange.json, none if quick]")
    ] = None,
) -> None:
    """Count and time both exchanges, then predict larger worlds."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    sizes = ((8, 1.0), (16, 0.25)) if quick else ((128, 1.0), (512, 0.05))
    settings = [Setting(num_experts, fraction, tokens, width) for num_experts, fraction in sizes]
    for setting in settings:
        if setting.top_k * tokens % setting.num_experts:
            raise typer.BadParameter(f"2 * {tokens} is not a multiple of {setting.num_experts}", param_hint="--tokens")
    worlds = tuple(ranks or RANKS)
    rows: list[Row] = []
    samples: list[Sample] = []
    for setting in settings:
        for num_ranks in worlds:
            with console.status(f"{num_ranks} ranks, {setting.num_experts} experts"):
                found = measure(setting, num_ranks, rounds, seed)
            rows += rows_of(setting, found)
            samples += samples_of(found)
    model = fit(samples)
    predicted = predictions(model, settings if quick else (*settings, *PAPER_SIZES))
    console.print(measured_table(rows, settings))
    console.print(predicted_table(predicted, model))
    target = json_file or (None if quick else RESULTS)
    if target is not None:
        arguments = {"ranks": worlds, "tokens": tokens, "width": width, "rounds": rounds, "seed": seed}
        content = [{"kind": "measured", **asdict(row), "times_padded": speedup(rows, row)} for row in rows]
        content += [{"kind": "probe", **asdict(sample)} for sample in samples]
        write_results(target, {}, arguments, [*content, {"kind": "model", **asdict(model)}, *predicted])


if __name__ == "__main__":
    app()
