"""What experts in bf16 and int8 cost in quality: the demo checkpoint's translations against those of float32 experts.

    python benchmarks/int8_quality.py [--sentences N]

The rest of the model is float32 throughout, decoding is greedy. chrF and BLEU are sacrebleu's defaults, against human
translations. Tokens are compared position by position as they were generated: after a first difference two translations
usually go on differing.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import sacrebleu
import torch
import typer
from _machine import usable_cores, write_results
from rich.console import Console
from rich.table import Table

from hf_integration import from_pretrained
from hf_integration.text import source_limit
from hf_integration.translate import load_tokenizer, quiet_host
from hf_integration.verify import text_batches

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "int8_quality.json"
SOURCE = "eng_Latn"
TABLE_WIDTH = 120

REFERENCE = "float32"
EXPERTS: Mapping[str, str] = {REFERENCE: "checkpoint", "bf16": "bf16", "int8": "int8"}
"""Name in the table to the option ``expert_dtype``; the first one is what the others are compared with."""

Ids = tuple[int, ...]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Pair:
    """A sentence and its human translation."""

    english: str
    reference: str


@dataclass(frozen=True)
class Outcome:
    """Translations by one model: by language, a tuple of ids and a text a sentence."""

    expert_bytes: int
    ids: dict[str, list[Ids]]
    texts: dict[str, list[str]]


@dataclass(frozen=True)
class Row:
    """One dtype of experts.

    Attributes:
        experts: its name.
        expert_bytes: of all experts in memory, scales and biases included.
        chrf: by language.
        bleu: by language.
        identical_tokens: share of positions with the token that float32 experts gave.
        identical_sentences: share of sentences with all of them.
    """

    experts: str
    expert_bytes: int
    chrf: dict[str, float]
    bleu: dict[str, float]
    identical_tokens: float
    identical_sentences: float


def read_pairs(path: Path, count: int | None) -> dict[str, list[Pair]]:
    """The first ``count`` pairs of each target language, in the file's order of languages."""
    pairs: dict[str, list[Pair]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
        for target, english, reference, *_ in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            found = pairs.setdefault(target, [])
            if count is None or len(found) < count:
                found.append(Pair(english, reference))
    return pairs


def translate(
    model: Any, tokenizer: Any, pairs: Mapping[str, Sequence[Pair]], batch_size: int, max_new_tokens: int
) -> Outcome:
    """Greedy translations of every language, one after the other."""
    ids: dict[str, list[Ids]] = {}
    for target, found in pairs.items():
        lines = [pair.english for pair in found]
        ids[target] = []
        for batch in text_batches(tokenizer, lines, (SOURCE, target), source_limit(model.config), batch_size):
            output = model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                num_beams=1,
                do_sample=False,
                max_length=max_new_tokens + 1,
                **batch.generation,
            )
            # The first token of every row is the one that decoding starts from.
            ids[target] += [until_end(row, tokenizer.eos_token_id) for row in output[:, 1:].tolist()]
    texts = {target: tokenizer.batch_decode(found, skip_special_tokens=True) for target, found in ids.items()}
    return Outcome(model.moe.report().expert_bytes, ids, texts)


def until_end(ids: Sequence[int], end: int) -> Ids:
    """``ids`` up to the first ``end``, which is left out with the padding after it."""
    found = list(ids)
    return tuple(found[: found.index(end)] if end in found else found)


def identical(ids: Sequence[Ids], expected: Sequence[Ids]) -> tuple[float, float]:
    """Shares of tokens and of sentences that are the same; a token that only one side has is a different one."""
    pairs = list(zip(ids, expected, strict=True))
    tokens = [one == two for left, right in pairs for one, two in zip_longest(left, right)]
    sentences = [left == right for left, right in pairs]
    return sum(tokens) / max(len(tokens), 1), sum(sentences) / max(len(sentences), 1)


def row_of(name: str, outcome: Outcome, reference: Outcome, pairs: Mapping[str, Sequence[Pair]]) -> Row:
    """Scores and agreement of one outcome."""
    right = {target: [[pair.reference for pair in found]] for target, found in pairs.items()}
    every = [one for target in pairs for one in outcome.ids[target]]
    tokens, sentences = identical(every, [one for target in pairs for one in reference.ids[target]])
    return Row(
        experts=name,
        expert_bytes=outcome.expert_bytes,
        chrf={target: sacrebleu.corpus_chrf(outcome.texts[target], right[target]).score for target in pairs},
        bleu={target: sacrebleu.corpus_bleu(outcome.texts[target], right[target]).score for target in pairs},
        identical_tokens=tokens,
        identical_sentences=sentences,
    )


def table_of(rows: Sequence[Row]) -> Table:
    """A line a dtype; chrF / BLEU a language."""
    table = Table(title="quality by dtype of the experts (chrF / BLEU a language; the same tokens as with float32)")
    table.add_column("experts")
    for heading in ("MiB", "x smaller", *rows[0].chrf, "tokens", "sentences"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.experts,
            f"{row.expert_bytes / 2**20:.1f}",
            f"{rows[0].expert_bytes / row.expert_bytes:.2f}",
            *(f"{row.chrf[target]:.1f} / {row.bleu[target]:.1f}" for target in row.chrf),
            f"{row.identical_tokens:.2%}",
            f"{row.identical_sentences:.2%}",
        )
    return table


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="folder of a checkpoint with its tokenizer")] = DEMO / "model",
    data: Annotated[Path, typer.Option(help="gzipped: language, English, human translation")] = DEMO / "demo.tsv.gz",
    sentences: Annotated[int | None, typer.Option(min=1, help="of each language [default: all]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sentences at once")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of a translation")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: cores]")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="where results go")] = RESULTS,
) -> None:
    """Translate the same sentences with float32, bf16 and int8 experts, and score them."""
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    quiet_host()
    torch.set_num_threads(threads or usable_cores())
    pairs, tokenizer = read_pairs(data, sentences), load_tokenizer(model)
    outcomes: dict[str, Outcome] = {}
    for name, expert_dtype in EXPERTS.items():
        with console.status(f"translating with {name} experts"):
            loaded = from_pretrained(model, dtype="float32", expert_dtype=expert_dtype)
            outcomes[name] = translate(loaded, tokenizer, pairs, batch_size, max_new_tokens)
    rows = [row_of(name, outcome, outcomes[REFERENCE], pairs) for name, outcome in outcomes.items()]
    console.print(table_of(rows))
    arguments = {"sentences": {target: len(found) for target, found in pairs.items()}, "batch_size": batch_size}
    versions = {name: version(name) for name in ("transformers", "sacrebleu")}
    arguments |= {"max_new_tokens": max_new_tokens, "threads": torch.get_num_threads()}
    write_results(json_file, versions, arguments, [asdict(row) for row in rows])
    console.print(f"written to {json_file}")


if __name__ == "__main__":
    app()
