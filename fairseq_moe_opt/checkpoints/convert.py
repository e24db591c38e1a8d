"""Rewrites a checkpoint as a Transformers folder: safetensors, configuration and, where it can, a tokenizer.

Nothing half-written is ever left under the destination's name: all is written into a temporary folder beside
it, which takes the name at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch

from fairseq_moe_opt.checkpoints import fairseq
from fairseq_moe_opt.checkpoints.expert_dtypes import is_scale, with_expert_dtype, write_note
from fairseq_moe_opt.checkpoints.keymaps import TIED, hf_config, hf_generation_config, hf_names
from fairseq_moe_opt.checkpoints.legacy import legacy_files, rewrite_as_zip
from fairseq_moe_opt.checkpoints.opening import open_index
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord, read_tensor
from fairseq_moe_opt.checkpoints.tokenizer import find_text_files, write_tokenizer
from fairseq_moe_opt.checkpoints.writers import SHARD_BYTES, Output, write_json, write_safetensors
from fairseq_moe_opt.errors import CheckpointError, OptionError

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# Files of a Hugging Face folder that go along with its weights.
_COMPANIONS = (".json", ".model", ".txt", ".md", ".jinja")


@final
@dataclass(frozen=True)
class Conversion:
    """What was written: folder, weight files, number of tensors, their bytes, the tokenizer's kind if any."""

    path: Path
    files: tuple[Path, ...]
    tensors: int
    nbytes: int
    tokenizer: str | None


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    to: str = "hf",
    dtype: str | None = None,
    *,
    spm: str | PathLike[str] | None = None,
    dictionary: str | PathLike[str] | None = None,
    src_lang: str | None = None,
    expert_dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Writes ``src`` as a Transformers folder ``dst`` with safetensors of at most ``shard_bytes`` each.

    A fairseq checkpoint becomes an NLLB-MoE folder, with a tokenizer when a SentencePiece model and a
    dictionary are given as ``spm`` and ``dictionary`` or stand beside it (``spm.model``, ``dict.txt``);
    ``src_lang`` is the tokenizer's first source language. A Hugging Face folder (``pytorch_model*.bin``, zip
    or old format, or safetensors) keeps its names and other files. ``dtype`` None keeps each tensor's own;
    ``expert_dtype`` ``bf16`` or ``int8`` is of the experts alone (see :mod:`.expert_dtypes`).
    Memory holds one tensor at a time. Raises OptionError for an unknown ``to``, ``dtype`` or ``expert_dtype``,
    CheckpointError for a source that cannot be read or expressed, for one whose experts cannot change their
    dtype, and for a destination that holds something already.
    """
    source, target = Path(src), Path(dst)
    wanted = _dtype_of(dtype)
    if to != "hf":
        raise OptionError("to", f"{to!r} is not a format to convert to; the one there is: 'hf'")
    _require_free(target)
    with _readable(source, target) as readable, _staging(target) as folder:
        index = open_index(readable)
        if index.format == fairseq.FORMAT:
            outputs = _fairseq_outputs(index, wanted)
            kind = _write_fairseq_texts(index, source, folder, outputs, (spm, dictionary, src_lang))
        else:
            outputs = _hf_outputs(index, wanted)
            kind = _copy_companions(source, folder, dtype)
        outputs = with_expert_dtype(outputs, expert_dtype, index)
        files = write_safetensors(folder, outputs, shard_bytes, write_note(folder, outputs, expert_dtype, dtype))
    return Conversion(
        target,
        tuple(target / file.name for file in files),
        len(outputs),
        sum(output.nbytes for output in outputs),
        kind,
    )


def _dtype_of(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise OptionError("dtype", f"{name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _require_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(target, "exists already and is not an empty folder; name another destination")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(target, f"cannot be made: folder {target.absolute().parent} does not exist")


@contextmanager
def _readable(source: Path, target: Path) -> Iterator[Path]:
    """The source itself, or, of old-format files, a zip copy beside the target for as long as it is needed."""
    if not legacy_files(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix=".moe-opt-", dir=target.absolute().parent) as folder:
        yield rewrite_as_zip(source, Path(folder))


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name if all goes well, and vanishes if not."""
    parent = target.absolute().parent
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent))
    try:
        folder.chmod(0o755)
        yield folder
        os.rename(folder, target.absolute())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _float_dtype(record: TensorRecord, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to store: only floating tensors are ever converted."""
    return wanted if wanted is not None and record.dtype.is_floating_point else record.dtype


def _fairseq_outputs(index: CheckpointIndex, wanted: torch.dtype | None) -> list[Output]:
    """The tensors to write, under Transformers' names; tied ones once, after a check that they are equal."""
    _require_config_expressible(index)
    names = hf_names(index, index.path)
    _require_tied(index)
    return [Output(new, index[old], _float_dtype(index[old], wanted)) for old, new in names.items()]


def _require_config_expressible(index: CheckpointIndex) -> None:
    """Looks at the options before the names, because their messages say more."""
    if TIED[0] not in index:
        raise CheckpointError(
            index.path, "Transformers' NLLB-MoE cannot express a decoder-only language model (no encoder)"
        )
    hf_config(index.metadata["cfg"], index[TIED[0]].shape[0], index.path, "float32")


def _require_tied(index: CheckpointIndex) -> None:
    first = index[TIED[0]]
    for name in TIED[1:]:
        if name not in index:
            continue
        other = index[name]
        same_place = (other.path, other.offset, other.shape) == (first.path, first.offset, first.shape)
        if not same_place and not (other.shape == first.shape and torch.equal(read_tensor(other), read_tensor(first))):
            raise CheckpointError(
                index.path,
                f"Transformers' NLLB-MoE cannot express untied embeddings: {name} differs from {TIED[0]}",
            )


def _write_fairseq_texts(
    index: CheckpointIndex,
    source: Path,
    folder: Path,
    outputs: list[Output],
    texts: tuple[str | PathLike[str] | None, str | PathLike[str] | None, str | None],
) -> str | None:
    """Writes both configurations and, when there is text to make it from, the tokenizer; returns its kind."""
    cfg = index.metadata["cfg"]
    rows = index[TIED[0]].shape[0]
    dtype = str(outputs[0].dtype).removeprefix("torch.")
    config = hf_config(cfg, rows, index.path, dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", hf_generation_config(config))
    spm, dictionary, src_lang = texts
    found = find_text_files(fairseq.folder_of(source), cfg, spm, dictionary)
    if found is None:
        return None
    return write_tokenizer(
        folder, *found, cfg=cfg, rows=rows, max_length=config["max_position_embeddings"], src_lang=src_lang
    )


def _hf_outputs(index: CheckpointIndex, wanted: torch.dtype | None) -> list[Output]:
    """All tensors under their own names; names that share one memory with the shared embedding only once."""
    shared = {_place(record) for name, record in index.items() if name.endswith("shared.weight")}
    kept = [
        (name, record)
        for name, record in index.items()
        if name.endswith("shared.weight") or _place(record) not in shared
    ]
    return [
        Output(name, record, record.dtype if is_scale(index, name) else _float_dtype(record, wanted))
        for name, record in kept
    ]


def _place(record: TensorRecord) -> tuple[object, ...]:
    return record.path, record.offset, record.shape, record.stride


def _copy_companions(source: Path, folder: Path, dtype: str | None) -> str | None:
    """Copies configuration and tokenizer files; ``config.json`` gets the new dtype. Returns the kind."""
    beside = source if source.is_dir() else source.parent
    for found in sorted(beside.iterdir()):
        is_index = found.name.endswith(".index.json")
        if found.is_file() and found.suffix in _COMPANIONS and not is_index:
            shutil.copyfile(found, folder / found.name)
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        content.pop("torch_dtype", None)
        write_json(config, {**content, "dtype": dtype})
    return "copied" if (folder / "tokenizer.json").is_file() else None
