"""The perplexity benchmark: a small run on the shipped language model, and the rules that make batches and sides."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.helpers.benchmark_modules import ROOT, benchmark_modules

MODEL = ROOT / "examples" / "language_model" / "model"


@pytest.fixture(scope="module")
def perplexity() -> Iterator[ModuleType]:
    with benchmark_modules("perplexity") as (module,):
        yield module


class Letters:
    """A tokenizer: a token a letter."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


def test_blocks_follow_each_other_with_one_token_in_common(perplexity: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc\n\nde\nf\n", encoding="utf-8")  # 0 | 1 2 3 0 | 4 5 0 | 6 0
    (batch,) = perplexity.blocks_of([text], Letters(), length=2, batch=2, batches=9)[:1]
    assert batch.tolist() == [[0, 1, 2], [2, 3, 0]]
    second = perplexity.blocks_of([text], Letters(), length=2, batch=2, batches=9)[1]
    assert second.tolist() == [[0, 4, 5], [5, 0, 6]]


def test_packed_text_is_read_too(perplexity: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt.xz"
    text.write_bytes(lzma.compress(b"ab\n\ncd\n"))
    assert list(perplexity.paragraphs(text)) == ["ab", "cd"]


def test_gatings_that_drop_alike_but_differ_are_refused(perplexity: ModuleType) -> None:
    row = perplexity.Row("x", 0.05, 1.0, 0.0, 1.0)
    one = perplexity.Outcome(row, torch.tensor([1.0, 2.0]))
    perplexity.require_equal(one, one)
    with pytest.raises(Exception, match=r"at fraction 0\.05 differ by 0\.05"):
        perplexity.require_equal(one, perplexity.Outcome(row, torch.tensor([1.0, 2.1])))


def test_a_small_capacity_drops_rows_and_costs_perplexity(perplexity: ModuleType, tmp_path: Path) -> None:
    text, results = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text((ROOT / "docs" / "buffering.md").read_text(encoding="utf-8"), encoding="utf-8")
    perplexity.main(
        [text], model=MODEL, fraction=[0.02], length=64, batch_size=4, batches=2, threads=1, json_file=results
    )
    static, dynamic, whole = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert static["dropped"] == dynamic["dropped"] > 0.2 and whole["dropped"] == 0.0
    assert static["perplexity"] == pytest.approx(dynamic["perplexity"], rel=1e-4)
    assert whole["perplexity"] < dynamic["perplexity"] and math.isfinite(dynamic["perplexity"])
