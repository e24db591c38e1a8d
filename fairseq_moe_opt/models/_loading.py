"""fairseq's checkpoint loader, taught the branches' files and the runtime's options.

``x.pt`` that does not exist but has ``x-shared.pt`` and ``x-rank-N.pt`` is that checkpoint, whatever number of
processes wrote it. Files with experts, one or many, are read by byte range and unpickled by an unpickler that builds
plain data only; dense checkpoints are left to fairseq.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from omegaconf import OmegaConf, open_dict

from fairseq_moe_opt.checkpoints import fairseq as reader
from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.checkpoints.records import read_tensor
from fairseq_moe_opt.checkpoints.saved_content import as_saved, slots_in
from fairseq_moe_opt.checkpoints.torch_zip import TorchZip, open_torch_zip, tensor_records
from fairseq_moe_opt.errors import CheckpointError, NoMoELayerError, OptionError
from fairseq_moe_opt.models._arguments import (
    BATCH_SIZES,
    CAPACITY_ARGUMENTS,
    IMPLIED_BY,
    RUNTIME_ARGUMENTS,
    MoEArguments,
    expand_preset,
    options_from,
    read_arguments,
)

_ELSEWHERE = re.compile(r"moe_(?:gate_loss_.*|cmr_xgpu|generation)")
"""Arguments of the branches that are not the model's: accepted among overrides, without effect on inference."""


def patch_loading() -> None:
    """Wrap fairseq's two functions; a second call changes nothing."""
    for name, wrap in (("load_checkpoint_to_cpu", _wrap_load), ("get_maybe_sharded_checkpoint_filename", _wrap_name)):
        stock = getattr(checkpoint_utils, name)
        if not hasattr(stock, "__wrapped__"):
            setattr(checkpoint_utils, name, functools.wraps(stock)(wrap(stock)))


def _wrap_name(stock: Callable[..., str]) -> Callable[..., str]:
    def find(filename: str, suffix: str, shard_idx: int, num_shards: int) -> str:
        """The file to load; the shared one of a checkpoint that was written by several processes."""
        found = stock(filename, suffix, shard_idx, num_shards)
        path = Path(found)
        if path.suffix != ".pt" or path.exists() or not reader.supports_path(path):
            return found
        return str(reader.weight_files(path)[0])

    return find


def _wrap_load(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def load(path: str, arg_overrides: Mapping[str, Any] | None = None, load_on_all_ranks: bool = False) -> Any:
        """The checkpoint as fairseq's dictionary, the options for its sparse layers in its configuration."""
        given = Path(path)
        refusal = None if _is_parted(given) else _why_not_ours(given)
        if refusal is None:
            state = _load_sparse(given, arg_overrides)
        else:
            state = _load_stock(functools.partial(stock, path, arg_overrides, load_on_all_ranks), given, refusal)
        model = _model_section(state)
        if model is not None:
            apply_overrides(model, expand_preset(arg_overrides or {}), path)
        return state

    return load


def _is_parted(path: Path) -> bool:
    """Whether ``path`` means a checkpoint of shared and rank files."""
    if path.suffix != ".pt":
        return False
    return reader.is_part(path) if path.is_file() else reader.supports_path(path)


def _why_not_ours(path: Path) -> CheckpointError | None:
    """Why a file is left to fairseq: it has no experts, or is not readable here. None for one that is ours."""
    try:
        model = reader.open_file(path).content["model"]
    except CheckpointError as error:
        return error
    return None if _holds_experts(model) else CheckpointError(path, "has no Mixture-of-Experts layer")


def _holds_experts(model: Any) -> bool:
    return isinstance(model, Mapping) and any(reader.is_expert(str(name)) for name in model)


def _load_stock(stock: Callable[[], dict[str, Any]], path: Path, refusal: CheckpointError) -> dict[str, Any]:
    """fairseq's own way, for dense checkpoints of all kinds; what is wrong with a file is said in one line.

    fairseq unpickles in torch's restricted way, which may accept what this project's reader does not know. That is
    enough for a dense model; one with experts is read by this project's reader alone.
    """
    try:
        state = stock()
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        if not path.is_file() or (isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error)):
            raise
        # Says what is wrong better than torch does, where it is one of the usual things.
        open_torch_zip(path)
        raise CheckpointError(path, f"cannot be read: {str(error).splitlines()[0]}") from error
    if _holds_experts(state.get("model")):
        raise refusal
    return state


def _load_sparse(path: Path, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """A checkpoint with experts, in one file or in shared and rank files; its tensors stay there until asked for.

    Without overrides training goes on from it, and the optimizer's state is wanted; otherwise it is not read.
    """
    copies = (overrides or {}).get("replication_count")
    index = reader.read_index(path, None if copies is None else int(copies))
    archive = open_torch_zip(reader.weight_files(path)[0])
    left_out = {"model"} if overrides is None else {"model", "last_optimizer_state"}
    state = _with_tensors(archive, {key: value for key, value in archive.content.items() if key not in left_out})
    state["model"] = LazyStateDict(index)
    if state.get("args") is not None:
        for name, value in (overrides or {}).items():
            setattr(state["args"], name, value)
    if state.get("cfg") is not None:
        state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        overwrite_args_by_name(state["cfg"], dict(overrides or {}))
    upgraded: dict[str, Any] = checkpoint_utils._upgrade_state_dict(state)
    return upgraded


def _with_tensors(archive: TorchZip, content: Any) -> Any:
    """What was pickled beside the model, its tensors (metrics, an optimizer's state) read."""
    records = tensor_records(archive, {str(id(slot)): slot for slot in slots_in(content)})
    return as_saved(content, lambda slot: read_tensor(records[str(id(slot))]))


def _model_section(state: Mapping[str, Any]) -> Any:
    """The model's configuration, wherever this checkpoint's age put it; None in files of other makers."""
    cfg = state.get("cfg")
    return state.get("args") if cfg is None else cfg.get("model")


def apply_overrides(model: Any, overrides: Mapping[str, Any], path: str) -> None:
    """Write the overrides of Mixture-of-Experts arguments into a model's configuration, which may lack their keys.

    The runtime's options and the batch sizes that layers pad to come from the overrides alone: what a training run
    used is forgotten. Raises OptionError for
    a name or value that does not exist, NoMoELayerError for runtime options of a model without sparse layers.
    """
    asked = {name: value for name, value in overrides.items() if name in RUNTIME_ARGUMENTS and value is not None}
    if not read_arguments(model).any_sparse:
        if asked:
            raise NoMoELayerError(f"{path}: {', '.join(asked)} given, but the model has no Mixture-of-Experts layer")
        return
    options_from({RUNTIME_ARGUMENTS[name]: value for name, value in asked.items()})
    known = {item.name for item in fields(MoEArguments) if item.name != "_name"} | set(BATCH_SIZES)
    _require_known(overrides, known)
    implied_by = next((name for name in CAPACITY_ARGUMENTS if name in overrides), None)
    if "moe_capacity" not in asked and implied_by is not None:
        asked |= {"moe_capacity": "checkpoint", IMPLIED_BY: implied_by}
    values: dict[str, Any] = dict.fromkeys((*RUNTIME_ARGUMENTS, IMPLIED_BY, *BATCH_SIZES))
    values |= asked | {name: value for name, value in overrides.items() if name in known}
    with open_dict(model) if OmegaConf.is_config(model) else nullcontext():
        for name, value in values.items():
            setattr(model, name, value)


def _require_known(overrides: Mapping[str, Any], known: set[str]) -> None:
    accepted = known | set(RUNTIME_ARGUMENTS)
    for name in overrides:
        if name.startswith("moe_") and name not in accepted and not _ELSEWHERE.fullmatch(name):
            raise OptionError(name, f"no such Mixture-of-Experts argument; there are {', '.join(sorted(accepted))}")
