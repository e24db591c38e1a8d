"""``from_pretrained``: a checkpoint folder or hub id straight to an optimised model, each weight read once.

Nothing is held twice: the model is built without storage, then every tensor is read from its byte range in the shards
(safetensors and ``pytorch_model*.bin`` alike) into the memory the model keeps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeForConditionalGeneration,
    NllbMoeSinusoidalPositionalEmbedding,
)

from fairseq_moe_opt.build import ExpertBuffer, build_buffer
from fairseq_moe_opt.checkpoints import CheckpointIndex, open_index, read_tensor
from fairseq_moe_opt.errors import CheckpointError, NoMoELayerError, OptionError
from fairseq_moe_opt.options import MoEOptions
from hf_integration.buffered import keep_in_files
from hf_integration.families import nllb_moe
from hf_integration.optimize import install

logger = logging.getLogger(__name__)

MODEL_CLASSES: Mapping[str, type[PreTrainedModel]] = {nllb_moe.MODEL_TYPE: NllbMoeForConditionalGeneration}
"""Model types of ``config.json`` that ``from_pretrained`` loads."""

_WEIGHT_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


def from_pretrained(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load an NLLB-MoE checkpoint, optimised; ``model.moe`` is the handle.

    Args:
        path_or_id: a folder with ``config.json`` and weights, or the id of a repository on the hub.
        dtype: of the weights in memory, a torch dtype or its name; None keeps what ``config.json`` says, else float32.
        device: where the model goes; None is the CPU.
        options: fields of :class:`~fairseq_moe_opt.options.MoEOptions`.

    Raises CheckpointError for a missing, truncated or foreign checkpoint, NoMoELayerError for another kind of model,
    OptionError for a wrong option; options are checked before the first weight is read.
    """
    wanted = MoEOptions.from_kwargs(**options)
    folder = local_folder(path_or_id)
    config = read_config(folder)
    index = open_index(folder)
    target_dtype, target = _resolve_dtype(dtype, config), torch.device(device or "cpu")
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    names = _checkpoint_names(model, index)
    buffer = _buffer(model, index, names, wanted, target, target_dtype) if wanted.buffered else None
    _load_weights(model, index, names, target_dtype, target, experts=buffer is None)
    model.config._name_or_path = str(path_or_id)
    model.config.dtype = target_dtype
    _load_generation_config(model, folder)
    model.eval()
    handle = install(model, wanted, buffer)
    if buffer is not None:
        experts = {name: nllb_moe.expert_pairs(block) for name, block in nllb_moe.sparse_blocks(model).items()}
        keep_in_files(model, experts, buffer.stores, handle.patches, target, target_dtype)
    return model


def _buffer(
    model: PreTrainedModel,
    index: CheckpointIndex,
    names: Mapping[str, str],
    options: MoEOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> ExpertBuffer:
    """Slots for the experts, which stay where they are in the files."""

    layers = nllb_moe.expert_layers(model, lambda name: index[names[name]])
    return build_buffer(layers, options, device, dtype)


def local_folder(path_or_id: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository; CheckpointError when there is neither."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(path, "is a file; a folder with config.json is wanted (see `moe-opt convert`)")
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(path, "no such folder")
    import huggingface_hub  # only a hub id needs it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_WEIGHT_FILES)))
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(name, f"no such folder, and not to be had from the hub: {reason}") from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The ``config.json`` of a model type that can be loaded; CheckpointError or NoMoELayerError otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(folder, "has no config.json; fairseq checkpoints become a folder with `moe-opt convert`")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(path, f"is not a JSON object: {error}") from error
    if model_type not in MODEL_CLASSES:
        raise NoMoELayerError(
            f"{path}: model_type {model_type!r} is not one that can be loaded: {', '.join(MODEL_CLASSES)}"
        )
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(folder))
    except Exception as error:  # strict configurations raise classes of the hub client
        reason = " ".join(str(error).split())
        raise CheckpointError(path, f"is not a configuration of {model_type}: {reason}") from error


def _resolve_dtype(dtype: torch.dtype | str | None, config: PreTrainedConfig) -> torch.dtype:
    wanted = dtype if dtype is not None and dtype != "auto" else getattr(config, "dtype", None)
    if wanted is None:
        return torch.float32
    resolved = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise OptionError(
            "dtype", f"{dtype!r} is not a floating-point dtype such as 'float32', 'bfloat16' or 'float16'"
        )
    return resolved


def _load_weights(
    model: PreTrainedModel,
    index: CheckpointIndex,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    experts: bool,
) -> None:
    """Give every parameter of a storage-less ``model`` its memory and read it there; experts only when asked to."""
    left_out = set() if experts else _expert_parameters(model)
    for name, stored in names.items():
        module, _, leaf = name.rpartition(".")
        record = index[stored]
        _expect_shape(model, name, record.shape, index)
        if name in left_out:
            value = torch.empty(record.shape, dtype=dtype, device="meta")
        else:
            value = read_tensor(record, out=torch.empty(record.shape, dtype=dtype, device=device))
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))
    model.tie_weights()
    _make_buffers(model, dtype, device)
    left = [name for name, tensor in _tensors(model) if tensor.device.type == "meta" and name not in left_out]
    if left:
        raise CheckpointError(index.path, f"lacks {len(left)} tensors the model needs, first {left[0]!r}")


def _expert_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of all experts."""
    return {
        f"{block_name}.experts.{name}"
        for block_name, block in nllb_moe.sparse_blocks(model).items()
        for name, _ in block.experts.named_parameters()
    }


def _checkpoint_names(model: PreTrainedModel, index: CheckpointIndex) -> dict[str, str]:
    """Parameter name to the checkpoint's name of it; tied copies once. Base-model checkpoints lack the prefix."""
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    # named_parameters gives a tied tensor once, under its first name; the checkpoint may hold it under another.
    tied = _tied_groups(model)
    for name, _ in model.named_parameters():
        candidates = [alias for one in tied.get(name, (name,)) for alias in (one, one.removeprefix(prefix))]
        found = next((alias for alias in candidates if alias in index), None)
        if found is None:
            raise CheckpointError(index.path, f"lacks the tensor {name!r}")
        names[name] = found
    unused = set(index) - set(names.values()) - {alias for group in tied.values() for alias in group}
    if unused:
        logger.info("%s: %d tensors are not used, such as %s", index.path, len(unused), min(unused))
    return names


def _tied_groups(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """First name of every shared parameter to all its names, the embeddings' included."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in by_id.values() if len(names) > 1}


def _expect_shape(model: PreTrainedModel, name: str, shape: Iterable[int], index: CheckpointIndex) -> None:
    wanted = tuple(model.get_parameter(name).shape)
    if tuple(shape) != wanted:
        raise CheckpointError(index.path, f"tensor {name!r} has shape {tuple(shape)}, config.json asks for {wanted}")


def _make_buffers(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Buffers are not stored: sinusoidal positions are computed again, as the model's own constructor does."""
    for module in model.modules():
        if isinstance(module, NllbMoeSinusoidalPositionalEmbedding):
            rows = module.num_positions + module.offset
            weights = module.get_embedding(rows, module.embedding_dim, module.padding_idx)
            module.register_buffer("weights", weights.to(device=device, dtype=dtype), persistent=False)


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model.generation_config = GenerationConfig.from_model_config(model.config)
