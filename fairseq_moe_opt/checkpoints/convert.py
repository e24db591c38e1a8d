"""Rewrites a checkpoint: as a Transformers folder, or in fairseq's layout. The one entry for both directions.

Nothing half-written is ever left under the destination's name: all is written into a temporary folder beside
it, which takes the name (or gives up its files) at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import final

import torch

from fairseq_moe_opt.checkpoints import fairseq, lm_to_hf, to_hf
from fairseq_moe_opt.checkpoints.expert_dtypes import require_float_experts, with_expert_dtype, write_note
from fairseq_moe_opt.checkpoints.fairseq_texts import write_texts
from fairseq_moe_opt.checkpoints.legacy import legacy_files, rewrite_as_zip
from fairseq_moe_opt.checkpoints.lm_keymaps import is_language_model
from fairseq_moe_opt.checkpoints.opening import open_index
from fairseq_moe_opt.checkpoints.staging import staged_files, staged_folder, staging_place, temporary_folder
from fairseq_moe_opt.checkpoints.to_fairseq import Given, from_fairseq, from_hf, require_ranks, write_fairseq
from fairseq_moe_opt.checkpoints.to_hf import copy_companions, hf_outputs
from fairseq_moe_opt.checkpoints.writers import SHARD_BYTES, write_safetensors
from fairseq_moe_opt.errors import CheckpointError, OptionError

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
FORMATS = ("hf", "fairseq")


@final
@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        path: the folder, or ``x.pt``.
        files: the weight files.
        tensors: their number, and ``nbytes`` their bytes, names of one memory counted once.
        tokenizer: its kind or files, None where there is none.
        notes: what a user has to know about what could not be written.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: int
    nbytes: int
    tokenizer: str | None
    notes: tuple[str, ...] = ()


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: str = "hf",
    dtype: str | None = None,
    *,
    ranks: int | None = None,
    spm: Given = None,
    dictionary: Given = None,
    src_lang: str | None = None,
    expert_dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Writes ``src`` as a Transformers folder ``dst`` (``to="hf"``) or as fairseq's ``dst`` = ``x.pt`` (``"fairseq"``).

    As a folder: safetensors of at most ``shard_bytes`` each. A fairseq checkpoint becomes an NLLB-MoE folder, or one of
    this project's language model where it has no encoder, with a tokenizer when a SentencePiece model and a dictionary
    are given as ``spm`` and ``dictionary`` or stand beside it (``spm.model``, ``dict.txt``); ``src_lang`` is the
    tokenizer's first source language. A Hugging Face folder (``pytorch_model*.bin``, zip or old format, or safetensors)
    keeps its names and other files. ``expert_dtype`` ``bf16`` or ``int8`` is of the experts alone (see
    :mod:`.expert_dtypes`).

    For fairseq: one file, or with ``ranks`` N the shared file and N rank files that share the experts evenly, from a
    Transformers NLLB-MoE folder or from any fairseq checkpoint (merged, or spread anew). ``dict.txt`` and
    ``spm.model`` go along.

    ``dtype`` None keeps each tensor's own. Memory holds one tensor at a time. Raises OptionError for an unknown ``to``
    or dtype, for ``ranks`` that do not divide the experts and for an option that would have no effect;
    CheckpointError for a source that cannot be read or expressed, for experts that cannot change their dtype, and for a
    destination that holds something already.
    """
    source, target = Path(src), Path(dst)
    wanted = _dtype_of(dtype)
    if to == "hf":
        if ranks is not None:
            raise OptionError("ranks", "only fairseq has rank files: to='fairseq'")
        texts = (spm, dictionary, src_lang)
        return _to_hf(source, target, dtype, texts, expert_dtype=expert_dtype, shard_bytes=shard_bytes)
    if to != "fairseq":
        raise OptionError("to", f"{to!r} is not a format to convert to; there are: {', '.join(map(repr, FORMATS))}")
    if src_lang is not None:
        raise OptionError("src_lang", "only a Transformers tokenizer starts with a source language: to='hf'")
    if expert_dtype is not None:
        raise OptionError("expert_dtype", "only a Transformers folder has experts of another dtype: to='hf'")
    return _to_fairseq(source, target, wanted, ranks or 0, (spm, dictionary))


def _dtype_of(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise OptionError("dtype", f"{name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _to_hf(
    source: Path,
    target: Path,
    dtype: str | None,
    texts: tuple[Given, Given, str | None],
    *,
    expert_dtype: str | None,
    shard_bytes: int,
) -> Conversion:
    wanted = _dtype_of(dtype)
    _require_free_folder(target)
    with _readable(source, target.absolute().parent) as readable, staged_folder(target) as folder:
        index = open_index(readable)
        if index.format == fairseq.FORMAT:
            kind_of_model = lm_to_hf if is_language_model(index) else to_hf
            outputs = kind_of_model.fairseq_outputs(index, wanted)
            kind = kind_of_model.write_fairseq_texts(index, source, folder, outputs, texts)
        else:
            outputs = hf_outputs(index, wanted)
            kind = copy_companions(source, folder, dtype)
        outputs = with_expert_dtype(outputs, expert_dtype, index)
        files = write_safetensors(folder, outputs, shard_bytes, write_note(folder, outputs, expert_dtype, dtype))
    return Conversion(
        target,
        tuple(target / file.name for file in files),
        len(outputs),
        sum(output.nbytes for output in outputs),
        kind,
    )


def _to_fairseq(
    source: Path, target: Path, wanted: torch.dtype | None, ranks: int, texts: tuple[Given, Given]
) -> Conversion:
    _require_free_files(target)
    folder = target.absolute().parent
    with _readable(source, staging_place(folder)) as readable:
        index = open_index(readable)
        require_float_experts(index)
        read = from_fairseq if index.format == fairseq.FORMAT else from_hf
        checkpoint = read(index, source, wanted, *texts)
        if ranks:
            require_ranks(checkpoint, ranks)
        with staged_files(folder) as made:
            beside = write_texts(made, checkpoint.texts)
            files = write_fairseq(made, target.stem, checkpoint, ranks)
            nbytes = sum(file.stat().st_size for file in files)
    return Conversion(
        target,
        tuple(target.parent / file.name for file in files),
        len(checkpoint.model),
        nbytes,
        " and ".join(file.name for file in beside) or None,
        checkpoint.texts.notes,
    )


def _require_free_folder(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(target, "exists already and is not an empty folder; name another destination")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(target, f"cannot be made: folder {target.absolute().parent} does not exist")


def _require_free_files(target: Path) -> None:
    if target.suffix != ".pt" or fairseq.is_part(target):
        raise CheckpointError(target, "is not what a fairseq checkpoint is called: name it x.pt (suffixes are added)")
    if target.exists() or fairseq.supports_path(target):
        raise CheckpointError(target, "exists already, as one file or several; name another destination")


@contextmanager
def _readable(source: Path, place: Path) -> Iterator[Path]:
    """The source itself, or, of old-format files, a zip copy in ``place`` for as long as it is needed."""
    if not legacy_files(source):
        yield source
        return
    with temporary_folder(place) as folder:
        yield rewrite_as_zip(source, folder)
