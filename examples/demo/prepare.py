"""Text for training the demo model: pairs of sentences to the pieces that fairseq-preprocess binarises.

    python examples/demo/prepare.py CORPUS OUT --spm spm.model [--weight deu_Latn=2] [--languages deu_Latn]

CORPUS holds ``train.tsv.gz`` and ``valid.tsv.gz`` (target language, English, translation) and may hold
``multilingual/train.LANG.tsv.xz`` (English, translation, origin). ``OUT`` gets ``train.src``, ``train.tgt``,
``valid.src`` and ``valid.tgt``, a sentence a line: the language's token, then SentencePiece's pieces.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from pairs import read_rows

SOURCE = "eng_Latn"
LANGUAGES = ("fra_Latn", "deu_Latn", "spa_Latn")
LONGEST_PIECES = 96
"""Longer sentences are few, and cost a batch much padding."""
LARGEST_RATIO = 3.0
"""Pairs whose sides differ more in pieces (and are longer than a few) are seldom translations."""
SHORT = 8


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation into ``language``."""

    language: str
    english: str
    translation: str


def main() -> int:
    """Write the files; returns the exit code."""
    arguments = parse_arguments()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(arguments.spm))
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = {language: arguments.weights.get(language, 1) for language in arguments.languages}
    training = [pair for pair in dict.fromkeys(training_pairs(arguments.corpus)) if pair.language in weights]
    validation = [pair for pair in pairs_of(arguments.corpus / "valid.tsv.gz") if pair.language in weights]
    repeated = [pair for pair in training for _ in range(weights[pair.language])]
    random.Random(arguments.seed).shuffle(repeated)
    for split, pairs in (("train", repeated), ("valid", validation)):
        counts = write(arguments.out / split, pairs, processor)
        print(split, *(f"{language} {count:,}" for language, count in sorted(counts.items())))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prepare the demo model's training text.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spm", type=Path, required=True, help="the SentencePiece model")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), help="target languages (default: all three)")
    parser.add_argument("--weight", action="append", default=[], metavar="LANG=N", help="repeat a language's pairs")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.weights = {language: int(times) for language, times in (one.split("=") for one in arguments.weight)}
    return arguments


def training_pairs(corpus: Path) -> Iterator[Pair]:
    """Every pair to train on: the small corpus, then the multilingual one where it is there."""
    yield from pairs_of(corpus / "train.tsv.gz")
    for language in LANGUAGES:
        path = corpus / "multilingual" / f"train.{language}.tsv.xz"
        if path.is_file():
            for english, translation, *_ in read_rows(path):
                yield Pair(language, english, translation)


def pairs_of(path: Path) -> Iterator[Pair]:
    """The pairs of a table: language, English, translation."""
    for language, english, translation, *_ in read_rows(path):
        yield Pair(language, english, translation)


def write(stem: Path, pairs: list[Pair], processor: sentencepiece.SentencePieceProcessor) -> Counter[str]:
    """Write ``stem``.src and ``stem``.tgt; returns how many pairs of each language are in them."""
    counts: Counter[str] = Counter()
    sources = processor.encode([pair.english for pair in pairs], out_type=str)
    targets = processor.encode([pair.translation for pair in pairs], out_type=str)
    with (
        stem.with_suffix(".src").open("w", encoding="utf-8") as source_file,
        stem.with_suffix(".tgt").open("w", encoding="utf-8") as target_file,
    ):
        for pair, source, target in zip(pairs, sources, targets, strict=True):
            if is_usable(len(source), len(target)):
                source_file.write(" ".join((SOURCE, *source)) + "\n")
                target_file.write(" ".join((pair.language, *target)) + "\n")
                counts[pair.language] += 1
    return counts


def is_usable(source: int, target: int) -> bool:
    """Whether a pair of so many pieces is neither empty, nor long, nor of very different lengths."""
    shorter, longer = sorted((source, target))
    return shorter > 0 and longer <= LONGEST_PIECES and (longer <= SHORT or longer <= LARGEST_RATIO * shorter)


if __name__ == "__main__":
    sys.exit(main())
