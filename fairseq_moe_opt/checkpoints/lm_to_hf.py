"""What a conversion puts into the folder of a decoder-only language model: as ``to_hf`` for translation models."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path

import torch

from fairseq_moe_opt.checkpoints import fairseq
from fairseq_moe_opt.checkpoints.lm_keymaps import EMBEDDING, OUTPUT, lm_config, lm_generation_config, lm_names
from fairseq_moe_opt.checkpoints.lm_tokenizer import write_lm_tokenizer
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, equal_tensors
from fairseq_moe_opt.checkpoints.tokenizer import DICTIONARY_NAME, find_dictionary, find_text_files
from fairseq_moe_opt.checkpoints.writers import Output, float_dtype, write_json
from fairseq_moe_opt.errors import CheckpointError, OptionError


def fairseq_outputs(index: CheckpointIndex, wanted: torch.dtype | None) -> list[Output]:
    """The tensors to write, under the model's names; a tied output projection once, after a check that it is equal."""
    config = _config(index, "float32")  # before the names, because its messages say more
    names = lm_names(index, index.path)
    has_own = config["tie_word_embeddings"] and names.pop(OUTPUT, None) is not None
    if has_own and not equal_tensors(index[EMBEDDING], index[OUTPUT]):
        raise CheckpointError(index.path, f"says that embeddings are shared, but {OUTPUT} differs from {EMBEDDING}")
    outputs = [Output(new, index[old], float_dtype(index[old], wanted)) for old, new in names.items()]
    return sorted(outputs, key=lambda output: (-output.dtype.itemsize, output.name))


def write_fairseq_texts(
    index: CheckpointIndex,
    source: Path,
    folder: Path,
    outputs: list[Output],
    texts: tuple[str | PathLike[str] | None, str | PathLike[str] | None, str | None],
) -> str | None:
    """Writes both configurations and, when there is text to make it from, the tokenizer; returns its kind."""
    spm, dictionary, src_lang = texts
    if src_lang is not None:
        raise OptionError("src_lang", "a language model has no source language")
    cfg = index.metadata["cfg"]
    config = _config(index, str(outputs[0].dtype).removeprefix("torch."))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", lm_generation_config(config))
    beside = fairseq.folder_of(source)
    found = find_text_files(beside, cfg, spm, dictionary)
    if found is None:
        if (words := find_dictionary(beside, cfg)) is not None:
            shutil.copyfile(words, folder / DICTIONARY_NAME)
        return None
    return write_lm_tokenizer(folder, *found, config=config)


def _config(index: CheckpointIndex, dtype: str) -> dict[str, object]:
    shapes = {name: record.shape for name, record in index.items()}
    return lm_config(index.metadata["cfg"], shapes, index.path, dtype)
