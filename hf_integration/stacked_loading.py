"""Loading models behind Transformers' ``ExpertsInterface``: whole through Transformers, or with experts left in files.

Transformers reads all experts of a layer into one tensor. Where they are to be buffered or spread, the model is built
without that tensor's storage, all else is read by Transformers' own table of conversions, and each expert is found in
the files by byte range, whether it is stored alone (Mixtral, OLMoE ...) or in a stack (GPT-OSS, GraniteMoE).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fairseq_moe_opt.build import EXPERT_DTYPES, ExpertLayer, build_buffer
from fairseq_moe_opt.checkpoints import CheckpointIndex, ExpertFiles, TensorRecord, open_index, read_tensor
from fairseq_moe_opt.checkpoints.parts import parts_of
from fairseq_moe_opt.errors import CheckpointError, NoMoELayerError, OptionError
from fairseq_moe_opt.moe.stacked_experts import StackedExperts
from fairseq_moe_opt.moe.types import ExpertKey
from fairseq_moe_opt.options import MoEOptions
from hf_integration.buffered import Reason, refuse_without_experts, require_memory
from hf_integration.expert_parallel import Compared, ExpertParallel, spread_over_ranks
from hf_integration.experts_module import ExpertsModule, experts_modules
from hf_integration.families import experts_interface
from hf_integration.optimize import install
from hf_integration.stored_parameters import StoredParameter, stored_parameters

_WHOLE_POOL = "100%"


def stacked_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that ``config`` names, or its causal language model; None if its file has no experts interface."""
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    mapped = AutoModelForCausalLM._model_mapping.get(type(config), None)
    for one in (*named, mapped):
        known = isinstance(one, type) and issubclass(one, PreTrainedModel)
        if known and one._can_set_experts_implementation():
            return cast(type[PreTrainedModel], one)
    return None


@dataclass(frozen=True)
class StackedSource:
    """What is loaded: a folder, its configuration, and what becomes of them.

    Attributes:
        dtype: of the model's floats.
        device: where it goes.
    """

    folder: Path
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    dtype: torch.dtype
    device: torch.device


def load_stacked(source: StackedSource, options: MoEOptions, parallel: ExpertParallel | None) -> PreTrainedModel:
    """An optimised model; errors as of ``from_pretrained``."""
    experts_interface.require_options(options)
    index = open_index(source.folder)
    with torch.device("meta"):
        outline = source.model_class(source.config)
    layers = experts_interface.trace_layers(outline)
    if not layers:
        raise NoMoELayerError(f"{source.folder / 'config.json'}: {source.model_class.__name__} of it has no experts")
    if options.expert_dtype != "checkpoint" and not options.buffered:
        raise OptionError(
            "expert_dtype",
            f"{options.expert_dtype!r} needs experts that are kept one by one: give expert_memory={_WHOLE_POOL!r} too",
        )
    if not options.buffered and parallel is None:
        model = _whole(source)
        install(model, options)
        return model
    return _with_experts_in_files(source, index, outline, options, parallel)


def _whole(source: StackedSource) -> PreTrainedModel:
    """Loaded by Transformers; CheckpointError where it would invent weights."""
    where = {} if source.device.type == "cpu" else {"device_map": {"": source.device}}
    try:
        model, found = source.model_class.from_pretrained(
            source.folder, config=source.config, dtype=source.dtype, output_loading_info=True, **where
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(source.folder, f"Transformers cannot load it: {' '.join(str(error).split())}") from error
    missing = sorted(found["missing_keys"]) or sorted(str(one) for one in found.get("mismatched_keys", ()))
    if missing:
        raise CheckpointError(
            source.folder, f"lacks {len(missing)} tensors of the model's shapes, first {missing[0]!r}"
        )
    return cast(PreTrainedModel, model.eval())


def _with_experts_in_files(
    source: StackedSource,
    index: CheckpointIndex,
    outline: PreTrainedModel,
    options: MoEOptions,
    parallel: ExpertParallel | None,
) -> PreTrainedModel:
    if getattr(source.config, "quantization_config", None) is not None:
        raise CheckpointError(index.path, "is quantised in a form whose experts cannot be read alone")
    matrices = EXPERT_DTYPES.get(options.expert_dtype, source.dtype)
    if not options.buffered:  # a rank's own experts, each read once, when it is first needed
        options = replace(options, expert_memory=_WHOLE_POOL)
    if options.prefetch == "auto" and source.device.type != "cpu":
        options = replace(options, prefetch="previous")
    spread = None
    if parallel is not None:
        compared = Compared(index, source.config, (source.dtype, matrices), options)
        layers_of_all = experts_interface.trace_layers(outline)
        spread, options = spread_over_ranks(parallel, layers_of_all, compared, source.device)
    model = _without_experts(source, outline)
    stored = stored_parameters(model, index)
    layers = tuple(_expert_layer(name, module, stored, index) for name, module in experts_modules(model))
    held = layers
    if spread is not None:
        held = tuple(replace(one, share=spread.held(one.name)) for one in layers)
    buffer = build_buffer(held, options, source.device, source.dtype, matrices)
    _read_rest(model, stored, index, source)
    handle = install(model, options, buffer, spread)
    state = "buffered" if spread is None else f"spread over {spread.ranks.size} ranks"
    reason = Reason(state, "with expert_memory='all'" if spread is None else "without parallel")
    names = [layer.name for layer in layers]
    refuse_without_experts(model, names, handle.patches, source.device, source.dtype, reason)
    handle.patches.on_undo(_ReadStacks(model, layers, source.dtype, source.device))
    return model


def _without_experts(source: StackedSource, outline: PreTrainedModel) -> PreTrainedModel:
    """The model with memory for everything but its stacks; buffers are what its constructor computes."""
    classes = tuple({type(module) for _, module in experts_modules(outline)})
    with no_init_weights(), _no_stacks(classes):
        model = source.model_class._from_config(source.config, dtype=source.dtype)
    model.tie_weights()
    for pattern, dtype in model._get_dtype_plan(source.dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(pattern, name) and parameter.device.type != "meta":
                parameter.data = parameter.data.to(dtype)
    model.config._name_or_path = str(source.folder)
    if model.can_generate():
        model.generation_config = _generation_config(source)
    return cast(PreTrainedModel, model.eval())


def _generation_config(source: StackedSource) -> Any:
    if (source.folder / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(source.folder)
    return transformers.GenerationConfig.from_model_config(source.config)


@contextmanager
def _no_stacks(classes: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """In this thread, parameters of modules of ``classes`` get no storage."""
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread or not isinstance(module, classes):
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(cast(Any, hook))  # annotated too narrowly
    try:
        yield
    finally:
        handle.remove()


def _expert_layer(
    name: str, module: nn.Module, stored: Mapping[str, StoredParameter], index: CheckpointIndex
) -> ExpertLayer:
    """Where the experts of one module lie."""
    experts = ExpertsModule.of(module)
    fields: list[dict[str, TensorRecord]] = [{} for _ in range(experts.num_experts)]
    for part, leaf in experts.names.items():
        parameter = stored.get(f"{name}.{leaf}")
        if parameter is None:
            raise CheckpointError(index.path, f"lacks the experts' tensor {f'{name}.{leaf}'!r}")
        alone = parameter.experts(index)
        if alone is None:
            _from_stack(fields, experts, part, leaf, index[parameter.only], index)
        else:
            _from_single(fields, experts, part, alone, index)
    return ExpertLayer(name, experts_interface.phase_of(name), tuple(fields))


def _from_stack(
    fields: list[dict[str, TensorRecord]],
    experts: ExpertsModule,
    part: str,
    leaf: str,
    record: TensorRecord,
    index: CheckpointIndex,
) -> None:
    wanted = tuple(cast(Tensor, experts.module._parameters[leaf]).shape)
    if record.shape != wanted:
        raise CheckpointError(
            index.path, f"tensor {record.name!r} has shape {record.shape}, config.json asks for {wanted}"
        )
    views = {
        "first": experts.layout.first,
        "second": experts.layout.second,
        "first_bias": experts.layout.first_bias,
        "second_bias": lambda bias: {"fc2_bias": bias},
    }
    for expert, found in enumerate(fields):
        found.update(parts_of(record, lambda stack, expert=expert: views[part](stack[expert])))  # type: ignore[misc]


def _from_single(
    fields: list[dict[str, TensorRecord]],
    experts: ExpertsModule,
    part: str,
    alone: list[list[TensorRecord]],
    index: CheckpointIndex,
) -> None:
    """Of tensors that are stored expert by expert: gate, then up, as Transformers concatenates them."""
    names = {1: ["fc2_weight"] if part == "second" else ["fc1_weight"], 2: ["gate_weight", "fc1_weight"]}[len(alone)]
    layout, stacks = experts.layout, experts.stacks()
    shape = layout.views(stacks)[names[0]].shape[1:]
    if layout.transposed or layout.interleaved or part.endswith("bias"):
        raise CheckpointError(
            index.path, "stores experts one by one in a layout that is not known; load it with expert_memory='all'"
        )
    for name, records in zip(names, alone, strict=True):
        if len(records) != len(fields):
            raise CheckpointError(
                index.path, f"has {len(records)} tensors like {records[:1]}, of {len(fields)} experts"
            )
        for found, record in zip(fields, records, strict=True):
            if record.shape != tuple(shape):
                raise CheckpointError(
                    index.path, f"tensor {record.name!r} has shape {record.shape}, config.json asks for {tuple(shape)}"
                )
            found[name] = record


def _read_rest(
    model: PreTrainedModel, stored: Mapping[str, StoredParameter], index: CheckpointIndex, source: StackedSource
) -> None:
    """Everything but experts, into the memory that the model has for it."""
    state = model.state_dict()
    wanted = {name: tensor for name, tensor in state.items() if tensor.device.type != "meta"}
    read: set[int] = set()
    for target, parameter in stored.items():
        if target not in wanted:
            continue
        if parameter.converter is None:
            read_tensor(index[parameter.only], out=wanted[target])
            read.add(wanted[target].data_ptr())
            continue
        for name, value in parameter.read(target, index, model).items():
            with torch.no_grad():
                wanted[name].copy_(value)
            read.add(wanted[name].data_ptr())
    left = [name for name, tensor in wanted.items() if tensor.data_ptr() not in read]
    if left:
        raise CheckpointError(index.path, f"lacks {len(left)} tensors the model needs, first {left[0]!r}")
    if source.device.type != "cpu":
        _move(model, source.device)


def _move(model: nn.Module, device: torch.device) -> None:
    """What has storage goes to ``device``."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@dataclass(frozen=True)
class _ReadStacks:
    """The inverse of leaving experts in files: they are read into stacks of the model's own."""

    model: PreTrainedModel
    layers: tuple[ExpertLayer, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> None:
        """Read them; MoEError when there is not enough memory, with nothing changed."""
        modules = {layer.name: self.model.get_submodule(layer.name) for layer in self.layers}
        require_memory(modules.values(), self.device)
        files = ExpertFiles(
            {ExpertKey(layer.name, e): records for layer in self.layers for e, records in enumerate(layer.experts)}
        )
        for layer in self.layers:
            module = modules[layer.name]
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    memory = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
                    module._parameters[name] = nn.Parameter(memory, requires_grad=False)
            experts = ExpertsModule.of(module)
            (wave,) = StackedExperts(experts.layout, experts.stacks).waves(range(experts.num_experts))
            with torch.no_grad():
                for expert, weights in zip(wave.experts, wave.weights, strict=True):
                    files.load(ExpertKey(layer.name, expert), weights)
