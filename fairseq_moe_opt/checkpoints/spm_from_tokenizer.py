"""A SentencePiece model made again from the ``tokenizer.json`` that this package wrote for a unigram one.

Pieces, scores and the normalisation table are all in that file, so the model segments as the first one did. (A piece
that was user-defined becomes an ordinary one with the score that made it win.) NLLB's BPE files keep neither the
table nor which merges were pieces, so nothing can be made from them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_moe_opt.checkpoints import sentencepiece_model as spm_model
from fairseq_moe_opt.checkpoints.files import read_json
from fairseq_moe_opt.checkpoints.sentencepiece_model import Piece, serialized
from fairseq_moe_opt.checkpoints.symbols import BOS, CONTROLS, EOS, UNK
from fairseq_moe_opt.checkpoints.tokenizer import EXTRA_SPACES, TOKENIZER, TOKENIZER_CONFIG, UNIGRAM_CLASS

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# SentencePiece's own order of its control symbols, which differs from fairseq's.
_FIRST = (Piece(UNK, 0.0, spm_model.UNKNOWN), Piece(BOS, 0.0, spm_model.CONTROL), Piece(EOS, 0.0, spm_model.CONTROL))


def made_model(folder: Path) -> bytes | None:
    """The model's bytes; None for a tokenizer that this package did not write, or without the packages to make one."""
    config, tokenizer = folder / TOKENIZER_CONFIG, folder / TOKENIZER
    if not (spm_model.is_available() and config.is_file() and tokenizer.is_file()):
        return None
    if read_json(config).get("tokenizer_class") != UNIGRAM_CLASS:
        return None
    content = read_json(tokenizer)
    steps: Sequence[Mapping[str, Any]] = content["normalizer"]["normalizers"]
    tables = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return serialized(
        [*_FIRST, *_pieces(content)],
        base64.b64decode(tables[0]) if tables else b"",
        add_dummy_prefix=any(step["type"] == "Prepend" for step in steps),
        remove_extra_whitespaces=any(step.get("pattern") == {"Regex": EXTRA_SPACES} for step in steps),
    )


def _pieces(content: Mapping[str, Any]) -> list[Piece]:
    """Everything in the vocabulary that is text: added symbols are languages, tags and controls."""
    never_text = {token["content"] for token in content["added_tokens"]}
    vocabulary = content["model"]["vocab"][len(CONTROLS) :]
    bytes_are_pieces = bool(content["model"].get("byte_fallback"))
    return [
        Piece(name, 0.0, spm_model.BYTE)
        if bytes_are_pieces and _BYTE.fullmatch(name)
        else Piece(name, score, spm_model.NORMAL)
        for name, score in vocabulary
        if name not in never_text
    ]
