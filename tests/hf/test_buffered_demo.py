"""The demo checkpoint, stored in half precision, buffered: the same sentences with every policy and budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairseq_moe_opt.buffering import POLICIES
from hf_integration import from_pretrained
from hf_integration.translate import load_tokenizer, translate_lines

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
TEXT = (
    "Save the file before you close the window.",
    "The password is wrong.",
    "No network connection",
    "You can change these settings at any time.",
)


def translations(**options: Any) -> list[str]:
    model = from_pretrained(MODEL, dtype="float32", **options)
    lines = translate_lines(model, load_tokenizer(MODEL), TEXT, "eng_Latn", "fra_Latn", batch_size=2)
    return list(lines)


@pytest.fixture(scope="module")
def resident() -> list[str]:
    return translations()


@pytest.mark.parametrize("eviction", sorted(POLICIES))
@pytest.mark.parametrize(("budget", "pool"), [("10%", "global"), ("50%", "layer")])
def test_every_policy_and_budget(resident: list[str], eviction: str, budget: str, pool: str) -> None:
    assert translations(expert_memory=budget, eviction=eviction, expert_pool=pool) == resident
    assert "Le mot de passe est incorrect." in resident
