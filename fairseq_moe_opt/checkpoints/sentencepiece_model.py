"""A SentencePiece model file as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
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


def is_available() -> bool:
    """Whether the packages that read and make model files are installed."""
    return all(find_spec(name) is not None for name in ("sentencepiece", "google", "google.protobuf"))


def serialized(
    pieces: Sequence[Piece], charsmap: bytes, *, add_dummy_prefix: bool, remove_extra_whitespaces: bool
) -> bytes:
    """The bytes of a unigram model with these pieces in id order; bytes among them make it fall back to bytes."""
    proto = _new_proto()
    proto.trainer_spec.model_type = UNIGRAM
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = any(piece.kind == BYTE for piece in pieces)
    proto.normalizer_spec.precompiled_charsmap = charsmap
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = remove_extra_whitespaces
    for piece in pieces:
        proto.pieces.add(piece=piece.text, score=piece.score, type=piece.kind)
    return bytes(proto.SerializeToString())


def _new_proto() -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise MoEError(
            "making a tokenizer needs sentencepiece and protobuf: pip install sentencepiece protobuf"
        ) from error
    return sentencepiece_model_pb2.ModelProto()


def _parse(path: Path) -> Any:
    proto = _new_proto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose module differs between its implementations
        raise CheckpointError(path, "is not a SentencePiece model") from error
    if not proto.pieces:
        raise CheckpointError(path, "is not a SentencePiece model: it has no pieces")
    return proto
