"""The quality benchmark: a few sentences from the command line, and the shares it computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.benchmark_modules import benchmark_modules


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with benchmark_modules("int8_quality") as (found,):
        yield found


def test_a_few_sentences(script: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "results" / "quality.json"
    sizes = ["--sentences", "2", "--max-new-tokens", "6", "--threads", str(torch.get_num_threads())]
    done = CliRunner().invoke(script.app, [*sizes, "--json", str(target)])
    assert done.exit_code == 0, done.output
    content = json.loads(target.read_text())
    assert content["arguments"]["sentences"] == {"fra_Latn": 2, "deu_Latn": 2, "spa_Latn": 2}
    rows = {row["experts"]: row for row in content["rows"]}
    assert list(rows) == ["float32", "bf16", "int8"]
    assert rows["float32"]["identical_tokens"] == rows["float32"]["identical_sentences"] == 1.0
    assert rows["bf16"]["expert_bytes"] * 2 == rows["float32"]["expert_bytes"]
    assert 3.5 < rows["float32"]["expert_bytes"] / rows["int8"]["expert_bytes"] < 4
    for row in rows.values():
        assert set(row["chrf"]) == set(row["bleu"]) == {"fra_Latn", "deu_Latn", "spa_Latn"}
        assert 0 <= row["identical_tokens"] <= 1
    assert "x smaller" in done.output


def test_shares(script: ModuleType) -> None:
    # Three of five positions: (1, 1), (2, 9), (3, 3), (4, 4), and one that only one side has.
    assert script.identical([(1, 2, 3), (4,)], [(1, 9, 3), (4, 5)]) == (3 / 5, 0.0)
    assert script.identical([(1,), (2,)], [(1,), (3,)]) == (0.5, 0.5)
    assert script.until_end([5, 6, 2, 1, 1], 2) == (5, 6)
    assert script.until_end([5, 6], 2) == (5, 6)
