"""What a conversion puts into a Transformers folder: which tensors under which names, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_opt.checkpoints import fairseq, fairseq_buffers
from fairseq_moe_opt.checkpoints.expert_dtypes import is_scale
from fairseq_moe_opt.checkpoints.fairseq_task import CONFIG_KEY, task_for_config
from fairseq_moe_opt.checkpoints.keymaps import TIED, hf_config, hf_generation_config, hf_names
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord, equal_tensors
from fairseq_moe_opt.checkpoints.tokenizer import DICTIONARY_NAME, find_dictionary, find_text_files, write_tokenizer
from fairseq_moe_opt.checkpoints.writers import Output, float_dtype, write_json
from fairseq_moe_opt.errors import CheckpointError

# Files of a Hugging Face folder that go along with its weights.
_COMPANIONS = (".json", ".model", ".txt", ".md", ".jinja")


def fairseq_outputs(index: CheckpointIndex, wanted: torch.dtype | None) -> list[Output]:
    """The tensors to write, under Transformers' names; tied ones once, after a check that they are equal.

    In the order in which Transformers writes them: wide dtypes first, then by name.
    """
    _require_config_expressible(index)
    names = hf_names(index, index.path)
    _require_tied(index)
    outputs = [Output(new, index[old], float_dtype(index[old], wanted)) for old, new in names.items()]
    return sorted(outputs, key=lambda output: (-output.dtype.itemsize, output.name))


def _require_config_expressible(index: CheckpointIndex) -> None:
    """Looks at the options before the names, because their messages say more."""
    if TIED[0] not in index:
        raise CheckpointError(index.path, f"lacks {TIED[0]}: neither a translation model nor a language model")
    hf_config(index.metadata["cfg"], index[TIED[0]].shape[0], index.path, "float32")


def _require_tied(index: CheckpointIndex) -> None:
    first = index[TIED[0]]
    for name in TIED[1:]:
        if name in index and not equal_tensors(first, index[name]):
            raise CheckpointError(
                index.path,
                f"Transformers' NLLB-MoE cannot express untied embeddings: {name} differs from {TIED[0]}",
            )


def write_fairseq_texts(
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
    task = task_for_config(cfg)
    if task is not None:
        config[CONFIG_KEY] = task
    config[fairseq_buffers.CONFIG_KEY] = fairseq_buffers.buffers_for_config(index)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", hf_generation_config(config))
    spm, dictionary, src_lang = texts
    beside = fairseq.folder_of(source)
    found = find_text_files(beside, cfg, spm, dictionary)
    if found is None:
        if (words := find_dictionary(beside, cfg)) is not None:
            shutil.copyfile(words, folder / DICTIONARY_NAME)
        return None
    return write_tokenizer(
        folder, *found, cfg=cfg, rows=rows, max_length=config["max_position_embeddings"], src_lang=src_lang
    )


def hf_outputs(index: CheckpointIndex, wanted: torch.dtype | None) -> list[Output]:
    """All tensors under their own names; names that share one memory with the shared embedding only once."""
    shared = {_place(record) for name, record in index.items() if name.endswith("shared.weight")}
    kept = [
        (name, record)
        for name, record in index.items()
        if name.endswith("shared.weight") or _place(record) not in shared
    ]
    return [
        Output(name, record, record.dtype if is_scale(index, name) else float_dtype(record, wanted))
        for name, record in kept
    ]


def _place(record: TensorRecord) -> tuple[object, ...]:
    return record.path, record.offset, record.shape, record.stride


def copy_companions(source: Path, folder: Path, dtype: str | None) -> str | None:
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
