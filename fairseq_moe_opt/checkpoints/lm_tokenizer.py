"""A language model's tokenizer files: segmentation as for translation models, texts that only begin with a symbol."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_moe_opt.checkpoints import sentencepiece_model as spm_model
from fairseq_moe_opt.checkpoints.sentencepiece_model import read_model
from fairseq_moe_opt.checkpoints.symbols import BOS, CONTROLS, EOS, PAD, UNK, Symbols, build_symbols, read_dictionary
from fairseq_moe_opt.checkpoints.tokenizer import (
    DICTIONARY_NAME,
    SPM_NAMES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    require_complete,
    tokenizer_json,
)
from fairseq_moe_opt.checkpoints.writers import write_json
from fairseq_moe_opt.errors import CheckpointError

TOKENIZER_CLASS = "MoELanguageModelTokenizer"


def write_lm_tokenizer(folder: Path, spm: Path, dictionary: Path, *, config: Mapping[str, Any]) -> str:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` and returns ``unigram`` or ``bpe``.

    ``config`` is the content of ``config.json``. A text begins with ``</s>``, or ``<s>`` where the model was trained
    so, and is open at its end.
    """
    words = read_dictionary(dictionary)
    require_pieces(words, dictionary)
    model = read_model(spm)
    symbols = build_symbols(words, [piece.text for piece in model.pieces if piece.kind != spm_model.CONTROL], {})
    require_complete(model, symbols, dictionary, config["vocab_size"])
    first = BOS if config["add_bos_token"] else EOS
    for source, name in ((spm, SPM_NAMES[0]), (dictionary, DICTIONARY_NAME)):
        shutil.copyfile(source, folder / name)
    content = tokenizer_json(model, symbols, None)
    write_json(folder / TOKENIZER, {**content, "post_processor": _template(symbols, first)})
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(symbols, first, config["max_position_embeddings"]))
    return "bpe" if model.algorithm == spm_model.BPE else "unigram"


def require_pieces(words: Sequence[str], dictionary: Path) -> None:
    """CheckpointError for a dictionary of numbers, which no SentencePiece model has made."""
    numbers = sum(word.isdigit() for word in words)
    if words and numbers > len(words) // 2:
        raise CheckpointError(
            dictionary,
            f"{numbers} of its {len(words)} symbols are numbers, as of GPT-2's byte-level BPE: no tokenizer is made of "
            "that; convert without --spm and --dict, and give the model ids",
        )


def _template(symbols: Symbols, first: str) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": first, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, one],
        "pair": [begin, one, other],
        "special_tokens": {first: {"id": first, "ids": [symbols.id_of(first)], "tokens": [first]}},
    }


def _tokenizer_config(symbols: Symbols, first: str, max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": TOKENIZER_CLASS,
        "backend": "tokenizers",
        "bos_token": first,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": [name for name in symbols.names if name in symbols.special - set(CONTROLS)],
        "split_special_tokens": True,
    }
