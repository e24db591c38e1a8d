"""Whether fairseq and Transformers give the same greedy tokens for a model that both can load.

    python benchmarks/greedy_agreement.py MODEL_FOLDER FAIRSEQ_CHECKPOINT SENTENCES.tsv.gz

MODEL_FOLDER is a Transformers folder with its tokenizer, FAIRSEQ_CHECKPOINT the same model for fairseq, with dict.txt
beside it. SENTENCES has a target language and a source sentence in its first two columns. Sources are tokenised once,
by the folder's tokenizer, and handed to both sides as the same tokens: fairseq's SequenceGenerator with beam 1 and
Transformers' generate, both through this project, in float32. Where they differ, the gap between the two best tokens
says whether it is rounding or a mistake. Exits with 1 when any sentence differs.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import fairseq_moe_opt
from hf_integration import from_pretrained
from hf_integration.text import source_limit
from hf_integration.translate import load_tokenizer, pad_rows, quiet_host

Tokens = tuple[str, ...]
SHOWN = 20
"""Differences that are listed one by one."""


@dataclass(frozen=True)
class Sentence:
    """Line ``number`` (from 1) of the sentences: its tokens, end token included, and the language token to force."""

    number: int
    source: Tokens
    language: str


@dataclass(frozen=True)
class Difference:
    """Where two sides part: after ``prefix``, and how far apart each side's two best tokens are there (logits)."""

    sentence: Sentence
    prefix: Tokens
    fairseq: Tokens
    transformers: Tokens
    gaps: tuple[float, float]


class Side(Protocol):
    """A model that translates tokens into tokens."""

    def translate(self, sentences: Sequence[Sentence]) -> list[Tokens]:
        """Greedy tokens of each, the forced language token first, without the end token."""

    def gap(self, sentence: Sentence, prefix: Tokens) -> float:
        """Between the logits of the two best tokens after ``prefix``."""


class TransformersSide:
    """A folder through ``hf_integration``."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.tokenizer: Any = load_tokenizer(folder)
        self.model: Any = from_pretrained(folder, dtype="float32")
        self._max_tokens = max_tokens

    def translate(self, sentences: Sequence[Sentence]) -> list[Tokens]:
        """See ``Side``; all ``sentences`` have one language."""
        ids, mask = pad_rows([self._ids(sentence.source) for sentence in sentences], self.tokenizer.pad_token_id)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            forced_bos_token_id=self._ids([sentences[0].language])[0],
            num_beams=1,
            do_sample=False,
            max_new_tokens=self._max_tokens,
        )
        end = self.tokenizer.eos_token
        # The first token of every row is the one that decoding starts from.
        return [_until(end, self.tokenizer.convert_ids_to_tokens(row)) for row in output[:, 1:].tolist()]

    @torch.inference_mode()
    def gap(self, sentence: Sentence, prefix: Tokens) -> float:
        """See ``Side``."""
        start = [self.model.config.decoder_start_token_id]
        source, target = self._ids(sentence.source), start + self._ids(prefix)
        logits = self.model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits
        return _gap(logits[0, -1])

    def _ids(self, tokens: Sequence[str]) -> list[int]:
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(tokens))
        return ids


class FairseqSide:
    """A checkpoint through fairseq and the plugin."""

    def __init__(self, checkpoint: Path, max_tokens: int) -> None:
        fairseq_moe_opt.register_fairseq()
        with tempfile.TemporaryDirectory(prefix="greedy-agreement-") as data:
            for side in ("src", "tgt"):
                shutil.copyfile(checkpoint.parent / "dict.txt", Path(data, f"dict.{side}.txt"))
            overrides = {"data": data, "source_lang": "src", "target_lang": "tgt"}
            models, _, task = load_model_ensemble_and_task([str(checkpoint)], arg_overrides=overrides)
        self.model: Any = models[0].eval()
        self._dictionary: Dictionary = task.source_dictionary
        self._task: Any = task
        # The end token comes on top of max_len_b.
        self._generator = task.build_generator(models, Namespace(beam=1, max_len_a=0, max_len_b=max_tokens))

    def translate(self, sentences: Sequence[Sentence]) -> list[Tokens]:
        """See ``Side``."""
        sources = [self._ids(sentence.source) for sentence in sentences]
        lengths = torch.tensor([len(source) for source in sources])
        padded = collate_tokens(sources, self._dictionary.pad(), left_pad=True)
        prefix = torch.stack([self._ids([sentence.language]) for sentence in sentences])
        sample = {"net_input": {"src_tokens": padded, "src_lengths": lengths}}
        found = self._task.inference_step(self._generator, [self.model], sample, prefix_tokens=prefix)
        symbols = self._dictionary.symbols
        end = symbols[self._dictionary.eos()]
        return [_until(end, [symbols[token] for token in best["tokens"].tolist()]) for best, *_ in found]

    @torch.inference_mode()
    def gap(self, sentence: Sentence, prefix: Tokens) -> float:
        """See ``Side``."""
        source = self._ids(sentence.source)[None]
        target = torch.cat((torch.tensor([self._dictionary.eos()]), self._ids(prefix)))[None]
        logits, _ = self.model(source, torch.tensor([source.shape[1]]), target)
        return _gap(logits[0, -1])

    def _ids(self, tokens: Sequence[str]) -> Tensor:
        """(T,) ids; ValueError for a token that the dictionary does not hold."""
        missing = [token for token in tokens if token not in self._dictionary]
        if missing:
            raise ValueError(f"dict.txt has no {missing[0]!r}: it is not the dictionary of this tokenizer")
        return torch.tensor([self._dictionary.index(token) for token in tokens], dtype=torch.long)


def read_sentences(path: Path, tokenizer: Any, source_language: str, limit: int | None) -> list[Sentence]:
    """The first ``limit`` lines of a tab-separated file, tokenised."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as stream:
        rows = [row[:2] for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)][:limit]
    sentences = []
    for number, (language, text) in enumerate(rows, start=1):
        encoded = tokenizer._build_translation_inputs(
            [text], return_tensors=None, src_lang=source_language, tgt_lang=language
        )
        source = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
        sentences.append(Sentence(number, tuple(source), language))
    return sentences


def batches(sentences: Sequence[Sentence], size: int) -> Iterator[list[Sentence]]:
    """Up to ``size`` sentences of one language and of about the same length at a time."""
    by_language: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        by_language.setdefault(sentence.language, []).append(sentence)
    for group in by_language.values():
        group.sort(key=lambda sentence: len(sentence.source))
        for first in range(0, len(group), size):
            yield group[first : first + size]


def differences(fairseq: Side, transformers: Side, batch: Sequence[Sentence]) -> Iterator[Difference]:
    """The sentences of ``batch`` on which the sides do not agree."""
    for sentence, one, two in zip(batch, fairseq.translate(batch), transformers.translate(batch), strict=True):
        if one != two:
            prefix = _common(one, two)
            gaps = (fairseq.gap(sentence, prefix), transformers.gap(sentence, prefix))
            yield Difference(sentence, prefix, one, two, gaps)


def _common(one: Tokens, two: Tokens) -> Tokens:
    """The longest prefix of both."""
    shorter = min(len(one), len(two))
    return one[: next((place for place in range(shorter) if one[place] != two[place]), shorter)]


def _until(end: str, tokens: Sequence[str]) -> Tokens:
    return tuple(tokens[: tokens.index(end)] if end in tokens else tokens)


def _gap(logits: Tensor) -> float:
    best, second = logits.float().topk(2).values.tolist()
    return float(best - second)


def show(console: Console, found: Sequence[Difference], count: int, too_long: int) -> None:
    """The count, and the first differences."""
    for one in found[:SHOWN]:
        console.print(
            f"line {one.sentence.number} ({one.sentence.language}), after {len(one.prefix)} tokens; gap of the two "
            f"best logits: {one.gaps[0]:.2e} in fairseq, {one.gaps[1]:.2e} in Transformers\n"
            f"  fairseq:      {' '.join(one.fairseq)}\n  Transformers: {' '.join(one.transformers)}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"{count - len(found):,} of {count:,} sentences have equal tokens", highlight=False)
    if too_long:
        console.print(f"{too_long:,} more are longer than the model's positions and were not run", highlight=False)


def main(
    model: Annotated[Path, typer.Argument(help="Transformers folder, tokenizer included")],
    checkpoint: Annotated[Path, typer.Argument(help="the same model for fairseq, dict.txt beside it")],
    sentences: Annotated[Path, typer.Argument(help="target language, sentence; tab-separated, .gz or not")],
    source_language: Annotated[str, typer.Option(help="language of the sentences")] = "eng_Latn",
    batch_size: Annotated[int, typer.Option(min=1, help="sentences computed together")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest translation, on both sides")] = 200,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many sentences")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Translate greedily with both and compare the tokens."""
    quiet_host()
    torch.set_num_threads(threads)
    console = Console()
    transformers, fairseq = TransformersSide(model, max_tokens), FairseqSide(checkpoint, max_tokens)
    everything = read_sentences(sentences, transformers.tokenizer, source_language, limit)
    positions = source_limit(transformers.model.config)
    fitting = [sentence for sentence in everything if positions is None or len(sentence.source) <= positions]
    found: list[Difference] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("translating", total=len(fitting))
        for batch in batches(fitting, batch_size):
            found += differences(fairseq, transformers, batch)
            progress.advance(task, len(batch))
    show(console, sorted(found, key=lambda one: one.sentence.number), len(fitting), len(everything) - len(fitting))
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
