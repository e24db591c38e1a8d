"""Text for training the language model: paragraphs to the pieces that fairseq-preprocess binarises.

    python examples/language_model/prepare.py CORPUS OUT [--vocabulary 8000]

CORPUS holds ``train.txt.xz`` and ``valid.txt.xz``: a paragraph a line, an empty line between documents. ``OUT`` gets a
SentencePiece model of the training text (``spm.model``), and ``train.txt`` and ``valid.txt`` in its pieces, a paragraph
a line; the training documents are shuffled as wholes.
"""

from __future__ import annotations

import argparse
import lzma
import random
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import sentencepiece

SAMPLED_PARAGRAPHS = 100_000
"""Paragraphs that the vocabulary is chosen from."""


def main() -> int:
    """Write the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=int, default=8_000, help="pieces (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    training = list(documents(arguments.corpus / "train.txt.xz"))
    random.Random(arguments.seed).shuffle(training)
    model = arguments.out / "spm.model"
    if not model.exists():
        paragraphs = (paragraph for document in training for paragraph in document)
        train_vocabulary(paragraphs, model, arguments.vocabulary)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for split, texts in (("train", training), ("valid", list(documents(arguments.corpus / "valid.txt.xz")))):
        pieces = write(arguments.out / f"{split}.txt", texts, processor)
        print(f"{split}: {len(texts):,} documents, {pieces:,} pieces")
    return 0


def documents(path: Path) -> Iterator[list[str]]:
    """Each document's paragraphs."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for empty, paragraphs in groupby((line.strip() for line in lines), key=lambda paragraph: not paragraph):
            if not empty:
                yield list(paragraphs)


def train_vocabulary(paragraphs: Iterator[str], model: Path, size: int) -> None:
    """A unigram model over a sample of the paragraphs."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=paragraphs,
        model_prefix=str(model.with_suffix("")),
        vocab_size=size,
        model_type="unigram",
        character_coverage=0.9995,
        input_sentence_size=SAMPLED_PARAGRAPHS,
        shuffle_input_sentence=True,
        num_threads=1,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=1,
    )
    model.with_suffix(".vocab").unlink()


def write(path: Path, texts: list[list[str]], processor: sentencepiece.SentencePieceProcessor) -> int:
    """Write a paragraph a line; returns how many pieces there are."""
    pieces = 0
    with path.open("w", encoding="utf-8") as file:
        for document in texts:
            for encoded in processor.encode(document, out_type=str):
                pieces += len(encoded)
                file.write(" ".join(encoded) + "\n")
    return pieces


if __name__ == "__main__":
    sys.exit(main())
