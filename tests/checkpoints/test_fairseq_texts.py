"""fairseq's dictionary and task from a Transformers tokenizer, NLLB's 54B vocabulary included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe_opt.checkpoints.fairseq_task import full_task, task_for_config
from fairseq_moe_opt.checkpoints.fairseq_texts import FairseqTexts, read_hf_texts, write_texts
from fairseq_moe_opt.checkpoints.symbols import DATA_TAGS, build_symbols, read_dictionary
from fairseq_moe_opt.errors import CheckpointError
from tests.helpers.text_samples import DICTIONARY, SPM

CONTROLS = ["<s>", "<pad>", "</s>", "<unk>"]
CODES = ["ace_Arab", "eng_Latn", "zul_Latn"]
PIECES = ["▁the", "an", "fra", "▁"]  # two of them look like language codes and are none


def write_tokenizer_json(folder: Path, pieces: list[str], after: list[str], unigram: bool = False) -> None:
    """The parts of ``tokenizer.json`` that are read: pieces in the vocabulary, the rest added, as NLLB's has it."""
    words = [*CONTROLS, *pieces]
    vocabulary: Any = [[word, -1.0] for word in words] if unigram else {word: at for at, word in enumerate(words)}
    added = [{"id": at, "content": name, "special": True} for at, name in enumerate(CONTROLS)]
    added += [{"id": at, "content": name, "special": True} for at, name in enumerate(after, start=len(words))]
    content = {"model": {"vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def read(folder: Path, rows: int, **how: Any) -> FairseqTexts:
    return read_hf_texts(folder, rows, how.pop("kept_task", None), **how)


def fairseq_symbols(texts: FairseqTexts) -> tuple[str, ...]:
    """The symbols by id as fairseq will number them."""
    assert isinstance(texts.dictionary, tuple)
    return build_symbols(texts.dictionary, texts.dictionary, {"task": texts.task}).names


@pytest.mark.parametrize("unigram", [False, True])
def test_nllb_s_layout_in_small(tmp_path: Path, unigram: bool) -> None:
    write_tokenizer_json(tmp_path, PIECES, [*CODES, "<mask>"], unigram)
    texts = read(tmp_path, 4 + 4 + 3 + 3)
    assert texts.dictionary == tuple(PIECES)
    assert texts.task["langs"] == CODES
    assert texts.task["add_data_source_prefix_tags"] is True
    assert (texts.task["encoder_langtok"], texts.task["decoder_langtok"]) == ("src", True)
    assert fairseq_symbols(texts) == (*CONTROLS, *PIECES, *CODES, *DATA_TAGS)
    assert texts.spm is None and "spm.model" in texts.notes[0]


def test_nllb_s_layout_in_full(tmp_path: Path) -> None:
    """256,001 ids before the languages, 202 languages, three tags: 256,206 rows; HF's mask has the first tag's id."""
    codes = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}a_Latn" for n in range(202)]
    pieces = [f"▁{number}" for number in range(255_997)]
    write_tokenizer_json(tmp_path, pieces, [*codes, "<mask>"])
    texts = read(tmp_path, 256_206)
    assert isinstance(texts.dictionary, tuple) and len(texts.dictionary) == 255_997
    names = fairseq_symbols(texts)
    assert len(names) == 256_206
    assert (names[256_000], names[256_001], names[256_202]) == (pieces[-1], codes[0], codes[-1])
    assert names[256_203:] == DATA_TAGS


def test_without_tags_the_mask_is_beyond_the_last_row(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, PIECES, [*CODES, "<mask>"])
    texts = read(tmp_path, 4 + 4 + 3)
    assert texts.task["add_data_source_prefix_tags"] is False
    assert fairseq_symbols(texts) == (*CONTROLS, *PIECES, *CODES)


def test_other_layouts_keep_every_id_in_the_dictionary(tmp_path: Path) -> None:
    """Languages amid the ids, or rows after them that are no tags, are no task's: all symbols go into dict.txt."""
    write_tokenizer_json(tmp_path, PIECES, [*CODES, "<a>", "<b>"])
    texts = read(tmp_path, 4 + 4 + 3 + 2)
    assert texts.task == {"_name": "translation"}
    assert texts.dictionary == (*PIECES, *CODES, "<a>", "<b>")
    assert read(tmp_path, 4 + 4 + 3 + 2 + 2).dictionary[-2:] == ("madeupword0013", "madeupword0014")


def test_what_a_folder_keeps_wins(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, PIECES, CODES)
    kept = {"_name": "translation_multi_simple_epoch", "langs": "zul_Latn", "encoder_langtok": "src"}
    texts = read(tmp_path, 4 + 4 + 3, kept_task=kept)
    assert texts.task == kept
    assert texts.dictionary == (*PIECES, *CODES[:2])
    (tmp_path / "dict.txt").write_text("".join(f"{name} 7\n" for name in (*PIECES, *CODES)))
    shutil.copyfile(SPM, tmp_path / "sentencepiece.bpe.model")
    texts = read(tmp_path, 4 + 4 + 3)
    assert texts.task == {"_name": "translation"}  # the dictionary is whole
    (tmp_path / "out").mkdir()
    written = write_texts(tmp_path / "out", texts)
    assert [path.name for path in written] == ["dict.txt", "spm.model"]
    assert (tmp_path / "out" / "spm.model").read_bytes() == SPM.read_bytes()
    assert (tmp_path / "out" / "dict.txt").read_bytes() == (tmp_path / "dict.txt").read_bytes()


def test_a_made_dictionary_is_read_back(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, PIECES, CODES)
    texts = read(tmp_path, 4 + 4 + 3)
    write_texts(tmp_path, texts)
    assert read_dictionary(tmp_path / "dict.txt") == tuple(PIECES)
    assert (tmp_path / "dict.txt").read_bytes().endswith("▁ 1\n".encode())


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    texts = read(tmp_path, 11)
    assert (texts.task, texts.dictionary, texts.spm) == ({"_name": "translation"}, None, None)
    assert [note.split(":")[0] for note in texts.notes] == ["no dict.txt", "no spm.model"]


def test_refusals_name_the_file(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, PIECES, CODES)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has ids up to 10, but the embedding has 9 rows"):
        read(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"dict\.txt: gives 8010 symbols, but the embedding has 11 rows"):
        read(tmp_path, 11, dictionary=DICTIONARY)
    write_tokenizer_json(tmp_path, ["a\nb"], CODES)
    with pytest.raises(CheckpointError, match=r"symbol 'a\\nb', which no line"):
        read(tmp_path, 8)
    for content, said in (("{}", "no vocabulary"), ('{"model": {"vocab": {"a": 0}}}', "begins with")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path, 8)


def test_what_config_json_keeps_of_a_task_makes_it_again() -> None:
    task = full_task({"_name": "translation_multi_simple_epoch", "langs": ["a", "b"], "seed": 7}, positions=64)
    kept = task_for_config({"task": {**task, "data": "elsewhere", "unknown": 1}})
    assert kept == {
        "_name": "translation_multi_simple_epoch",
        "langs": ["a", "b"],
        "max_source_positions": 64,
        "max_target_positions": 64,
        "seed": 7,
    }
    assert full_task(kept, positions=1024) == task
    assert task_for_config({"task": {"_name": "language_modeling"}}) is None
    assert task_for_config({}) is None
