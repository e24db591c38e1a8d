"""``from_pretrained``: a checkpoint folder or hub id straight to an optimised model, each weight read once.

Nothing is held twice: the model is built without storage, then every tensor is read from its byte range in the shards
(safetensors and ``pytorch_model*.bin`` alike) into the memory the model keeps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeForConditionalGeneration,
    NllbMoeSinusoidalPositionalEmbedding,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersForConditionalGeneration,
)

from fairseq_moe_opt.build import EXPERT_DTYPES, ExpertBuffer, build_buffer, require_ranks
from fairseq_moe_opt.checkpoints import CheckpointIndex, TensorRecord, open_index, read_tensor
from fairseq_moe_opt.checkpoints.expert_dtypes import NOTE, SCALE_SUFFIX, is_scale, scale_of
from fairseq_moe_opt.errors import CheckpointError, NoMoELayerError, OptionError
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from fairseq_moe_opt.presets import with_preset
from hf_integration.buffered import Reason, keep_in_files, refuse_without_experts, require_memory
from hf_integration.expert_dtypes import prepare_experts, read_int8, resolve_expert_dtype
from hf_integration.expert_parallel import Compared, ExpertParallel, spread_over_ranks
from hf_integration.fairseq_lm import FairseqMoELMForCausalLM, register_models
from hf_integration.families import fairseq_lm, nllb_moe, paired_family_of, switch_transformers
from hf_integration.optimize import install
from hf_integration.stacked_loading import StackedSource, load_stacked, stacked_model_class

logger = logging.getLogger(__name__)

MODEL_CLASSES: Mapping[str, type[PreTrainedModel]] = {
    nllb_moe.MODEL_TYPE: NllbMoeForConditionalGeneration,
    switch_transformers.MODEL_TYPE: SwitchTransformersForConditionalGeneration,
    fairseq_lm.MODEL_TYPE: FairseqMoELMForCausalLM,
}
"""Model types of ``config.json`` that ``from_pretrained`` loads."""

register_models()  # AutoConfig is asked for every config.json

_WEIGHT_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


def from_pretrained(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    parallel: ExpertParallel | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load NLLB-MoE, Switch, a language model of fairseq's, or a model behind ``ExpertsInterface``, optimised.

    ``model.moe`` is the handle.

    Args:
        path_or_id: a folder with ``config.json`` and weights, or the id of a repository on the hub.
        dtype: of the weights in memory, a torch dtype or its name; None keeps what ``config.json`` says, else float32.
            Experts may have another one: see the option ``expert_dtype``.
        device: where the model goes; None is the CPU.
        parallel: ranks that share the experts: each reads its own, and all else. Every rank calls this, and later
            ``generate``, at the same time. None is one process with all experts.
        options: fields of :class:`~fairseq_moe_opt.options.MoEOptions`, and ``preset``, as for ``optimize``.

    Raises CheckpointError for a missing, truncated or foreign checkpoint, NoMoELayerError for another kind of model,
    OptionError for a wrong option, PlacementError for a placement that does not fit, ParallelError when ranks were
    started with different things; all are checked before the first weight is read.
    """
    wanted = MoEOptions.from_kwargs(**with_preset(options))
    if parallel is None:
        require_ranks(wanted)
    folder = local_folder(path_or_id)
    stacked = _stacked_source(folder, dtype, device)
    if stacked is not None:
        return load_stacked(stacked, wanted, parallel)
    config = read_config(folder)
    index = open_index(folder)
    target = torch.device(device or "cpu")
    expert_dtype = resolve_expert_dtype(wanted.expert_dtype, config, index)
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    dtypes = _Dtypes(_resolve_dtype(dtype, config), expert_dtype, prepare_experts(model, expert_dtype))
    names = _checkpoint_names(model, index)
    _check_shapes(model, index, names)
    spread = None
    if parallel is not None:
        compared = Compared(index, config, (dtypes.model, dtypes.matrices), wanted)
        spread, wanted = spread_over_ranks(parallel, paired_family_of(model).trace_layers(model), compared, target)
    buffer = _buffer(model, index, names, wanted, target, dtypes, spread) if wanted.buffered else None
    left_out = _left_out(model, spread, buffer is not None)
    _load_weights(model, index, names, dtypes, target, left_out)
    model.config._name_or_path = str(path_or_id)
    model.config.dtype = dtypes.model
    if expert_dtype is not None:
        setattr(model.config, NOTE, expert_dtype)
    _load_generation_config(model, folder)
    model.eval()
    handle = install(model, wanted, buffer, spread)
    blocks = paired_family_of(model).sparse_blocks(model)
    if spread is not None:
        reason = Reason(f"spread over {spread.ranks.size} ranks", "without parallel")
        refuse_without_experts(model, blocks, handle.patches, target, dtypes.model, reason)
        handle.patches.on_undo(_ReadLeftOut(model, index, names, dtypes, target))
    elif buffer is not None:
        experts = {name: paired_family_of(model).expert_pairs(block) for name, block in blocks.items()}
        keep_in_files(model, experts, buffer.stores, handle.patches, target, dtypes.model)
    return model


@dataclass(frozen=True)
class _Dtypes:
    """Of a model's floats, and of its experts where ``expert_dtype`` gives them one of their own.

    ``experts`` are the names of the modules that have it.
    """

    model: torch.dtype
    expert_dtype: str | None
    experts: Collection[str]

    def of(self, module: str) -> torch.dtype:
        """The dtype of the floats of ``module``; int8 experts keep biases of the model's."""
        return torch.bfloat16 if self.expert_dtype == "bf16" and module in self.experts else self.model

    @property
    def matrices(self) -> torch.dtype:
        """Of the experts' matrices."""
        return self.model if self.expert_dtype is None else EXPERT_DTYPES[self.expert_dtype]


def _buffer(
    model: PreTrainedModel,
    index: CheckpointIndex,
    names: Mapping[str, str],
    options: MoEOptions,
    device: torch.device,
    dtypes: _Dtypes,
    spread: ExpertSpread | None,
) -> ExpertBuffer:
    """Slots for the experts, or this rank's, which stay where they are in the files."""

    def find(name: str) -> TensorRecord:
        if name.endswith(SCALE_SUFFIX):
            return scale_of(index, names[name.removesuffix(SCALE_SUFFIX)])
        return index[names[name]]

    layers = paired_family_of(model).expert_layers(model, find)
    if spread is not None:
        layers = tuple(replace(layer, share=spread.held(layer.name)) for layer in layers)
    return build_buffer(layers, options, device, dtypes.model, dtypes.matrices)


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
    model_type = _model_type(folder)
    if model_type not in MODEL_CLASSES:
        raise NoMoELayerError(
            f"{folder / 'config.json'}: model_type {model_type!r} is not one that can be loaded: "
            f"{', '.join(MODEL_CLASSES)}, and those that Transformers runs through its ExpertsInterface"
        )
    return _parsed_config(folder, model_type)


def _stacked_source(
    folder: Path, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> StackedSource | None:
    """What ``folder`` holds, if that is a model behind Transformers' ``ExpertsInterface``."""
    model_type = _model_type(folder)
    if model_type in MODEL_CLASSES or model_type not in CONFIG_MAPPING:
        return None
    config = _parsed_config(folder, model_type)
    model_class = stacked_model_class(config)
    if model_class is None:
        return None
    return StackedSource(folder, config, model_class, _resolve_dtype(dtype, config), torch.device(device or "cpu"))


def _model_type(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(folder, "has no config.json; fairseq checkpoints become a folder with `moe-opt convert`")
    try:
        return cast("str | None", json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(path, f"is not a JSON object: {error}") from error


def _parsed_config(folder: Path, model_type: str | None) -> PreTrainedConfig:
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(folder))
    except Exception as error:  # strict configurations raise classes of the hub client
        reason = " ".join(str(error).split())
        raise CheckpointError(folder / "config.json", f"is not a configuration of {model_type}: {reason}") from error


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
    dtypes: _Dtypes,
    device: torch.device,
    left_out: Collection[str],
) -> None:
    """Give every tensor of a storage-less ``model`` but those ``left_out`` its memory and read it there."""
    for name, stored in names.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if name not in left_out:
            _load_tensor(module, leaf, index, stored, dtypes.of(path), device)
        elif not (isinstance(module, Int8Linear) and leaf == "weight"):
            setattr(module, leaf, nn.Parameter(torch.empty(index[stored].shape, dtype=dtypes.of(path), device="meta")))
    model.tie_weights()
    _make_buffers(model, dtypes.model, device)
    left = [name for name, tensor in _tensors(model) if tensor.device.type == "meta" and name not in left_out]
    if left:
        raise CheckpointError(index.path, f"lacks {len(left)} tensors the model needs, first {left[0]!r}")


def _load_tensor(
    module: nn.Module, leaf: str, index: CheckpointIndex, stored: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the tensor ``leaf`` of ``module`` its memory and read ``stored`` there."""
    if isinstance(module, Int8Linear) and leaf == "weight":
        read_int8(module, index, stored, device)
    else:
        value = torch.empty(index[stored].shape, dtype=dtype, device=device)
        setattr(module, leaf, nn.Parameter(read_tensor(index[stored], out=value)))


@dataclass(frozen=True)
class _ReadLeftOut:
    """The inverse of leaving experts to other ranks, or in the files: they are read."""

    model: PreTrainedModel
    index: CheckpointIndex
    names: Mapping[str, str]
    dtypes: _Dtypes
    device: torch.device

    def __call__(self) -> None:
        """Read them; MoEError when there is not enough memory, with nothing changed."""
        # Which experts are elsewhere is seen now: some may have changed ranks since the model was loaded.
        absent = {
            path: linear
            for path, linear in paired_family_of(self.model).expert_linears(self.model)
            if any(tensor.is_meta for _, tensor in _tensors(linear))
        }
        require_memory(absent.values(), self.device)
        for path, linear in absent.items():
            for leaf in [leaf for leaf, _ in _tensors(linear) if f"{path}.{leaf}" in self.names]:
                stored = self.names[f"{path}.{leaf}"]
                _load_tensor(linear, leaf, self.index, stored, self.dtypes.of(path), self.device)


def _left_out(model: PreTrainedModel, spread: ExpertSpread | None, is_buffered: bool) -> frozenset[str]:
    """Names of the parameters and buffers of experts that are not in the model: all buffered ones, or other ranks'."""
    if spread is None and not is_buffered:
        return frozenset()
    here = {} if spread is None or is_buffered else {name: spread.held(name) for name in spread.slot_maps}
    return frozenset(
        f"{path}.{leaf}"
        for path, linear in paired_family_of(model).expert_linears(model, here)
        for leaf, _ in _tensors(linear)
    )


def _checkpoint_names(model: PreTrainedModel, index: CheckpointIndex) -> dict[str, str]:
    """Parameter name to the checkpoint's name of it; tied copies once. Base-model checkpoints lack the prefix."""
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    # named_parameters gives a tied tensor once, under its first name; the checkpoint may hold it under another.
    tied = _tied_groups(model)
    for name in _stored_names(model):
        candidates = [alias for one in tied.get(name, (name,)) for alias in (one, one.removeprefix(prefix))]
        found = next((alias for alias in candidates if alias in index), None)
        if found is None:
            raise CheckpointError(index.path, f"lacks the tensor {name!r}")
        names[name] = found
    used = set(names.values()) | {alias for group in tied.values() for alias in group}
    unused = {name for name in set(index) - used if not is_scale(index, name)}
    if unused:
        logger.info("%s: %d tensors are not used, such as %s", index.path, len(unused), min(unused))
    return names


def _stored_names(model: PreTrainedModel) -> Iterator[str]:
    """What a checkpoint has to hold: every parameter, and the weights of int8 layers."""
    yield from (name for name, _ in model.named_parameters())
    yield from (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Int8Linear))


def _tied_groups(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """First name of every shared parameter to all its names, the embeddings' included."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in by_id.values() if len(names) > 1}


def _check_shapes(model: PreTrainedModel, index: CheckpointIndex, names: Mapping[str, str]) -> None:
    for name, stored in names.items():
        path, _, leaf = name.rpartition(".")
        shape, wanted = index[stored].shape, tuple(getattr(model.get_submodule(path), leaf).shape)
        if shape != wanted:
            raise CheckpointError(index.path, f"tensor {name!r} has shape {shape}, config.json asks for {wanted}")


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
