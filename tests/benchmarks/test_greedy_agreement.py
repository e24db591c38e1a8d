"""fairseq and Transformers give the same greedy tokens; and the script that says so can say the opposite."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import Result

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq_moe_opt.checkpoints import convert
from tests.helpers.benchmark_modules import ROOT, benchmark_modules, run_benchmark

MODEL = ROOT / "examples" / "demo" / "model"
SENTENCES = ROOT / "examples" / "demo" / "demo.tsv.gz"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with benchmark_modules("greedy_agreement") as (module,):
        yield module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, converted for fairseq."""
    path = tmp_path_factory.mktemp("fairseq") / "checkpoint.pt"
    convert(MODEL, path, to="fairseq")
    return path


def agreement(model: Path, checkpoint: Path, *options: str) -> Result:
    return run_benchmark("greedy_agreement", str(model), str(checkpoint), str(SENTENCES), *options)


@pytest.mark.slow
def test_the_demo_model_gives_equal_tokens(checkpoint: Path) -> None:
    done = agreement(MODEL, checkpoint, "--limit", "30", "--batch-size", "8")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "30 of 30 sentences have equal tokens"


@pytest.mark.slow
def test_another_model_is_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, tmp_path / "model")
    weights = load_file(MODEL / "model.safetensors")
    name = "model.decoder.layer_norm.weight"
    weights[name] = weights[name] * torch.linspace(0.5, 1.5, len(weights[name])).half()
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = agreement(tmp_path / "model", checkpoint, "--limit", "12", "--max-tokens", "20")
    assert done.exit_code == 1, done.output
    count = re.match(r"(\d+) of 12 sentences", done.output.splitlines()[-1])
    assert count is not None
    assert int(count.group(1)) < 12
    assert "gap of the two best logits" in done.output


@dataclass(frozen=True)
class Fixed:
    """A side that always says the same."""

    ids: dict[int, tuple[int, ...]]
    distance: float

    def translate(self, sentences: Sequence[Any]) -> list[tuple[int, ...]]:
        return [self.ids[sentence.number] for sentence in sentences]

    def gap(self, sentence: Any, prefix: tuple[int, ...]) -> float:
        return self.distance * len(prefix)


def test_a_difference_is_where_two_sides_part(script: ModuleType) -> None:
    sentences = [script.Sentence(number, (4, 9, 2), language=5) for number in (1, 2, 3)]
    one = Fixed({1: (5, 7, 8), 2: (5, 7), 3: (5, 7, 9)}, 0.5)
    two = Fixed({1: (5, 7, 8), 2: (5, 7, 8), 3: (5, 6, 9)}, 0.25)
    found = list(script.differences(one, two, sentences))
    assert [(each.sentence.number, each.prefix, each.gaps) for each in found] == [
        (2, (5, 7), (1.0, 0.5)),
        (3, (5,), (0.5, 0.25)),
    ]


def test_batches_hold_one_language_and_like_lengths(script: ModuleType) -> None:
    lengths = [(5, 5), (6, 2), (5, 1), (5, 3)]
    sentences = [
        script.Sentence(number, (9,) * length, language) for number, (language, length) in enumerate(lengths, start=1)
    ]
    found = [[sentence.number for sentence in batch] for batch in script.batches(sentences, 2)]
    assert found == [[3, 4], [1], [2]]


def test_sentences_are_the_first_two_columns(script: ModuleType, tmp_path: Path) -> None:
    from hf_integration.translate import load_tokenizer

    path = tmp_path / "text.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write('spa_Latn\tOpen "it\tAbrir\tx\ndeu_Latn\tOpen\tOffen\n')
    tokenizer = load_tokenizer(MODEL)
    first, second = script.read_sentences(path, tokenizer, "eng_Latn", None)
    ids = tokenizer.convert_tokens_to_ids
    assert (first.number, first.language, second.language) == (1, ids("spa_Latn"), ids("deu_Latn"))
    assert second.source == tuple(ids(["eng_Latn", *tokenizer.tokenize("Open"), "</s>"]))
    assert len(script.read_sentences(path, tokenizer, "eng_Latn", 1)) == 1
