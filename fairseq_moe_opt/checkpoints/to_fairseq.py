"""What a conversion puts into fairseq's files: one ``x.pt``, or ``x-shared.pt`` and ``x-rank-N.pt``.

The layout is the one of the branches' trainer: gates and everything dense in the shared file, experts in the rank
files, numbered from 0 in each. The optimizer's state is not carried over.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from fairseq_moe_opt.checkpoints import fairseq, fairseq_buffers
from fairseq_moe_opt.checkpoints.fairseq_options import (
    HF_TIED,
    SHARED_EMBEDDING,
    fairseq_model_options,
    fairseq_names,
)
from fairseq_moe_opt.checkpoints.fairseq_task import CONFIG_KEY, as_cfg_section, full_task
from fairseq_moe_opt.checkpoints.fairseq_texts import FairseqTexts, read_hf_texts
from fairseq_moe_opt.checkpoints.files import read_json
from fairseq_moe_opt.checkpoints.keymaps import TIED
from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord, equal_tensors, read_tensor
from fairseq_moe_opt.checkpoints.saved_content import as_saved, slots_in
from fairseq_moe_opt.checkpoints.tokenizer import SPM_NAMES, find_dictionary
from fairseq_moe_opt.checkpoints.torch_writer import write_torch
from fairseq_moe_opt.checkpoints.torch_zip import tensor_records
from fairseq_moe_opt.checkpoints.writers import Output, float_dtype
from fairseq_moe_opt.errors import CheckpointError, OptionError


@final
@dataclass(frozen=True)
class FairseqCheckpoint:
    """A checkpoint to write.

    Attributes:
        path: of the source, for messages.
        model: its tensors by fairseq's names, experts under their global numbers.
        rest: everything beside ``model`` in each file.
        experts: how many a sparse layer has; 0 for a dense model.
        texts: dictionary and SentencePiece model that go beside it.
    """

    path: Path
    model: Mapping[str, Output | Tensor]
    rest: Mapping[str, Any]
    experts: int
    texts: FairseqTexts


Given = str | PathLike[str] | None


def from_hf(
    index: CheckpointIndex, source: Path, wanted: torch.dtype | None, spm: Given, dictionary: Given
) -> FairseqCheckpoint:
    """A Transformers NLLB-MoE folder as fairseq's; CheckpointError for what fairseq cannot express."""
    folder = source if source.is_dir() else source.parent
    config_file = folder / "config.json"
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise CheckpointError(config_file, "is not a JSON object")
    options = fairseq_model_options(config, config_file)
    embedding = _only_embedding(index)
    renamed = {new: index[old] for old, new in fairseq_names(index, index.path).items()}
    texts = read_hf_texts(folder, embedding.shape[0], config.get(CONFIG_KEY), spm, dictionary)
    task = full_task(texts.task, options["max_source_positions"])
    return FairseqCheckpoint(
        path=index.path,
        model=_whole_model(renamed, embedding, wanted, config.get(fairseq_buffers.CONFIG_KEY)),
        rest=_new_rest(options, task),
        experts=fairseq.expert_count(renamed),
        texts=texts,
    )


def from_fairseq(
    index: CheckpointIndex, source: Path, wanted: torch.dtype | None, spm: Given, dictionary: Given
) -> FairseqCheckpoint:
    """Any fairseq checkpoint with all its own names and options, to be merged or spread over other rank files."""
    archive = fairseq.open_file(fairseq.weight_files(index.path)[0])
    rest = {key: value for key, value in archive.content.items() if key not in ("model", "last_optimizer_state")}
    records = tensor_records(archive, {str(id(slot)): slot for slot in slots_in(rest)})
    folder, cfg = fairseq.folder_of(source), index.metadata["cfg"]
    words = Path(dictionary) if dictionary is not None else find_dictionary(folder, cfg)
    model = Path(spm) if spm is not None else next((folder / n for n in SPM_NAMES if (folder / n).is_file()), None)
    return FairseqCheckpoint(
        path=index.path,
        model={name: Output(name, record, float_dtype(record, wanted)) for name, record in index.items()},
        rest=as_saved(rest, lambda slot: read_tensor(records[str(id(slot))])),
        experts=fairseq.expert_count(index),
        texts=FairseqTexts({}, words, model, ()),
    )


def write_fairseq(folder: Path, stem: str, checkpoint: FairseqCheckpoint, ranks: int) -> list[Path]:
    """Writes the file ``stem.pt``, or with ``ranks`` above 0 the shared file and that many rank files."""
    if ranks == 0:
        path = folder / f"{stem}.pt"
        write_torch(path, {**checkpoint.rest, "model": dict(checkpoint.model)})
        return [path]
    require_ranks(checkpoint, ranks)
    each = checkpoint.experts // ranks
    parts: list[dict[str, Output | Tensor]] = [{} for _ in range(ranks)]
    shared: dict[str, Output | Tensor] = {}
    for name, tensor in checkpoint.model.items():
        if not fairseq.is_expert(name):
            shared[name] = tensor
        elif (split := fairseq.split_expert(name)) is not None:
            before, number, after = split
            parts[number // each][f"{before}{number % each}{after}"] = tensor
        else:
            raise CheckpointError(checkpoint.path, f"tensor {name!r} is an expert's, but its name has no number")
    paths = [folder / f"{stem}-shared.pt", *(folder / f"{stem}-rank-{rank}.pt" for rank in range(ranks))]
    for path, model in zip(paths, (shared, *parts), strict=True):
        write_torch(path, {**checkpoint.rest, "model": model})
    return paths


def require_ranks(checkpoint: FairseqCheckpoint, ranks: int) -> None:
    """OptionError unless every one of ``ranks`` files would hold as many whole experts."""
    if checkpoint.experts == 0:
        raise OptionError("ranks", "the model has no experts to spread over rank files; leave it out for one file")
    if ranks < 0 or checkpoint.experts % ranks:
        fitting = ", ".join(str(n) for n in range(1, checkpoint.experts + 1) if checkpoint.experts % n == 0)
        raise OptionError(
            "ranks", f"{ranks} does not divide the {checkpoint.experts} experts of a layer; these do: {fitting}"
        )


def _only_embedding(index: CheckpointIndex) -> TensorRecord:
    """The one embedding, after a check that whatever else a file holds of it is equal."""
    names = [name for name in index if SHARED_EMBEDDING.fullmatch(name)]
    tied = [name for name in index if HF_TIED.fullmatch(name)]
    if not names and not tied:
        raise CheckpointError(index.path, "lacks model.shared.weight: not the weights of an NLLB-MoE model")
    first = index[(names or tied)[0]]
    for name in tied:
        if not equal_tensors(first, index[name]):
            raise CheckpointError(
                index.path, f"fairseq's shared embeddings cannot express that {name} differs from {first.name}"
            )
    return first


def _whole_model(
    renamed: Mapping[str, TensorRecord], embedding: TensorRecord, wanted: torch.dtype | None, kept_buffers: Any
) -> dict[str, Output | Tensor]:
    """fairseq's state dict: the encoder's tensors before the decoder's, and those that Transformers does not have."""
    model: dict[str, Output | Tensor] = {}
    dtype = float_dtype(embedding, wanted)
    for side in ("encoder", "decoder"):
        buffers = fairseq_buffers.buffers_of(side, kept_buffers, dtype)
        model |= {name: tensor if wanted is None else tensor.to(wanted) for name, tensor in buffers.items()}
        model[f"{side}.embed_tokens.weight"] = Output(TIED[0], embedding, dtype)
        model |= {
            name: Output(name, record, float_dtype(record, wanted))
            for name, record in renamed.items()
            if name.startswith(f"{side}.")
        }
    model[TIED[2]] = Output(TIED[0], embedding, dtype)
    return model


def _new_rest(options: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """What fairseq's trainer writes beside the model, for a model that it has not trained yet."""
    return {
        "args": None,
        "cfg": {"_name": None, "model": Namespace(**options), "task": as_cfg_section(task)},
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "LabelSmoothedCrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
            "val_loss": None,
        },
    }
