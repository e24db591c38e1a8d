"""Text for fine-tuning on one language: pairs of sentences to the pieces that fairseq-preprocess binarises.

    python examples/fine_tuning/prepare.py PAIRS.tsv[.gz] MODEL LANGUAGE OUT [--test PAIRS.tsv[.gz]]

PAIRS: target language, English, translation, tab-separated; rows of other languages are left out. Without ``--test``
every third sentence is kept apart to test with. MODEL is the Transformers folder whose tokenizer cuts the text.
``OUT`` gets ``train``, ``valid`` and ``test`` in pieces, one file a language, and ``test.tsv`` for
``examples/demo/score.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))

from pairs import by_language, read_rows

from hf_integration.translate import load_tokenizer

SOURCE = "eng_Latn"
TEST_EVERY = 3
VALID_SENTENCES = 200

Pair = tuple[str, str]


def main() -> int:
    """Write the files; returns the exit code."""
    arguments = parse_arguments()
    pairs = read_pairs(arguments.pairs, arguments.language)
    if arguments.test is None:
        test = pairs[::TEST_EVERY]
        training = [pair for number, pair in enumerate(pairs) if number % TEST_EVERY]
    else:
        training, test = pairs, read_pairs(arguments.test, arguments.language)
    if not training or not test:
        print(f"prepare: {arguments.pairs} has no sentences in {arguments.language}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.model)
    limit = tokenizer.model_max_length // 2
    for split, part in (("train", training), ("valid", training[:VALID_SENTENCES]), ("test", test)):
        write(arguments.out / split, part, arguments.language, tokenizer, limit)
    rows = "".join(f"{arguments.language}\t{english}\t{translation}\n" for english, translation in test)
    (arguments.out / "test.tsv").write_text(rows, encoding="utf-8")
    print(f"{len(training):,} pairs to learn from, {len(test):,} to test with")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prepare text for fine-tuning on one language.")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("language")
    parser.add_argument("out", type=Path)
    parser.add_argument("--test", type=Path, help="pairs to test with")
    return parser.parse_args()


def read_pairs(path: Path, language: str) -> list[Pair]:
    """(English, translation) of the rows of ``language``."""
    return [(english, translation) for english, translation, *_ in by_language(read_rows(path)).get(language, ())]


def write(stem: Path, pairs: list[Pair], language: str, tokenizer: Any, limit: int) -> None:
    """Write ``stem.SOURCE`` and ``stem.LANGUAGE``; pairs with a side of more than ``limit`` pieces are left out."""
    cut = [(tokenizer.tokenize(english), tokenizer.tokenize(translation)) for english, translation in pairs]
    kept = [(english, translation) for english, translation in cut if max(len(english), len(translation)) <= limit]
    for code, side in ((SOURCE, 0), (language, 1)):
        lines = "".join(" ".join(pair[side]) + "\n" for pair in kept)
        stem.with_suffix(f".{code}").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
