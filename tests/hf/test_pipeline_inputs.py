"""Settings of a translation call, input that cannot be used, and models without experts."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import GenerationConfig

import hf_integration
from fairseq_moe_opt.errors import InputError, NoMoELayerError, OptionError
from hf_integration.pipelines import TranslationPipeline
from tests.helpers.translation_models import (
    LANGUAGES,
    POSITIONS,
    TEXTS,
    dense_model,
    nllb_moe,
    nllb_tokenizer,
    t5_model,
    word_tokenizer,
)


class TestSettings:
    def test_defaults_are_those_of_transformers_4(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = transformers.pipeline("translation", model=str(folder), **LANGUAGES)
        pipe.model.generation_config.max_length = None
        seen = watch_generate(pipe, monkeypatch)
        pipe(TEXTS[0])
        assert (seen[-1].num_beams, seen[-1].max_new_tokens) == (4, 256)
        assert seen[-1].pad_token_id == 1

    @pytest.mark.parametrize(
        ("own", "arguments", "length"),
        [
            ({"max_length": 12}, {}, 12),
            ({"max_length": 12}, {"max_length": 7}, 7),
            ({"max_length": 12}, {"max_new_tokens": 5}, 6),
            ({"max_new_tokens": 12}, {"max_length": 7}, 7),
            ({"max_new_tokens": 12}, {"max_new_tokens": 5}, 6),
            ({}, {"max_length": 7}, 7),
            ({}, {"max_new_tokens": 5}, 6),
            ({"max_length": 12}, {"generation_config": GenerationConfig(max_new_tokens=4)}, 5),
            ({"max_length": 12}, {"generation_config": GenerationConfig(max_length=4), "max_length": 9}, 9),
        ],
    )
    def test_length_limits_without_warnings(
        self, folder: Path, caplog: pytest.LogCaptureFixture, own: dict[str, int], arguments: Any, length: int
    ) -> None:
        pipe = transformers.pipeline("translation", model=str(folder), **LANGUAGES)
        pipe.model.generation_config.max_length = None
        pipe.model.generation_config.update(**own)
        with transformers_logs(caplog), warnings.catch_warnings():
            warnings.simplefilter("error")
            # eos is never the best token here, so that the limit decides
            (record,) = pipe(TEXTS[0], num_beams=1, return_tensors=True, suppress_tokens=[2], **arguments)
        assert len(record["translation_token_ids"]) == length
        assert not caplog.records

    def test_settings_at_construction(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = transformers.pipeline("translation", model=str(folder), num_beams=2, max_length=9, **LANGUAGES)
        seen = watch_generate(pipe, monkeypatch)
        pipe(TEXTS[0])
        pipe(TEXTS[0], num_beams=1)
        assert [(config.num_beams, config.max_length) for config in seen] == [(2, 9), (1, 9)]

    def test_streamer(self, stock: TranslationPipeline, greedy: list[str]) -> None:
        class Collect(transformers.TextStreamer):
            text = ""

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                self.text += text

        streamer = Collect(stock.tokenizer, skip_special_tokens=True)
        stock(TEXTS[0], streamer=streamer)
        assert streamer.text.strip() == greedy[0].strip()

    def test_unknown_argument_is_named(self, folder: Path, stock: TranslationPipeline) -> None:
        for call in (
            lambda: stock("a", num_beam=2),
            lambda: transformers.pipeline("translation", model=str(folder), num_beam=2),
            lambda: hf_integration.pipeline("translation", str(folder), num_beam=2),
        ):
            with pytest.raises(OptionError, match="num_beam"):
                call()
        with pytest.raises(OptionError, match="return_dict_in_generate"):
            stock("a", return_dict_in_generate=True)


class TestBadInput:
    @pytest.mark.parametrize(
        ("languages", "words"),
        [
            ({"src_lang": "eng_Latn", "tgt_lang": "french"}, "tgt_lang 'french'.*fra_Latn"),
            ({"src_lang": "English", "tgt_lang": "fra_Latn"}, "src_lang 'English'.*eng_Latn"),
            ({"src_lang": "eng_Latn"}, "give tgt_lang.*fra_Latn"),
            ({}, "give src_lang and tgt_lang"),
        ],
    )
    def test_languages(self, folder: Path, languages: dict[str, str], words: str) -> None:
        pipe = transformers.pipeline("translation", model=str(folder))
        for text in ("a", ["a"], ""):
            with pytest.raises(InputError, match=words):
                pipe(text, **languages)

    def test_tokenizer_that_cannot_set_languages(self) -> None:
        pipe = transformers.pipeline("translation", model=nllb_moe(), tokenizer=word_tokenizer())
        assert pipe("cat")
        with pytest.raises(OptionError, match="tokenizer"):
            pipe("cat", **LANGUAGES)

    @pytest.mark.parametrize("texts", [None, 3, b"a", ["a", 3], [["a"]], {"text": "a"}])
    def test_not_text(self, stock: TranslationPipeline, texts: Any) -> None:
        with pytest.raises(InputError, match="string"):
            stock(texts)

    def test_long_text_is_cut_with_one_warning(
        self, stock: TranslationPipeline, caplog: pytest.LogCaptureFixture
    ) -> None:
        long = "word " * 5000
        with transformers_logs(caplog):
            results = stock([long, "a", long], batch_size=2, num_beams=1)
        assert [record.getMessage() for record in caplog.records if "48 tokens" in record.getMessage()]
        assert len(caplog.records) == 1
        assert results[0] == results[2]
        ids = stock.preprocess(long, **LANGUAGES)["input_ids"]
        assert ids.shape == (1, POSITIONS)
        assert ids[0, 0] == stock.tokenizer.convert_tokens_to_ids("eng_Latn")
        assert ids[0, -1] == stock.tokenizer.eos_token_id

    def test_exact_fit_is_not_cut(self, stock: TranslationPipeline, caplog: pytest.LogCaptureFixture) -> None:
        fits = "a" * (POSITIONS - 3)  # and language, word start, end
        assert stock.preprocess(fits, **LANGUAGES)["input_ids"].shape == (1, POSITIONS)
        assert not caplog.records

    def test_truncation_asked_for_is_silent(self, stock: TranslationPipeline, caplog: pytest.LogCaptureFixture) -> None:
        with transformers_logs(caplog):
            ids = stock.preprocess("a" * 100, truncation=True, **LANGUAGES)["input_ids"]
        assert ids.shape == (1, POSITIONS)
        assert not caplog.records
        assert stock.preprocess("a" * 100, truncation=False, **LANGUAGES)["input_ids"].shape == (1, 103)


class TestOtherModels:
    """Seq2seq models without experts go through the same pipeline untouched."""

    def test_dense_multilingual(self) -> None:
        model = dense_model()
        pipe = transformers.pipeline("translation", model=model, tokenizer=nllb_tokenizer(), **LANGUAGES)
        assert len(pipe(TEXTS, batch_size=2, max_length=9)) == len(TEXTS)
        assert not hasattr(model, "moe")
        with pytest.raises(NoMoELayerError, match="nllb-moe"):
            hf_integration.pipeline("translation", model, tokenizer=nllb_tokenizer(), gating="static")

    @pytest.mark.parametrize("task", ["translation_en_to_fr", "translation"])
    def test_prefix_and_settings_of_the_task(self, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, tokenizer = t5_model(), word_tokenizer()
        before = copy.deepcopy(model.config.task_specific_params)
        languages = {} if "en" in task else {"src_lang": "en", "tgt_lang": "fr"}
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, **languages)
        seen = watch_generate(pipe, monkeypatch)
        ids = pipe.preprocess("cat", **languages)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["to", "french", "cat", "</s>"]
        assert len(pipe(["cat", "dog dog", ""], batch_size=3)) == 3
        assert (seen[-1].max_length, seen[-1].num_beams) == (6, 2)
        assert model.config.task_specific_params == before

    def test_languages_mean_nothing_to_a_single_pair_model(self) -> None:
        model = t5_model()
        model.config.task_specific_params = None
        pipe = transformers.pipeline("translation", model=model, tokenizer=word_tokenizer(), max_length=5)
        assert pipe("cat") == pipe("cat", src_lang="xx", tgt_lang="yy")

    def test_pairs_the_model_does_not_list(self) -> None:
        pipe = transformers.pipeline("translation", model=t5_model(), tokenizer=word_tokenizer())
        with pytest.raises(InputError, match=r"en_to_es.*en_to_fr"):
            pipe("cat", src_lang="en", tgt_lang="es")
        assert pipe("cat") == pipe("cat", src_lang="en", tgt_lang="fr")  # without any: the first pair

    def test_no_limit_without_positions(self, caplog: pytest.LogCaptureFixture) -> None:
        pipe = transformers.pipeline("translation", model=t5_model(), tokenizer=word_tokenizer())
        assert pipe.preprocess("cat " * 700)["input_ids"].shape == (1, 703)
        assert not [record for record in caplog.records if record.name.startswith("hf_integration")]


def watch_generate(pipe: TranslationPipeline, monkeypatch: pytest.MonkeyPatch) -> list[GenerationConfig]:
    """The generation config of every later call of the model's ``generate``."""
    seen: list[GenerationConfig] = []
    generate = pipe.model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["generation_config"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(pipe.model, "generate", watched)
    return seen


class transformers_logs:  # noqa: N801  a context manager
    """Let ``caplog`` see warnings of Transformers, which keeps its loggers to itself."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __enter__(self) -> None:
        logging.getLogger("transformers").addHandler(self._caplog.handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("transformers").removeHandler(self._caplog.handler)
