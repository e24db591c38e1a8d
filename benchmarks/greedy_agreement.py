"""Whether fairseq and Transformers give the same greedy tokens for a model that both can load.

    python benchmarks/greedy_agreement.py MODEL_FOLDER FAIRSEQ_CHECKPOINT SENTENCES.tsv.gz

MODEL_FOLDER is a Transformers folder with its tokenizer, FAIRSEQ_CHECKPOINT the same model for fairseq. SENTENCES has a
target language and a source sentence in its first two columns. Sources are tokenised once, by the folder's tokenizer,
and handed to both sides as the same ids: fairseq's SequenceGenerator with beam 1 and Transformers' generate, both
through this project, in float32. Where they differ, the gap between the two best tokens says whether it is rounding or
a mistake. Exits with 1 when any sentence differs.
"""

from __future__ import annotations

import csv
import gzip
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from _fairseq_models import dictionary_of
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data.data_utils import collate_tokens
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import fairseq_moe_opt
from hf_integration import from_pretrained
from hf_integration.text import source_limit
from hf_integration.translate import load_tokenizer, pad_rows, quiet_host

Ids = tuple[int, ...]
SHOWN = 20
"""Differences that are listed one by one."""


@dataclass(frozen=True)
class Sentence:
    """Line ``number`` (from 1) of the sentences: its ids, end token included, and the language token to force."""

    number: int
    source: Ids
    language: int


@dataclass(frozen=True)
class Difference:
    """Where two sides part: after ``prefix``, and how far apart each side's two best tokens are there (logits)."""

    sentence: Sentence
    prefix: Ids
    fairseq: Ids
    transformers: Ids
    gaps: tuple[float, float]


class Side(Protocol):
    """A model that translates ids into ids."""

    def translate(self, sentences: Sequence[Sentence]) -> list[Ids]:
        """Greedy ids of each, the forced language token first, without the end token; all in one language."""

    def gap(self, sentence: Sentence, prefix: Ids) -> float:
        """Between the logits of the two best tokens after ``prefix``."""


class TransformersSide:
    """A folder through ``hf_integration``."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.tokenizer: Any = load_tokenizer(folder)
        self.model: Any = from_pretrained(folder, dtype="float32")
        self._max_tokens = max_tokens

    def translate(self, sentences: Sequence[Sentence]) -> list[Ids]:
        """See ``Side``."""
        ids, mask = pad_rows([sentence.source for sentence in sentences], self.tokenizer.pad_token_id)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            forced_bos_token_id=sentences[0].language,
            num_beams=1,
            do_sample=False,
            max_new_tokens=self._max_tokens,
        )
        # The first token of every row is the one that decoding starts from.
        return [_until(self.tokenizer.eos_token_id, row) for row in output[:, 1:].tolist()]

    @torch.inference_mode()
    def gap(self, sentence: Sentence, prefix: Ids) -> float:
        """See ``Side``."""
        target = torch.tensor([[self.model.config.decoder_start_token_id, *prefix]])
        logits = self.model(input_ids=torch.tensor([sentence.source]), decoder_input_ids=target).logits
        return _gap(logits[0, -1])


class FairseqSide:
    """A checkpoint through fairseq and the plugin; ``symbols`` is the number of rows of its embedding."""

    def __init__(self, checkpoint: Path, symbols: int, max_tokens: int) -> None:
        fairseq_moe_opt.register_fairseq()
        # Everything here is ids, so any dictionary of that many symbols will do.
        self._dictionary = dictionary_of(symbols)
        self._task = TranslationTask(TranslationConfig(), self._dictionary, self._dictionary)
        models, _, _ = load_model_ensemble_and_task([str(checkpoint)], task=self._task)
        self.model: Any = models[0].eval()
        # The end token comes on top of max_len_b.
        self._generator = self._task.build_generator(models, Namespace(beam=1, max_len_a=0, max_len_b=max_tokens))

    def translate(self, sentences: Sequence[Sentence]) -> list[Ids]:
        """See ``Side``."""
        sources = [torch.tensor(sentence.source) for sentence in sentences]
        padded = collate_tokens(sources, self._dictionary.pad(), left_pad=True)
        lengths = torch.tensor([len(source) for source in sources])
        prefix = torch.tensor([[sentence.language] for sentence in sentences])
        sample = {"net_input": {"src_tokens": padded, "src_lengths": lengths}}
        found = self._task.inference_step(self._generator, [self.model], sample, prefix_tokens=prefix)
        return [_until(self._dictionary.eos(), best["tokens"].tolist()) for best, *_ in found]

    @torch.inference_mode()
    def gap(self, sentence: Sentence, prefix: Ids) -> float:
        """See ``Side``."""
        source, length = torch.tensor([sentence.source]), torch.tensor([len(sentence.source)])
        logits, _ = self.model(source, length, torch.tensor([[self._dictionary.eos(), *prefix]]))
        return _gap(logits[0, -1])


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
        sentences.append(Sentence(number, tuple(encoded["input_ids"][0]), encoded["forced_bos_token_id"]))
    return sentences


def batches(sentences: Sequence[Sentence], size: int) -> Iterator[list[Sentence]]:
    """Up to ``size`` sentences of one language and of about the same length at a time."""
    by_language: dict[int, list[Sentence]] = {}
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


def _common(one: Ids, two: Ids) -> Ids:
    """The longest prefix of both."""
    shorter = min(len(one), len(two))
    return one[: next((place for place in range(shorter) if one[place] != two[place]), shorter)]


def _until(end: int, ids: Sequence[int]) -> Ids:
    return tuple(ids[: ids.index(end)] if end in ids else ids)


def _gap(logits: Tensor) -> float:
    best, second = logits.float().topk(2).values.tolist()
    return float(best - second)


def show(console: Console, tokenizer: Any, found: Sequence[Difference], count: int, too_long: int) -> None:
    """The count, and the first differences."""
    for one in found[:SHOWN]:
        ours, theirs = (" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (one.fairseq, one.transformers))
        console.print(
            f"line {one.sentence.number}, after {len(one.prefix)} tokens; gap of the two "
            f"best logits: {one.gaps[0]:.2e} in fairseq, {one.gaps[1]:.2e} in Transformers\n"
            f"  fairseq:      {ours}\n  Transformers: {theirs}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"{count - len(found):,} of {count:,} sentences have equal tokens", highlight=False)
    if too_long:
        console.print(f"{too_long:,} more are longer than the model's positions and were not run", highlight=False)


def main(
    model: Annotated[Path, typer.Argument(help="Transformers folder, tokenizer included")],
    checkpoint: Annotated[Path, typer.Argument(help="the same model for fairseq")],
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
    transformers = TransformersSide(model, max_tokens)
    fairseq = FairseqSide(checkpoint, transformers.model.config.vocab_size, max_tokens)
    everything = read_sentences(sentences, transformers.tokenizer, source_language, limit)
    positions = source_limit(transformers.model.config)
    fitting = [sentence for sentence in everything if positions is None or len(sentence.source) <= positions]
    found: list[Difference] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("translating", total=len(fitting))
        for batch in batches(fitting, batch_size):
            found += differences(fairseq, transformers, batch)
            progress.advance(task, len(batch))
    found.sort(key=lambda one: one.sentence.number)
    show(console, transformers.tokenizer, found, len(fitting), len(everything) - len(fitting))
    if found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
