"""chrF and BLEU of a translation model on pairs of sentences, by language.

    python examples/demo/score.py MODEL PAIRS.tsv[.gz] [--languages deu_Latn] [--num-beams 4] [--limit N] [--json FILE]

PAIRS: target language, English, translation, tab-separated. sacrebleu's defaults, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sacrebleu
import torch
from pairs import by_language, read_rows

from fairseq_moe_opt.errors import MoEError
from hf_integration import from_pretrained
from hf_integration.translate import load_tokenizer, quiet_host, translate_lines

SOURCE = "eng_Latn"


def main() -> int:
    """Score; returns the exit code."""
    arguments = parse_arguments()
    quiet_host()
    torch.set_num_threads(arguments.threads)
    try:
        tokenizer = load_tokenizer(arguments.model)
        model = from_pretrained(arguments.model, dtype="float32")
    except MoEError as error:
        print(f"score: {error}", file=sys.stderr)
        return 2
    scores = {}
    for language, pairs in read_pairs(arguments.pairs, arguments.languages, arguments.limit).items():
        lines = translate_lines(
            model,
            tokenizer,
            [english for english, _ in pairs],
            SOURCE,
            language,
            batch_size=arguments.batch_size,
            generation={"num_beams": arguments.num_beams},
        )
        hypotheses, references = list(lines), [[reference for _, reference in pairs]]
        chrf = sacrebleu.corpus_chrf(hypotheses, references).score
        bleu = sacrebleu.corpus_bleu(hypotheses, references).score
        scores[language] = {"sentences": len(pairs), "chrF": round(chrf, 2), "BLEU": round(bleu, 2)}
        print(f"{language}  {len(pairs):,} sentences  chrF {chrf:.1f}  BLEU {bleu:.1f}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a translation model by language.")
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("pairs", type=Path, help="table: language, English, translation")
    parser.add_argument("--languages", nargs="+", help="only these (default: all in the table)")
    parser.add_argument("--limit", type=int, help="only the first N rows of the table")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the scores here too")
    return parser.parse_args()


def read_pairs(path: Path, languages: list[str] | None, limit: int | None) -> dict[str, list[tuple[str, str]]]:
    """(English, translation) of each language, the languages in order of their names."""
    found = by_language(islice(read_rows(path), limit))
    wanted = sorted(found if languages is None else set(found) & set(languages))
    return {language: [(english, reference) for english, reference, *_ in found[language]] for language in wanted}


if __name__ == "__main__":
    sys.exit(main())
