"""A SentencePiece model file as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from fairseq_moe_opt.checkpoints.files import require_file
from fairseq_moe_opt.errors import CheckpointError, MoEError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@final
@dataclass(frozen=True)
class Piece:
    """One piece: its text, its score (log-probability, or minus the merge's rank) and its kind."""

    text: str
    score: float
    kind: int


@final
@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer needs of a model: pieces in id order, the algorithm, and how text is normalised."""

    path: Path
    algorithm: int
    pieces: tuple[Piece, ...]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    byte_fallback: bool


def read_model(path: Path) -> SentencePieceModel:
    """Reads a ``.model`` file; CheckpointError for anything else, or for a feature without counterpart."""
    require_file(path)
    proto = _parse(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(path, "is a word or character model; only unigram and BPE models can be converted")
    if trainer.treat_whitespace_as_suffix:
        raise CheckpointError(path, "treats whitespace as a suffix, which no Transformers tokenizer here does")
    if not normalizer.escape_whitespaces:
        raise CheckpointError(path, "does not escape whitespace, which no Transformers tokenizer here does")
    return SentencePieceModel(
        path=path,
        algorithm=int(trainer.model_type),
        pieces=tuple(Piece(piece.piece, piece.score, int(piece.type)) for piece in proto.pieces),
        charsmap=bytes(normalizer.precompiled_charsmap),
        add_dummy_prefix=bool(normalizer.add_dummy_prefix),
        remove_extra_whitespaces=bool(normalizer.remove_extra_whitespaces),
        byte_fallback=bool(trainer.byte_fallback),
    )


def _parse(path: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise MoEError(
            "making a tokenizer needs sentencepiece and protobuf: pip install sentencepiece protobuf"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(path, "is not a SentencePiece model") from error
    if not proto.pieces:
        raise CheckpointError(path, "is not a SentencePiece model: it has no pieces")
    return proto
