"""Transformers tokenizer files from a SentencePiece model and a fairseq dictionary.

Ids are fairseq's. For a unigram model ``tokenizer.json`` segments as SentencePiece does, odd strings
included: text is text, so that a literal ``</s>`` or ``fra_Latn`` in a sentence is cut into pieces and never
becomes the control symbol (``split_special_tokens``). What can differ: where two segmentations have exactly
the same score (``.....`` as ``. ...  .`` or ``. . ...``), SentencePiece's single precision decides by
rounding (about one sentence in 60,000); and sequences of several combining marks that no language writes.
For a BPE model, as NLLB's own, the files are those which Transformers' ``NllbTokenizer`` loads; that class has
its own normalisation.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from fairseq_moe_opt.checkpoints import sentencepiece_model as spm_model
from fairseq_moe_opt.checkpoints.charsmap import GUARD, normalizer_steps, replace_step
from fairseq_moe_opt.checkpoints.sentencepiece_model import Piece, SentencePieceModel, read_model
from fairseq_moe_opt.checkpoints.symbols import (
    BOS,
    CONTROLS,
    DATA_TAGS,
    EOS,
    PAD,
    UNK,
    Symbols,
    build_symbols,
    read_dictionary,
)
from fairseq_moe_opt.checkpoints.writers import write_json
from fairseq_moe_opt.errors import CheckpointError, InputError

UNIGRAM_CLASS = "MoETranslationTokenizer"
BPE_CLASS = "NllbTokenizer"
SPACE = "▁"
MASK = "<mask>"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
EXTRA_SPACES = " {2,}"
DICTIONARY_NAME = "dict.txt"
BPE_NAME = "sentencepiece.bpe.model"
SPM_NAMES = ("spm.model", "sentencepiece.model", BPE_NAME)
# Worse than any way to spell a control symbol in pieces, so that text never turns into one.
_NEVER = -1000.0


def find_text_files(
    folder: Path,
    cfg: Mapping[str, Any],
    spm: str | PathLike[str] | None = None,
    dictionary: str | PathLike[str] | None = None,
) -> tuple[Path, Path] | None:
    """The SentencePiece model and dictionary: as given, else beside the checkpoint; None without them.

    Raises CheckpointError when only one of the two can be found and the other was given.
    """
    model = Path(spm) if spm is not None else _first(folder, SPM_NAMES)
    words = Path(dictionary) if dictionary is not None else find_dictionary(folder, cfg)
    if model is not None and words is not None:
        return model, words
    if spm is not None:
        raise CheckpointError(model or folder, "given without a dictionary, and no dict.txt stands beside it")
    if dictionary is not None:
        raise CheckpointError(words or folder, "given without a SentencePiece model, and no spm.model is there")
    return None


def find_dictionary(folder: Path, cfg: Mapping[str, Any]) -> Path | None:
    """The dictionary beside a checkpoint, None without one."""
    return _first(folder, _dictionary_names(cfg))


def write_tokenizer(
    folder: Path,
    spm: Path,
    dictionary: Path,
    *,
    cfg: Mapping[str, Any],
    rows: int,
    max_length: int,
    src_lang: str | None = None,
) -> str:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` and returns ``unigram`` or ``bpe``.

    Beside them go the SentencePiece model (under NLLB's name for a BPE model) and the dictionary, for the way back.

    ``rows`` is the number of embedding rows, which the symbols have to fill; ``src_lang`` is the language
    baked into the template (default: ``eng_Latn`` where it exists, else the first).
    """
    model = read_model(spm)
    words = read_dictionary(dictionary)
    symbols = build_symbols(words, [piece.text for piece in model.pieces if piece.kind != spm_model.CONTROL], cfg)
    require_complete(model, symbols, dictionary, rows)
    source = _source_language(symbols, src_lang)
    is_bpe = model.algorithm == spm_model.BPE
    if is_bpe:
        symbols = _with_mask(symbols)
    for source_file, name in ((spm, BPE_NAME if is_bpe else SPM_NAMES[0]), (dictionary, DICTIONARY_NAME)):
        if source_file.resolve() != (folder / name).resolve():
            shutil.copyfile(source_file, folder / name)
    write_json(folder / TOKENIZER, tokenizer_json(model, symbols, source))
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(model, symbols, source, max_length))
    return "bpe" if is_bpe else "unigram"


def tokenizer_json(model: SentencePieceModel, symbols: Symbols, src_lang: str | None) -> dict[str, Any]:
    """The content of ``tokenizer.json``: normaliser, model, template ``src_lang $A </s>`` and decoder."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(number, name) for number, name in enumerate(symbols.names) if name in symbols.special
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": _pre_tokenizer(model, symbols),
        "post_processor": _template(symbols, src_lang),
        "decoder": _decoder(model),
        "model": _bpe(model, symbols) if model.algorithm == spm_model.BPE else _unigram(model, symbols),
    }


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _dictionary_names(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """``dict.txt``, or fairseq's own name of the source side's dictionary, which a joined one shares."""
    task = cfg.get("task")
    source = task.get("source_lang") if isinstance(task, Mapping) else None
    return (DICTIONARY_NAME, f"dict.{source}.txt") if source else (DICTIONARY_NAME,)


def require_complete(model: SentencePieceModel, symbols: Symbols, dictionary: Path, rows: int) -> None:
    """The dictionary has to know every piece, and to give as many ids as the embedding has rows."""
    known = set(symbols.names)
    usable = (spm_model.NORMAL, spm_model.USER_DEFINED, spm_model.BYTE)
    lacking = [piece.text for piece in model.pieces if piece.kind in usable and piece.text not in known]
    if lacking:
        raise CheckpointError(
            dictionary,
            f"lacks {len(lacking)} pieces of {model.path.name}, {lacking[0]!r} first: not of this model",
        )
    if len(symbols.names) != rows:
        raise CheckpointError(
            dictionary,
            f"gives {len(symbols.names)} symbols, but the embedding has {rows} rows: not of this model",
        )


def _source_language(symbols: Symbols, wanted: str | None) -> str | None:
    if wanted is not None and wanted not in symbols.languages:
        raise InputError(f"unknown language code {wanted!r}; known: {', '.join(symbols.languages) or 'none'}")
    if wanted is not None or not symbols.languages:
        return wanted
    return "eng_Latn" if "eng_Latn" in symbols.languages else symbols.languages[0]


def _with_mask(symbols: Symbols) -> Symbols:
    """NLLB's layout in Transformers: languages after the pieces, then ``<mask>``; it has no data tags."""
    names = (*(name for name in symbols.names if name not in DATA_TAGS), MASK)
    return Symbols(names, symbols.languages, (symbols.special - set(DATA_TAGS)) | {MASK})


def _added_token(number: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": name == MASK, "rstrip": False, "normalized": name == MASK}
    return {"id": number, "content": name, **flags, "special": True}


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    """SentencePiece's normalisation in its order: the table, spaces, the prefix, spaces as ``▁``.

    Trailing ``▁`` goes last because SentencePiece cuts a literal one at the end of the text as well. Where it
    keeps spaces it puts the prefix even before text of which nothing remains: so guards go after the prefix.
    """
    steps = normalizer_steps(model.charsmap) if model.charsmap else []
    unguard = [replace_step(GUARD, "")] if model.charsmap else []
    prefix: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if model.add_dummy_prefix else []
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not model.remove_extra_whitespaces:
        return [*steps, *prefix, *unguard, escape]
    spaces = [replace_step(r"\A +", ""), replace_step(EXTRA_SPACES, " ")]
    return [*steps, *unguard, *spaces, *prefix, escape, replace_step(rf"{SPACE}+\z", "")]


def _pre_tokenizer(model: SentencePieceModel, symbols: Symbols) -> dict[str, Any] | None:
    """Cuts a literal control symbol in the text where a character without a piece meets one that has a piece.

    There every segmentation has a boundary anyway, so nothing else changes; without the cut the symbol, which
    the vocabulary must hold, would be cheaper than the unknown character. Symbols made of known characters
    need no cut: their score is too low.
    """
    if model.algorithm != spm_model.UNIGRAM:
        return None
    known = {piece.text for piece in model.pieces if piece.kind in (spm_model.NORMAL, spm_model.USER_DEFINED)}
    cuts = []
    for name in sorted(symbols.special):
        for at, (left, right) in enumerate(pairwise(name)):
            if (left in known) != (right in known):
                before = f"(?<={re.escape(name[:at])})" if at else ""
                cuts.append(f"{before}{re.escape(left)}(?={re.escape(name[at + 1 :])})")
                break
    if not cuts:
        return None
    pattern = {"Regex": "|".join(cuts)}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _unigram(model: SentencePieceModel, symbols: Symbols) -> dict[str, Any]:
    """Scores in id order; what is not a piece of text gets a score that no segmentation can choose."""
    scores = {piece.text: _score(model, piece) for piece in model.pieces}
    vocab = [[name, _NEVER if name in symbols.special else scores.get(name, _NEVER)] for name in symbols.names]
    return {
        "type": "Unigram",
        "unk_id": CONTROLS.index(UNK),
        "vocab": vocab,
        "byte_fallback": model.byte_fallback,
    }


def _score(model: SentencePieceModel, piece: Piece) -> float:
    """A piece's score as SentencePiece's search uses it: a user-defined symbol beats its parts."""
    if piece.kind == spm_model.NORMAL:
        return piece.score
    if piece.kind == spm_model.USER_DEFINED:
        best = max((other.score for other in model.pieces if other.kind == spm_model.NORMAL), default=0.0)
        return len(piece.text.encode("utf-8")) * best - 0.1
    return _NEVER


def _bpe(model: SentencePieceModel, symbols: Symbols) -> dict[str, Any]:
    """Ids and merges: every way to cut a piece into two pieces, in SentencePiece's order of merging."""
    ids = {name: number for number, name in enumerate(symbols.names)}
    rank = {
        piece.text: number
        for number, piece in enumerate(model.pieces)
        if piece.kind in (spm_model.NORMAL, spm_model.USER_DEFINED)
    }
    cuts = [
        (rank[text], cut, text)
        for text in rank
        for cut in range(1, len(text))
        if text[:cut] in rank and text[cut:] in rank
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNK,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "vocab": ids,
        "merges": [[text[:cut], text[cut:]] for _, cut, text in sorted(cuts)],
    }


def _template(symbols: Symbols, src_lang: str | None) -> dict[str, Any]:
    """Source ``src_lang tokens </s>``, as NLLB has it; without languages ``tokens </s>``."""
    before = [_special(src_lang)] if src_lang is not None else []
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    used = [EOS] if src_lang is None else [src_lang, EOS]
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, _special(EOS)],
        "pair": [*before, first, second, _special(EOS)],
        "special_tokens": {name: {"id": name, "ids": [symbols.id_of(name)], "tokens": [name]} for name in used},
    }


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    scheme = "always" if model.add_dummy_prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    if not model.byte_fallback:
        return metaspace
    return {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace, {"type": "Fuse"}]}


def _tokenizer_config(
    model: SentencePieceModel, symbols: Symbols, src_lang: str | None, max_length: int
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "src_lang": src_lang,
        "tgt_lang": None,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if model.algorithm == spm_model.BPE:
        extra = {"additional_special_tokens": list(symbols.languages), "mask_token": MASK}
        return {"tokenizer_class": BPE_CLASS, **config, **extra}
    return {
        "tokenizer_class": UNIGRAM_CLASS,
        "backend": "tokenizers",
        **config,
        "extra_special_tokens": [name for name in symbols.names if name in symbols.special - set(CONTROLS)],
        "language_codes": list(symbols.languages),
        "split_special_tokens": True,
    }
