"""The tokenizer of the example, before and after save and reload, with and without this package imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from fairseq_moe_opt.errors import InputError
from hf_integration.tokenization import MoETranslationTokenizer, register_tokenizer
from tests.helpers.text_samples import DEMO, LANGUAGES, ODD, demo_lines, sentencepiece_ids

pytest.importorskip("sentencepiece")

MODEL = DEMO / "model"
ENG, FRA, DEU, SPA = 8003, 8004, 8005, 8006
WITHOUT_PLUGIN = """
import json, sys
from transformers import AutoTokenizer
folder, saved = sys.argv[1:]
texts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.save_pretrained(saved)
again = AutoTokenizer.from_pretrained(saved)
ids = tokenizer(texts).input_ids
assert again(texts).input_ids == ids
assert not any(name.startswith(("hf_integration", "fairseq_moe_opt")) for name in sys.modules)
json.dump([type(tokenizer).__name__, ids, tokenizer.batch_decode(ids, skip_special_tokens=True)], sys.stdout)
"""


@pytest.fixture
def tokenizer() -> MoETranslationTokenizer:
    return AutoTokenizer.from_pretrained(MODEL)


def expected_ids(texts: list[str]) -> list[list[int]]:
    return [[ENG, *ids, 2] for ids in sentencepiece_ids(texts)]


def texts() -> list[str]:
    return [*ODD, *demo_lines()[::10]]


def test_the_plugin_s_class_is_found(tokenizer: MoETranslationTokenizer) -> None:
    assert type(tokenizer) is MoETranslationTokenizer
    register_tokenizer()
    assert type(AutoTokenizer.from_pretrained(MODEL)) is MoETranslationTokenizer


def test_ids_equal_sentencepiece_before_and_after_save(tokenizer: MoETranslationTokenizer, tmp_path: Path) -> None:
    wanted = expected_ids(texts())
    assert tokenizer(texts()).input_ids == wanted
    assert [tokenizer(text).input_ids for text in ODD] == expected_ids(ODD)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is MoETranslationTokenizer
    assert again(texts()).input_ids == wanted
    assert again.language_codes == LANGUAGES


def test_ids_without_the_plugin(tmp_path: Path) -> None:
    # A folder of the system, so that nothing of this project is importable by chance.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, str(MODEL), str(tmp_path / "saved")],
        input=json.dumps(texts()),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    kind, ids, decoded = json.loads(done.stdout)
    assert kind == TokenizersBackend.__name__
    assert ids == expected_ids(texts())
    assert decoded[texts().index("a")] == "a"


def test_languages_of_source_and_target(tokenizer: MoETranslationTokenizer) -> None:
    (word,) = sentencepiece_ids(["hello"])
    assert tokenizer.src_lang == "eng_Latn" and tokenizer.tgt_lang is None
    tokenizer.src_lang = "fra_Latn"
    assert tokenizer("hello").input_ids == [FRA, *word, 2]
    tokenizer.tgt_lang = "deu_Latn"
    both = tokenizer("hello", text_target="hello")
    assert both.input_ids == [FRA, *word, 2]
    assert both.labels == [DEU, *word, 2]
    assert tokenizer(text_target=["hello"]).input_ids == [[DEU, *word, 2]]
    assert tokenizer("hello").input_ids == [FRA, *word, 2]


def test_languages_given_when_loading_and_kept_when_saved(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, src_lang="spa_Latn", tgt_lang="eng_Latn")
    assert tokenizer("a").input_ids[0] == SPA
    tokenizer.src_lang = "deu_Latn"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.src_lang, again.tgt_lang) == ("deu_Latn", "eng_Latn")
    assert again("a").input_ids[0] == DEU


def test_unknown_language_lists_the_known_ones(tokenizer: MoETranslationTokenizer) -> None:
    known = "eng_Latn, fra_Latn, deu_Latn, spa_Latn"
    for attribute in ("src_lang", "tgt_lang"):
        with pytest.raises(InputError, match=f"unknown language code 'xyz_Latn'; this tokenizer knows: {known}"):
            setattr(tokenizer, attribute, "xyz_Latn")
    with pytest.raises(InputError, match="'▁de'"):
        tokenizer.lang_id("▁de")
    with pytest.raises(InputError, match="xx"):
        AutoTokenizer.from_pretrained(MODEL, src_lang="xx")
    assert tokenizer("a").input_ids[0] == ENG


def test_translation_inputs(tokenizer: MoETranslationTokenizer) -> None:
    inputs = tokenizer._build_translation_inputs(
        ["hello", "hello hello"], return_tensors="pt", src_lang="eng_Latn", tgt_lang="spa_Latn", padding=True
    )
    assert inputs["forced_bos_token_id"] == SPA
    assert inputs["input_ids"][:, 0].tolist() == [ENG, ENG]
    assert inputs["attention_mask"].sum(dim=1).tolist()[0] < inputs["input_ids"].shape[1]
    with pytest.raises(InputError, match="needs src_lang and tgt_lang"):
        tokenizer._build_translation_inputs(["a"], return_tensors="pt", src_lang=None, tgt_lang="fra_Latn")


def test_languages_are_special_and_text_comes_back(tokenizer: MoETranslationTokenizer) -> None:
    for line in demo_lines()[:200:7]:
        if 3 not in tokenizer(line).input_ids:
            assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line.strip()
    assert set(LANGUAGES) <= set(tokenizer.all_special_tokens)
    assert len(tokenizer) == tokenizer.vocab_size == 8007
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 3)
    assert tokenizer.model_max_length == 256
