"""The demo: real sentences into three languages with the checkpoint of this folder, scored, timed and reported.

    python examples/demo/run.py [--sentences N] [--num-beams N] [--batch-size N] [--rounds N]

1. translates the sentences of ``demo.tsv.gz`` and shows a few, beside what Transformers alone makes of them;
2. scores each language with chrF and BLEU (sacrebleu's defaults);
3. compares static with dynamic gating: first their tokens, which have to be equal, then their speed, taking turns;
4. translates a language again with memory for a quarter of the experts: the same sentences, and what the cache did;
5. prints the report that the runtime keeps, and writes it with all translations into ``--output``;
6. places the experts on two processes by what step 1 asked for, and translates a language with both (ranks_run.py);
7. converts the checkpoint for fairseq and compares static and dynamic gating of ``fairseq-generate`` (fairseq_half.py).

Exits with 1 when static and dynamic gating disagree, in Transformers or in fairseq, or buffered and resident experts,
or two processes and one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in this folder
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import buffered_run
import fairseq_half
import ranks_run
import sacrebleu
import torch
import transformers
from pairs import by_language, read_rows
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe.report import Report, write_report
from fairseq_moe_opt.moe.trace import Trace
from hf_integration import from_pretrained
from hf_integration.translate import load_tokenizer, pad_rows, quiet_host, translate_lines

HERE = Path(__file__).resolve().parent
SOURCE = "eng_Latn"
TARGETS = ("fra_Latn", "deu_Latn", "spa_Latn")
SHOWN = 3
TIMED_SENTENCES = 32
TIMED_TOKENS = 24


@dataclass(frozen=True)
class Pair:
    """A sentence, its human translation, and the free-software project it comes from."""

    english: str
    reference: str
    origin: str


@dataclass(frozen=True)
class Work:
    """What is timed: (B, T) ids and mask of real sentences, and the language token to begin with."""

    ids: Tensor
    mask: Tensor
    forced: int


def main() -> int:
    """Run the demo; returns the exit code."""
    arguments = parse_arguments()
    console = Console() if sys.stdout.isatty() else Console(width=110)
    quiet_host()
    torch.set_num_threads(arguments.threads)
    try:
        pairs = read_pairs(arguments.data, arguments.sentences)
        tokenizer = load_tokenizer(arguments.model)
        model = from_pretrained(arguments.model, dtype="float32")
    except MoEError as error:
        console.print(f"demo: {error}", highlight=False, markup=False)
        return 2
    describe(console, model, pairs, arguments)
    recorder = model.moe.record()
    hypotheses = translate_all(console, model, tokenizer, pairs, arguments)
    report, trace = model.moe.report(), recorder.trace()
    stock = translate_with_transformers_alone(model, tokenizer, pairs)
    show_examples(console, pairs, hypotheses, stock)
    show_scores(console, pairs, hypotheses)
    agree = compare_gatings(console, arguments, tokenizer, pairs)
    agree &= compare_buffered(console, arguments, tokenizer, pairs[TARGETS[-1]], hypotheses[TARGETS[-1]])
    show_report(console, report, f"the last language, {TARGETS[-1]}")
    save(console, arguments.output, hypotheses, report)
    agree &= compare_ranks(console, arguments, trace, pairs[TARGETS[0]], hypotheses[TARGETS[0]])
    return 0 if run_fairseq_half(console, arguments, tokenizer, pairs) and agree else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Translate, score and time the demo checkpoint.")
    parser.add_argument("--sentences", type=positive, default=300, help="sentences a language (default: all 300)")
    parser.add_argument("--num-beams", type=positive, default=4, help="beams (default: 4)")
    parser.add_argument("--batch-size", type=positive, default=32, help="sentences computed together (default: 32)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed turns of each gating (default: 5)")
    # So small a model has little for a second thread to do, and waiting for it beside a busy process costs a lot.
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder of the checkpoint")
    parser.add_argument(
        "--data", type=Path, default=HERE / "demo.tsv.gz", help="language, English, translation, origin"
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for translations and report")
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def read_pairs(path: Path, count: int) -> dict[str, list[Pair]]:
    """The first ``count`` pairs of each target language."""
    rows = by_language(read_rows(path))
    return {target: [Pair(*row) for row in rows.get(target, ())][:count] for target in TARGETS}


def describe(console: Console, model: Any, pairs: dict[str, list[Pair]], arguments: argparse.Namespace) -> None:
    """Say what runs on what."""
    report = model.moe.report()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    origins = sorted({pair.origin for found in pairs.values() for pair in found})
    console.print(
        f"{report.family}, {parameters / 1e6:.1f} million parameters, {len(report.layers)} Mixture-of-Experts layers "
        f"of {model.config.num_experts} experts, float32, CPU threads: {torch.get_num_threads()}"
    )
    console.print(
        f"{sum(map(len, pairs.values()))} translations of {len(pairs[TARGETS[0]])} sentences ({', '.join(origins)}), "
        f"beam {arguments.num_beams}, batch {arguments.batch_size}\n"
    )


def translate_all(
    console: Console, model: Any, tokenizer: Any, pairs: dict[str, list[Pair]], arguments: argparse.Namespace
) -> dict[str, list[str]]:
    """The translations of every language, with a progress bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hypotheses: dict[str, list[str]] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        for target, found in pairs.items():
            task = progress.add_task(f"English to {target}", total=len(found))
            start = time.perf_counter()
            lines = translate_lines(
                model,
                tokenizer,
                [pair.english for pair in found],
                SOURCE,
                target,
                batch_size=arguments.batch_size,
                generation={"num_beams": arguments.num_beams},
                on_progress=lambda done, task=task: progress.advance(task, done),
            )
            hypotheses[target] = list(lines)
            seconds = time.perf_counter() - start
            rate = len(found) / seconds
            console.print(f"{target}: {len(found)} sentences in {seconds:.1f} s ({rate:.1f} a second)", highlight=False)
    console.print()
    return hypotheses


def translate_with_transformers_alone(model: Any, tokenizer: Any, pairs: dict[str, list[Pair]]) -> dict[str, list[str]]:
    """The first few sentences by the host's own layers, which releases 5.0 to 5.23 compute wrongly."""
    model.moe.undo()
    return {
        target: list(
            translate_lines(
                model,
                tokenizer,
                [pair.english for pair in found[:SHOWN]],
                SOURCE,
                target,
                generation={"num_beams": 1, "max_new_tokens": 64},
            )
        )
        for target, found in pairs.items()
    }


def show_examples(
    console: Console, pairs: dict[str, list[Pair]], hypotheses: dict[str, list[str]], stock: dict[str, list[str]]
) -> None:
    """A few rows of each language."""
    alone = f"Transformers {transformers.__version__} alone"
    for target, found in pairs.items():
        table = Table(box=box.SIMPLE, show_header=False, title=f"English to {target}", title_justify="left")
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for pair, hypothesis, theirs in zip(found, hypotheses[target], stock[target], strict=False):
            table.add_row("source", pair.english)
            table.add_row("reference", pair.reference)
            table.add_row("this project", hypothesis, style="bold")
            table.add_row(alone, theirs, end_section=True)
        console.print(table, markup=False)


def show_scores(console: Console, pairs: dict[str, list[Pair]], hypotheses: dict[str, list[str]]) -> None:
    """chrF and BLEU of each language."""
    table = Table(box=box.SIMPLE, title="scores", title_justify="left")
    for name in ("language", "sentences", "chrF", "BLEU"):
        table.add_column(name, justify="left" if name == "language" else "right")
    for target, found in pairs.items():
        references = [[pair.reference for pair in found]]
        chrf = sacrebleu.corpus_chrf(hypotheses[target], references).score
        bleu = sacrebleu.corpus_bleu(hypotheses[target], references).score
        table.add_row(target, str(len(found)), f"{chrf:.1f}", f"{bleu:.1f}")
    console.print(table)


def compare_gatings(
    console: Console, arguments: argparse.Namespace, tokenizer: Any, pairs: dict[str, list[Pair]]
) -> bool:
    """Static against dynamic gating: whether their tokens are equal, and tokens a second of both in turns."""
    models = {
        gating: from_pretrained(arguments.model, dtype="float32", gating=gating) for gating in ("static", "dynamic")
    }
    work = timed_work(tokenizer, [pair.english for pair in pairs[TARGETS[0]]])
    tokens = {gating: decode(model, work) for gating, model in models.items()}
    agree = torch.equal(tokens["static"], tokens["dynamic"])
    if not agree:
        rows = (tokens["static"] != tokens["dynamic"]).any(dim=1).nonzero().flatten().tolist()
        console.print(f"static and dynamic gating DISAGREE in sentences {rows}", style="bold red")
    steps: dict[str, tuple[Callable[[Any, Work], Any], int]] = {
        "encoding": (encode, int(work.mask.sum())),
        "decoding": (decode, work.ids.shape[0] * TIMED_TOKENS),
    }
    title = f"tokens a second, {work.ids.shape[0]} sentences together, median of {arguments.rounds} turns each"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("", "static", "dynamic", "dynamic is"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, (step, count) in steps.items():
        seconds = take_turns(
            {gating: lambda m=model, s=step: s(m, work) for gating, model in models.items()}, arguments.rounds
        )
        ratio = seconds["static"] / seconds["dynamic"]
        rates = [f"{count / seconds[gating]:,.0f}" for gating in ("static", "dynamic")]
        table.add_row(f"{name} ({count} tokens)", *rates, f"{ratio:.2f} times as fast")
    console.print(table)
    if agree:
        console.print("static and dynamic gating gave the same tokens\n")
    return agree


def compare_buffered(
    console: Console, arguments: argparse.Namespace, tokenizer: Any, pairs: list[Pair], expected: list[str]
) -> bool:
    """The last language once more with a quarter of the experts in memory: whether it reads the same."""
    sentences = [pair.english for pair in pairs]
    work = buffered_run.Translation(
        arguments.model, sentences, SOURCE, TARGETS[-1], arguments.num_beams, arguments.batch_size, expected
    )
    return buffered_run.compare(console, work, tokenizer)


def compare_ranks(
    console: Console, arguments: argparse.Namespace, trace: Trace, pairs: list[Pair], expected: list[str]
) -> bool:
    """The first language once more on two processes: whether they read the same."""
    work = ranks_run.Translation(
        model=arguments.model,
        folder=arguments.output,
        sentences=[pair.english for pair in pairs],
        languages=(SOURCE, TARGETS[0]),
        num_beams=arguments.num_beams,
        batch_size=arguments.batch_size,
        expected=expected,
    )
    return ranks_run.compare(console, work, trace)


def timed_work(tokenizer: Any, sentences: Sequence[str]) -> Work:
    """A batch of sentences of about the same length, as translating makes them: those in the middle by length."""
    encoded = tokenizer._build_translation_inputs(
        list(sentences), return_tensors=None, src_lang=SOURCE, tgt_lang=TARGETS[0]
    )
    rows = sorted(encoded["input_ids"], key=len)
    first = max(0, (len(rows) - TIMED_SENTENCES) // 2)
    ids, mask = pad_rows(rows[first : first + TIMED_SENTENCES], tokenizer.pad_token_id)
    return Work(ids, mask, encoded["forced_bos_token_id"])


@torch.inference_mode()
def encode(model: Any, work: Work) -> Tensor:
    """(B, T, D) of the encoder."""
    hidden: Tensor = model.get_encoder()(input_ids=work.ids, attention_mask=work.mask).last_hidden_state
    return hidden


def decode(model: Any, work: Work) -> Tensor:
    """(B, ``TIMED_TOKENS`` + 1) greedy tokens: the same number for every sentence, so that both do the same work."""
    tokens: Tensor = model.generate(
        input_ids=work.ids,
        attention_mask=work.mask,
        forced_bos_token_id=work.forced,
        num_beams=1,
        min_new_tokens=TIMED_TOKENS,
        max_new_tokens=TIMED_TOKENS,
    )
    return tokens


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each of ``runs``, which take turns, so that a busy moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def run_fairseq_half(
    console: Console, arguments: argparse.Namespace, tokenizer: Any, pairs: dict[str, list[Pair]]
) -> bool:
    """The first language once more, by ``fairseq-generate``: whether static and dynamic gating agree there too."""
    if not fairseq_half.is_installed():
        console.print("\nfairseq is not installed, so its half is left out; `make demo` installs it", markup=False)
        return True
    task = fairseq_half.Task(
        model=arguments.model,
        pairs=[(pair.english, pair.reference) for pair in pairs[TARGETS[0]]],
        source=SOURCE,
        target=TARGETS[0],
        languages=(SOURCE, *TARGETS),
        batch_size=arguments.batch_size,
        threads=arguments.threads,
    )
    console.print()
    try:
        return fairseq_half.compare(console, task, tokenizer)
    except (fairseq_half.FairseqError, MoEError) as error:
        console.print(f"demo, fairseq half: {error}", style="bold red", markup=False)
        return False


def show_report(console: Console, report: Report, of_what: str) -> None:
    """What the runtime counted."""
    table = Table(box=box.SIMPLE, title=f"the runtime's report of {of_what}", title_justify="left")
    for name in ("layer", "calls", "tokens", "expert rows", "active experts a call", "busiest expert", "kernel"):
        table.add_column(name, justify="left" if name in ("layer", "kernel") else "right")
    for layer in report.layers:
        busiest = max(layer.expert_rows) / max(sum(layer.expert_rows), 1)
        table.add_row(
            layer.name.removeprefix("model."),
            f"{layer.calls:,}",
            f"{layer.tokens:,}",
            f"{layer.computed_rows:,}",
            f"{layer.active_experts:.1f} of {len(layer.expert_rows)}",
            f"{busiest:.0%} of rows",
            ", ".join(layer.kernels),
        )
    console.print(table)
    mib = 1 << 20
    console.print(
        f"{report.seconds:.1f} s; experts {report.expert_bytes / mib:.1f} MiB; "
        f"peak memory {report.peak_memory_bytes / mib:.0f} MiB ({report.peak_memory_kind})"
    )


def save(console: Console, folder: Path, hypotheses: dict[str, list[str]], report: Report) -> None:
    """All translations, a file a language, and the report as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for target, lines in hypotheses.items():
        (folder / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_report(report, folder / "report.json")
    console.print(f"translations and report.json are in {folder}/", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
