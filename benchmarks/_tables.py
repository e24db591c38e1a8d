"""Tables of the documentation, each drawn from one result file: what a page quotes is what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

Content = Mapping[str, Any]
"""A result file, as ``json.load`` gives it."""

GENERATE_DECIMALS = 2
TRANSLATION = "translation"
PREFILL_ROWS = 32
KIB, MIB, GIB = 2**10, 2**20, 2**30


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def size(count: float) -> str:
    """Bytes in the unit people read."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / KIB:.0f} KiB"


def share(value: float) -> str:
    """A part of one, in percent."""
    return f"{value:.1%}".replace("%", " %")


def conditions(content: Content) -> str:
    """The line under each table: machine, versions and date."""
    machine, versions = content["machine"], content["versions"]
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "reference" and version)
    device = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    return f"*{device}; {others}; {content['date'][:10]}.*"


def generate(content: Content, *, dtype: str = "float32", batch: str = "") -> str:
    """Speed of each side against Transformers 4.57.1 and 5.x, for one dtype and one batch size or all."""
    rows = [row for row in content["rows"] if row["dtype"] == dtype and (not batch or row["batch"] == int(batch))]
    once: dict[tuple[int, str], Content] = {}
    for row in rows:  # a side that ran again beside the other dtype is shown once
        once.setdefault((row["batch"], row["side"]), row)
    return markdown(
        ["batch", "side", "encoder", "decoder", "of 4.57.1: encoder / decoder / call", "of 5.x", "tokens"],
        ([str(row["batch"]), row["side"], *_speeds(row), *_ratios(row), _verdict(row)] for row in once.values()),
    )


def _speeds(row: Content) -> Iterator[str]:
    for phase in ("encoder", "decoder"):
        yield f"{row['tokens_per_second'][phase]:,.0f}" if row["error"] is None else "failed"


def _ratios(row: Content) -> Iterator[str]:
    for reference in ("4.57.1", "5.x"):
        found = row["ratios"].get(reference, {})
        yield " / ".join(
            f"{found[phase]:.{GENERATE_DECIMALS}f}" for phase in ("encoder", "decoder", "generate") if found
        )


def _verdict(row: Content) -> str:
    if row["verdict"] == "WRONG":
        return f"**WRONG** ({row['token_agreement']:.1%} the same)"
    return row["verdict"] or f"{row['token_agreement']:.1%} the same"


def fairseq_generate(content: Content, *, model: str = TRANSLATION) -> str:
    """Static against dynamic gating through fairseq, one row a setting."""
    rows = [row for row in content["rows"] if row["model"].startswith(model)]
    phases = ["encoder", "all"] if model == TRANSLATION else ["all"]
    names = {"encoder": "encoder", "all": "generation" if model == TRANSLATION else "scoring"}
    headings = ["experts", "batch", "beam" if model == TRANSLATION else "capacity"]
    for phase in phases:
        headings += [f"{names[phase]}: static / dynamic", ""]
    return markdown([*headings, "outputs"], (_fairseq_cells(row, phases) for row in rows))


def _fairseq_cells(row: Content, phases: Sequence[str]) -> list[str]:
    cells = [str(row["experts"]), str(row["batch"])]
    cells.append(str(row["beam"]) if row["model"] == TRANSLATION else row["capacity"])
    for phase in phases:
        speeds = [row["sentences_per_second"][side].get(phase) for side in ("static", "dynamic")]
        cells.append(" / ".join("-" if speed is None else f"{speed:,.1f}" for speed in speeds))
        ratio = row["times_faster"].get(phase)
        cells.append("-" if ratio is None else f"{'> ' if row['at_least'] else ''}{ratio:.1f} x")
    dropped = f"static drops {share(row['static_dropped'])}" if row["static_dropped"] else ""
    return [*cells, ", ".join(filter(None, (row["outputs"], dropped, row["note"])))]


def buffering(content: Content, *, d_model: str) -> str:
    """Speed and memory of buffered experts on one model of the file."""
    (found,) = (model for model in content["rows"] if model["shape"]["d_model"] == int(d_model))
    headings = ["side", "tokens a second", "of resident", "misses", "read a token", "process grew by", "tokens"]
    return markdown(headings, (_buffering_cells(row) for row in found["rows"]))


def _buffering_cells(row: Content) -> list[str]:
    if row["error"] is not None:
        return [row["side"], "failed", "", "", "", "", row["error"]]
    return [
        row["side"],
        f"{row['tokens_per_second']:,.1f}",
        f"{row['of_resident']:.2f}",
        "" if row["miss_rate"] is None else share(row["miss_rate"]),
        "" if row["bytes_per_token"] is None else size(row["bytes_per_token"]),
        size(row["grown_bytes"]),
        "equal" if row["tokens_equal"] else "**WRONG**",
    ]


def nllb54b(content: Content) -> str:
    """Each round and phase of NLLB-MoE-54B's shape in little memory."""
    return markdown(
        ["round", "phase", "tokens a second", "misses", "read a token", "waited", "whole"],
        (
            [
                str(row["round"]),
                row["phase"],
                f"{row['tokens_per_second']:.1f}",
                share(row["miss_rate"]),
                size(row["bytes_per_token"]),
                f"{row['stall_seconds']:.1f} s",
                f"{row['seconds']:.1f} s",
            ]
            for row in content["rows"]
        ),
    )


def exchange(content: Content) -> str:
    """What ranks hand to the collectives, and for how long; predictions are left out."""
    return markdown(
        ["ranks", "experts", "exchange", "elements a rank", "leave the rank", "median time", "as fast as padded"],
        (
            [
                str(row["num_ranks"]),
                str(row["num_experts"]),
                row["side"],
                f"{row['elements']:,}",
                size(row["bytes_leaving"]),
                f"{median(row['seconds']) * 1000:.1f} ms",
                f"{row['times_padded']:.1f} x",
            ]
            for row in content["rows"]
            if row["kind"] == "measured"
        ),
    )


def placement(content: Content, *, ranks: str = "8") -> str:
    """Second-half loads of every strategy without spare slots, by trace, for one number of ranks."""
    rows = [row for row in content["rows"] if row["ranks"] == int(ranks) and not row["spare_slots"]]
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    loads = {(row["trace"], row["strategy"]): row["avg_max_load"] for row in rows}
    return markdown(
        ["trace", *strategies],
        (
            [trace, *(f"{loads[trace, strategy]:.3f}" if (trace, strategy) in loads else "" for strategy in strategies)]
            for trace in dict.fromkeys(row["trace"] for row in rows)
        ),
    )


def int8_quality(content: Content) -> str:
    """What experts of fewer bits cost: translations' scores and how many tokens stay."""
    languages = list(content["rows"][0]["chrf"])
    return markdown(
        ["experts", "their memory", *(f"{language} chrF / BLEU" for language in languages), "identical tokens"],
        (
            [
                row["experts"],
                size(row["expert_bytes"]),
                *(f"{row['chrf'][language]:.1f} / {row['bleu'][language]:.1f}" for language in languages),
                share(row["identical_tokens"]),
            ]
            for row in content["rows"]
        ),
    )


def kernels(content: Content) -> str:
    """Decoding as a share of a plain read, prefill as one of a dense FFN, for the fused kernel and the loop."""
    found: dict[tuple[str, str, str], dict[tuple[str, int], Content]] = {}
    for row in content["rows"]:
        key = (row["shape"], row["dtype"], row["rows_dtype"])
        found.setdefault(key, {})[row["side"], row["rows"]] = row
    headings = ["shape", "experts", "rows", "1 row", "2", "4", "`loop`, 4", "prefill", "`loop`, prefill"]
    return markdown(headings, ([*key, *_kernel_cells(sides)] for key, sides in found.items()))


def _kernel_cells(sides: Mapping[tuple[str, int], Content]) -> Iterator[str]:
    for side, rows in (("fused", 1), ("fused", 2), ("fused", 4), ("loop", 4)):
        yield f"{sides[side, rows]['of_bandwidth']:.0%}" if (side, rows) in sides else ""
    for side in ("fused", "loop"):
        yield f"{sides[side, PREFILL_ROWS]['of_dense']:.0%}" if (side, PREFILL_ROWS) in sides else ""


FAMILY_WAYS = ("eager", "batched_mm", "grouped_mm")


def families(content: Content, *, dtype: str = "float32", phase: str = "decode") -> str:
    """Tokens a second of every way to run each family, and times the fastest of Transformers' own, for one phase."""
    rows: dict[tuple[str, int], dict[str, Content]] = {}
    for row in content["rows"]:
        if row["dtype"] == dtype:
            rows.setdefault((row["family"], row["batch"]), {})[row["side"]] = row
    own = ("moe_opt", "optimize")
    headings = ["family", "batch", *(f"`{way}`" for way in (*FAMILY_WAYS, *own)), *(f"`{way}` is" for way in own)]
    return markdown(
        headings,
        (
            [
                family,
                str(batch),
                *(_family_speed(sides.get(way), phase) for way in (*FAMILY_WAYS, *own)),
                *(f"{sides[way]['times_fastest'][phase]:.2f} x" if way in sides else "" for way in own),
            ]
            for (family, batch), sides in rows.items()
        ),
    )


def _family_speed(row: Content | None, phase: str) -> str:
    if row is None or phase not in row["tokens_per_second"]:
        return ""
    return f"{row['tokens_per_second'][phase]:,.0f}" + (" **WRONG**" if row["tokens"] is False else "")


def around(content: Content, *, dtype: str, batch: str, phase: str) -> str:
    """Milliseconds of each component, a column a side; the whole was timed without hooks."""
    rows = [row for row in content["rows"] if (row["dtype"], row["phase"], str(row["batch"])) == (dtype, phase, batch)]
    components = [name for name, spent in rows[0]["seconds"].items() if spent]
    names = [row["side"].replace("before", f"at {content['arguments']['before']}") for row in rows]
    lines = [[name, *(f"{row['seconds'][name] * 1000:.2f}" for row in rows)] for name in components]
    return markdown(
        ["milliseconds", *names],
        [
            *lines,
            ["**whole**", *(f"**{row['whole'] * 1000:.1f}**" for row in rows)],
            ["times as fast as 4.57.1", *(f"{rows[0]['whole'] / row['whole']:.2f}" for row in rows)],
        ],
    )


def profiling(content: Content) -> str:
    """What profiling costs: times as long as a model that was never profiled."""
    sides = list(content["rows"][0]["wall_ratio"])
    return markdown(
        ["work", *(f"{side}: wall / processor time" for side in sides)],
        (
            [row["work"], *(f"{row['wall_ratio'][side]:.3f} / {row['processor_ratio'][side]:.3f}" for side in sides)]
            for row in content["rows"]
        ),
    )


def perplexity(content: Content) -> str:
    """What a capacity costs a language model, a row a gating."""
    return markdown(
        ["side", "capacity", "perplexity", "rows dropped", "tokens a second"],
        (
            [
                row["side"],
                "none" if row["fraction"] is None else f"{row['fraction']:g}",
                f"{row['perplexity']:.2f}",
                share(row["dropped"]),
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in content["rows"]
        ),
    )


TABLES: Mapping[str, Callable[..., str]] = {
    "around": around,
    "buffering": buffering,
    "conditions": conditions,
    "exchange": exchange,
    "fairseq_generate": fairseq_generate,
    "families": families,
    "generate": generate,
    "int8_quality": int8_quality,
    "kernels": kernels,
    "nllb54b": nllb54b,
    "perplexity": perplexity,
    "placement": placement,
    "profiling": profiling,
}
"""Name of a table to the function that draws it from its file's content and keywords."""
