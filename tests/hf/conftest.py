"""Fixtures of several test files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from hf_integration.pipelines import TranslationPipeline
from tests.helpers.releases import RELEASE
from tests.helpers.translation_models import LANGUAGES, TEXTS, nllb_moe, nllb_tokenizer


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """A test of a family bears the release of Transformers that it ran with: ``[Mixtral-transformers-5.23.0]``."""
    return f"{val}-transformers-{RELEASE}" if argname in ("family", "variant") else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NLLB-MoE with its tokenizer, as a checkpoint folder."""
    path = tmp_path_factory.mktemp("nllb_moe")
    nllb_moe().save_pretrained(path)
    nllb_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(folder: Path) -> TranslationPipeline:
    """What a user of Transformers calls, with nothing of this project in it."""
    return transformers.pipeline("translation", model=str(folder), **LANGUAGES)


@pytest.fixture(scope="module")
def greedy(stock: TranslationPipeline) -> list[str]:
    return [record["translation_text"] for record in stock(TEXTS, num_beams=1)]
