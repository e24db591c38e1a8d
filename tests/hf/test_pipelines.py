"""The translation task on Transformers 5: the stock call, our own, and that it can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import NllbMoeForConditionalGeneration, pipelines

import hf_integration
from fairseq_moe_opt.errors import CheckpointError, InputError, OptionError
from hf_integration.pipelines import TranslationPipeline, register, unregister
from tests.helpers.translation_models import (
    LANGUAGES,
    TEXTS,
    nllb_moe,
    nllb_tokenizer,
)

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo" / "model"


@pytest.fixture
def registered() -> Iterator[None]:
    """Registered again after the test, as importing the package leaves it."""
    yield
    register()


class TestRegistration:
    def test_import_registers_and_stock_call_optimises(self, stock: TranslationPipeline) -> None:
        assert isinstance(stock, TranslationPipeline)
        assert stock.model.moe.active

    @pytest.mark.usefixtures("registered")
    def test_unregister_puts_everything_back(self) -> None:
        unregister()
        before = (dict(pipelines.SUPPORTED_TASKS), _removed_tasks(), dict(vars(pipelines.PIPELINE_REGISTRY)))
        orders = (list(pipelines.SUPPORTED_TASKS), list(_removed_tasks()))
        assert "translation" not in pipelines.SUPPORTED_TASKS
        register()
        register()
        assert "translation" in pipelines.SUPPORTED_TASKS
        assert "translation" not in _removed_tasks()
        unregister()
        unregister()
        after = (dict(pipelines.SUPPORTED_TASKS), _removed_tasks(), dict(vars(pipelines.PIPELINE_REGISTRY)))
        assert after == before
        assert (list(pipelines.SUPPORTED_TASKS), list(_removed_tasks())) == orders

    @pytest.mark.usefixtures("registered")
    def test_without_it_the_stock_call_fails(self, folder: Path) -> None:
        unregister()
        for task in ("translation", "translation_en_to_fr"):
            with pytest.raises(KeyError, match="translation"):
                transformers.pipeline(task, model=str(folder))
        register()
        assert transformers.pipeline("translation", model=str(folder), **LANGUAGES)("a")

    @pytest.mark.usefixtures("registered")
    def test_other_tasks_registered_meanwhile_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(pipelines.SUPPORTED_TASKS, "mine", {"impl": TranslationPipeline, "pt": ()})
        unregister()
        assert "mine" in pipelines.SUPPORTED_TASKS

    @pytest.mark.usefixtures("registered")
    def test_own_pipeline_works_unregistered_and_leaves_it_so(self, folder: Path) -> None:
        unregister()
        assert hf_integration.pipeline("translation", str(folder), **LANGUAGES)("a")
        assert "translation" not in pipelines.SUPPORTED_TASKS

    def test_task_names_with_languages(self, folder: Path, greedy: list[str]) -> None:
        pipe = transformers.pipeline("translation_eng_Latn_to_fra_Latn", model=str(folder), num_beams=1)
        assert pipe(TEXTS[0])[0]["translation_text"] == greedy[0]

    @pytest.mark.parametrize("task", ["translation_", "translation_eng", "translation_eng_fra"])
    def test_malformed_task_name(self, folder: Path, task: str) -> None:
        with pytest.raises(KeyError, match="translation_SRC_to_TGT"):
            transformers.pipeline(task, model=str(folder))

    def test_no_model_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="default"):
            transformers.pipeline("translation")
        with pytest.raises(OptionError, match="model"):
            hf_integration.pipeline("translation")

    def test_saving_a_pipeline_writes_no_code(self, stock: TranslationPipeline, tmp_path: Path) -> None:
        stock.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))
        again = transformers.pipeline("translation", model=str(tmp_path), **LANGUAGES)
        assert again(TEXTS) == stock(TEXTS)


class TestTranslation:
    def test_equals_generate_of_an_optimised_model(self, greedy: list[str]) -> None:
        model, tokenizer = nllb_moe(), nllb_tokenizer()
        hf_integration.optimize(model, kernel="naive")
        tokenizer.src_lang = "eng_Latn"
        for text, translation in zip(TEXTS, greedy, strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            bos = tokenizer.convert_tokens_to_ids("fra_Latn")
            ids = model.generate(**inputs, forced_bos_token_id=bos, num_beams=1)
            assert tokenizer.decode(ids[0], skip_special_tokens=True) == translation

    def test_shapes_of_results(self, stock: TranslationPipeline) -> None:
        one = stock(TEXTS[0])
        assert [list(record) for record in one] == [["translation_text"]]
        assert stock([TEXTS[0]]) == one
        assert stock((TEXTS[0],)) == one
        assert stock([]) == []

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
    def test_batches_keep_order_and_results(
        self, stock: TranslationPipeline, greedy: list[str], batch_size: int
    ) -> None:
        texts = [TEXTS[0], "", *TEXTS[1:], "  "]
        expected = [greedy[0], "", *greedy[1:], ""]
        results = stock(texts, batch_size=batch_size, num_beams=1)
        assert [record["translation_text"] for record in results] == expected

    def test_generator_gives_one_list_a_text(self, stock: TranslationPipeline, greedy: list[str]) -> None:
        results = stock((text for text in [*TEXTS, ""]), num_beams=1, batch_size=2)
        assert [record["translation_text"] for records in results for record in records] == [*greedy, ""]

    def test_blank_text_never_reaches_the_model(
        self, stock: TranslationPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the model ran")

        monkeypatch.setattr(stock.model, "generate", refuse)
        assert stock("") == [{"translation_text": ""}]
        assert stock(["", " \t"], batch_size=2) == [{"translation_text": ""}] * 2
        assert stock("", num_return_sequences=2) == [{"translation_text": ""}] * 2

    def test_several_sequences_a_text(self, stock: TranslationPipeline) -> None:
        results = stock([*TEXTS, ""], num_beams=3, num_return_sequences=2, batch_size=2)
        assert [len(records) for records in results] == [2] * 5
        assert len(stock(TEXTS[0], num_beams=3, num_return_sequences=2)) == 2

    def test_token_ids(self, stock: TranslationPipeline) -> None:
        (record,) = stock(TEXTS[0], return_tensors=True)
        assert list(record) == ["translation_token_ids"]
        assert record["translation_token_ids"][1] == stock.tokenizer.convert_tokens_to_ids("fra_Latn")
        (both,) = stock(TEXTS[0], return_tensors=True, return_text=True)
        assert both["translation_text"] == stock(TEXTS[0])[0]["translation_text"]
        with pytest.raises(OptionError, match="return_text"):
            stock(TEXTS[0], return_text=False)

    def test_languages_of_a_call_win(self, stock: TranslationPipeline) -> None:
        (record,) = stock(TEXTS[0], tgt_lang="deu_Latn", return_tensors=True)
        assert record["translation_token_ids"][1] == stock.tokenizer.convert_tokens_to_ids("deu_Latn")

    def test_sampling_follows_the_seed(self, stock: TranslationPipeline) -> None:
        def draw() -> list[dict[str, str]]:
            transformers.set_seed(3)
            return stock(TEXTS, do_sample=True, num_beams=1)

        assert draw() == draw()

    def test_stop_sequence(self, stock: TranslationPipeline) -> None:
        (record,) = stock(TEXTS[1], num_beams=1, return_tensors=True)
        whole = record["translation_token_ids"].tolist()
        letter = stock.tokenizer.convert_ids_to_tokens(whole[4])
        (record,) = stock(TEXTS[1], num_beams=1, return_tensors=True, stop_sequence=letter)
        assert record["translation_token_ids"].tolist() == whole[: whole.index(whole[4]) + 1]
        with pytest.raises(OptionError, match="stop_sequence"):
            stock(TEXTS[1], stop_sequence="")


class TestRealModel:
    """The converted checkpoint that comes with the project, through the stock call."""

    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            ("fra_Latn", "La page n'a pas pu être chargée."),
            ("deu_Latn", "Die Seite konnte nicht geladen werden."),
            ("spa_Latn", "No se pudo cargar la página."),
        ],
    )
    def test_literal_translation(self, target: str, expected: str) -> None:
        pipe = transformers.pipeline(
            "translation", model=str(DEMO_MODEL), dtype="float32", src_lang="eng_Latn", tgt_lang=target
        )
        results = pipe(["The page could not be loaded.", ""], batch_size=2)
        assert results[0]["translation_text"] == expected
        assert results[1]["translation_text"] == ""


class TestOwnPipeline:
    def test_folder_id_and_object_agree(self, folder: Path, greedy: list[str]) -> None:
        for model in (str(folder), folder, hf_integration.from_pretrained(folder)):
            pipe = hf_integration.pipeline("translation", model, **LANGUAGES)
            assert [record["translation_text"] for record in pipe(TEXTS, num_beams=1)] == greedy

    def test_options_reach_the_engine(self, folder: Path, greedy: list[str]) -> None:
        loaded = NllbMoeForConditionalGeneration.from_pretrained(folder)
        for model in (folder, loaded):
            pipe = hf_integration.pipeline("translation", model, gating="static", **LANGUAGES)
            assert pipe.model.moe.options.gating == "static"
            assert [record["translation_text"] for record in pipe(TEXTS, num_beams=1)] == greedy
        stock = transformers.pipeline("translation", model=str(folder), kernel="naive", **LANGUAGES)
        assert stock.model.moe.options.kernel == "naive"

    def test_folder_is_loaded_by_from_pretrained(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(NllbMoeForConditionalGeneration, "from_pretrained", None)
        pipe = hf_integration.pipeline("translation", folder, dtype="bfloat16", **LANGUAGES)
        assert pipe.model.dtype is torch.bfloat16
        assert pipe("a")

    def test_hub_arguments_go_to_transformers(self, folder: Path) -> None:
        pipe = hf_integration.pipeline("translation", folder, model_kwargs={}, local_files_only=True, **LANGUAGES)
        assert pipe.model.moe.active
        assert pipe("a")

    def test_wrong_options(self, folder: Path, stock: TranslationPipeline) -> None:
        with pytest.raises(OptionError, match="quantum"):
            hf_integration.pipeline("translation", folder, kernel="quantum")
        with pytest.raises(OptionError, match=r"kernel.*already optimised"):
            hf_integration.pipeline("translation", stock.model, tokenizer=stock.tokenizer, kernel="naive")
        with pytest.raises(InputError, match="text-generation"):
            hf_integration.pipeline("text-generation", folder)

    def test_wrong_models(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(CheckpointError, match=str(path)):
                hf_integration.pipeline("translation", path)


def _removed_tasks() -> dict[str, str]:
    """Empty in releases without the table."""
    return dict(getattr(pipelines, "REMOVED_TASKS", {}))


def test_a_preset_is_an_argument_like_the_options(folder: Path) -> None:
    pipe = hf_integration.pipeline("translation", model=str(folder), preset="static", capacity="none", **LANGUAGES)
    assert (pipe.model.moe.options.gating, pipe.model.moe.options.capacity) == ("static", "none")
    with pytest.raises(OptionError, match=r"preset.*faithful"):
        hf_integration.pipeline("translation", model=str(folder), preset="none such", **LANGUAGES)
