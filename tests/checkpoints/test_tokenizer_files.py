"""Tokenizer files from a SentencePiece model and a dictionary: ids equal SentencePiece's, odd strings included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairseq_moe_opt.checkpoints.charsmap import decode_charsmap
from fairseq_moe_opt.checkpoints.sentencepiece_model import read_model
from fairseq_moe_opt.checkpoints.spm_from_tokenizer import made_model
from fairseq_moe_opt.checkpoints.symbols import build_symbols, read_dictionary
from fairseq_moe_opt.checkpoints.tokenizer import find_text_files, write_tokenizer
from fairseq_moe_opt.errors import CheckpointError, InputError
from tests.helpers.text_samples import DICTIONARY, LANGUAGES, ODD, SPM, demo_lines, sentencepiece_ids

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")


def load(folder: Path) -> Any:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True  # what split_special_tokens of tokenizer_config.json sets
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    assert write_tokenizer(made, SPM, DICTIONARY, cfg={}, rows=8007, max_length=256) == "unigram"
    return made


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_strings(folder: Path, text: str) -> None:
    ids = load(folder).encode(text, add_special_tokens=False).ids
    assert ids == sentencepiece_ids([text])[0]


def test_the_model_is_made_again_from_the_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(made_model(folder) or b"")
    lines = [*ODD, *demo_lines()]
    assert sentencepiece_ids(lines, tmp_path / "spm.model") == sentencepiece_ids(lines)


def test_real_sentences(folder: Path) -> None:
    lines = demo_lines()
    made = load(folder).encode_batch(lines, add_special_tokens=False)
    assert [encoding.ids for encoding in made] == sentencepiece_ids(lines)


def test_random_strings_of_troublesome_characters(folder: Path) -> None:
    import random

    drawn = random.Random(3)
    pool = [*"   ▁<>/s_abcéñü①½…\uff45\t\n\x01☃中ش", "</s>", "fra_Latn", "\u0301", "\u0302", "か", "👍", "🏽", "\u200d"]
    texts = ["".join(drawn.choices(pool, k=drawn.randint(1, 12))) for _ in range(3000)]
    made = load(folder).encode_batch(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in made] == sentencepiece_ids(texts)


def test_template_languages_and_config(folder: Path) -> None:
    backend = load(folder)
    first, *_, last = backend.encode("Vertical Space").ids
    assert (first, last) == (8003, 2)
    assert [backend.token_to_id(code) for code in LANGUAGES] == [8003, 8004, 8005, 8006]
    assert backend.decode(backend.encode("Vertical Space").ids, skip_special_tokens=True) == "Vertical Space"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "MoETranslationTokenizer"
    assert config["src_lang"] == "eng_Latn"
    assert config["language_codes"] == LANGUAGES


def test_source_language_may_be_chosen(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, SPM, DICTIONARY, cfg={}, rows=8007, max_length=256, src_lang="deu_Latn")
    assert load(tmp_path).encode("a").ids[0] == 8005
    with pytest.raises(InputError, match="unknown language code 'xyz'; known: eng_Latn, fra_Latn"):
        write_tokenizer(tmp_path, SPM, DICTIONARY, cfg={}, rows=8007, max_length=256, src_lang="xyz")


def test_dictionary_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gives 8007 symbols, but the embedding has 9000 rows"):
        write_tokenizer(tmp_path, SPM, DICTIONARY, cfg={}, rows=9000, max_length=256)
    short = tmp_path / "dict.txt"
    short.write_text("s 1\n. 1\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lacks 7997 pieces of spm\.model"):
        write_tokenizer(tmp_path, SPM, short, cfg={}, rows=6, max_length=256)
    (tmp_path / "spm.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        read_model(tmp_path / "spm.model")


def test_text_files_are_found_beside_or_given(tmp_path: Path) -> None:
    assert find_text_files(tmp_path, {}) is None
    with pytest.raises(CheckpointError, match="given without a dictionary"):
        find_text_files(tmp_path, {}, spm=SPM)
    (tmp_path / "dict.src.txt").write_text("a 1\n")
    cfg = {"task": {"source_lang": "src"}}
    assert find_text_files(tmp_path, cfg, spm=SPM) == (SPM, tmp_path / "dict.src.txt")
    assert find_text_files(SPM.parent, {}) == (SPM, DICTIONARY)


def test_multilingual_task_appends_languages_and_tags() -> None:
    cfg = {
        "task": {
            "_name": "translation_multi_simple_epoch",
            "encoder_langtok": "src",
            "langs": "eng_Latn,fra_Latn",
            "add_data_source_prefix_tags": True,
        }
    }
    symbols = build_symbols(["x", "madeupword0000"], {"x"}, cfg)
    assert symbols.names[4:] == (
        "x",
        "madeupword0000",
        "eng_Latn",
        "fra_Latn",
        "<MINED_DATA>",
        "<MMT_BT_DATA>",
        "<SMT_BT_DATA>",
    )
    assert symbols.languages == ("eng_Latn", "fra_Latn")
    assert "madeupword0000" not in symbols.special
    assert "<MINED_DATA>" in symbols.special


def test_dictionary_is_read_as_fairseq_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_text("a 10\n▁b 3\n<unk> 1 #fairseq:overwrite\n\u2028x 2\n", encoding="utf-8")
    assert read_dictionary(path) == ("a", "▁b", "\u2028x")


def test_charsmap_is_decoded() -> None:
    table = decode_charsmap(read_model(SPM).charsmap)
    assert len(table) == 225276
    assert {key: table[key] for key in ("½", "ﬁ", "\t", "\x01", "e\u0301", "ｶﾞ")} == {
        "½": "1\u20442",
        "ﬁ": "fi",
        "\t": " ",
        "\x01": "",
        "e\u0301": "é",
        "ｶﾞ": "ガ",
    }


TRAINING = ["the quick brown fox jumps over the lazy dog", "she sells sea shells by the sea shore", "héé ça va"] * 30


def train(folder: Path, **options: Any) -> Path:
    text = folder / "text.txt"
    text.write_text("\n".join(TRAINING), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), minloglevel=2, num_threads=1, **options
    )
    return folder / "spm.model"


def write_dictionary(folder: Path, model: Path, *more: str) -> Path:
    pieces = [piece.text for piece in read_model(model).pieces if piece.kind not in (2, 3)]
    path = folder / "dict.txt"
    path.write_text("".join(f"{name} 1\n" for name in (*pieces, *more)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc_cf"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"user_defined_symbols": ["<sep>", "qu"]},
        {"byte_fallback": True, "vocab_size": 330},
    ],
    ids=str,
)
def test_other_unigram_models(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train(tmp_path, **({"vocab_size": 60, "hard_vocab_limit": False} | options))
    words = write_dictionary(tmp_path, model, "eng_Latn")
    rows = 4 + len(read_dictionary(words))
    write_tokenizer(tmp_path, model, words, cfg={}, rows=rows, max_length=64)
    # Noncharacters are used as guards: with byte fallback one would come out as the bytes of another.
    texts = [text for text in (*ODD, *TRAINING[:3], "Quick SEA", "a<sep>b qu") if len(text) < 100]
    texts = [text for text in texts if "\ufdd0" not in text and "\ufdd1" not in text]
    made = load(tmp_path).encode_batch(texts, add_special_tokens=False)
    expected = sentencepiece_ids(texts, model, words)
    again = tmp_path / "again.model"
    again.write_bytes(made_model(tmp_path) or b"")
    assert sentencepiece_ids(texts, again, words) == expected
    assert {ascii(t): e.ids for t, e in zip(texts, made, strict=True)} == {
        ascii(t): ids for t, ids in zip(texts, expected, strict=True)
    }


def test_bpe_model_loads_in_stock_nllb_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = train(tmp_path, vocab_size=70, model_type="bpe", normalization_rule_name="nmt_nfkc")
    words = write_dictionary(tmp_path, model, *LANGUAGES)
    rows = 4 + len(read_dictionary(words))
    made = tmp_path / "made"
    made.mkdir()
    assert write_tokenizer(made, model, words, cfg={}, rows=rows, max_length=64) == "bpe"
    assert made_model(made) is None  # a BPE model cannot be made again; it is kept
    assert (made / "sentencepiece.bpe.model").read_bytes() == model.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made, src_lang="eng_Latn", tgt_lang="deu_Latn")
    assert type(tokenizer) is transformers.NllbTokenizer
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    codes = [tokenizer.convert_tokens_to_ids(code) for code in LANGUAGES]
    assert codes == list(range(rows - 4, rows))
    for text in [*TRAINING[:3], "sea fox", "zebra 日本", "x"]:
        pieces = [3 if piece == 0 else piece + 1 for piece in processor.encode(text)]
        assert tokenizer(text).input_ids == [codes[0], *pieces, 2], text
        assert tokenizer(text_target=text).input_ids == [codes[2], *pieces, 2], text
    assert tokenizer.convert_tokens_to_ids("<mask>") == rows
