"""What ``moe-opt info`` says of a checkpoint, from headers and ``config.json`` alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.sizes import aligned, readable

if TYPE_CHECKING:
    from fairseq_moe_opt.checkpoints import CheckpointIndex, TensorRecord
    from fairseq_moe_opt.cli.buffer_info import BufferPlan

GIB = 1 << 30
HEADROOM = 0.1
"""The share of a memory that is kept free of weights, for activations and the rest of the process."""

_GPU_SIZES = (8, 16, 24, 48, 80)
_ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
_TOP_K: Mapping[str, int] = {"nllb-moe": 2, "switch_transformers": 1}
# One tensor an expert (NLLB-MoE, Switch, fairseq, Mixtral on disk), or all experts of a layer in one.
_EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?:expert_)?(?P<expert>\d+)\..+")
_STACKED = re.compile(r"(?P<layer>.*)\.experts\.(?:gate_up_proj|up_proj|down_proj)(?:_bias|_blocks|_scales)?")
_STACKED_LINEAR = re.compile(r"(?P<layer>.*)\.(?:input|output)_linear\.weight")  # GraniteMoE: three dimensions
_SCALE = ".weight_scale"
"""Ends the names of int8 weights' scales, which are bytes but no parameters."""

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class MoELayerInfo:
    """One Mixture-of-Experts layer: where it is, its experts, and the bytes and elements of all of them.

    ``slot_bytes`` is what one of its experts takes in a buffer, at the dtype it is stored in.
    """

    name: str
    phase: str
    number: int | None
    num_experts: int
    nbytes: int
    parameters: int
    slot_bytes: int


@dataclass(frozen=True)
class Fit:
    """Whether all weights fit a memory, by dtype; ``capacity`` in bytes."""

    memory: str
    capacity: int
    fits: dict[str, bool]


@dataclass(frozen=True)
class CheckpointInfo:
    """What the headers say; bytes are as stored, tensors that share memory counted once.

    Attributes:
        family: ``model_type`` of ``config.json``, or fairseq and its architecture.
        layers: the Mixture-of-Experts layers.
        top_k: experts a token goes to; None when unknown or without such layers.
        width: D; None when unknown.
        one_expert_bytes: of the largest expert.
        expert_dtypes: bytes of expert weights by dtype.
        dtypes: bytes by dtype.
        files: bytes by file name.
        fits: for all weights at other dtypes than stored, too.
    """

    path: str
    format: str
    family: str
    layers: tuple[MoELayerInfo, ...]
    top_k: int | None
    width: int | None
    parameters: int
    dense_bytes: int
    expert_bytes: int
    one_expert_bytes: int
    expert_dtypes: dict[str, int]
    dtypes: dict[str, int]
    files: dict[str, int]
    fits: tuple[Fit, ...]


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Read the headers of ``path``; CheckpointError when it is no checkpoint."""
    from fairseq_moe_opt.checkpoints import open_index

    index = open_index(path)
    return summarize(index, _config_of(index), machine_memory())


def summarize(index: CheckpointIndex, config: Mapping[str, Any], memory: int | None) -> CheckpointInfo:
    """The summary of ``index``; ``config`` is the content of ``config.json``, ``memory`` this machine's bytes."""
    records = _distinct(index.values())
    layers = _moe_layers(records)
    expert_bytes = sum(layer.nbytes for layer in layers)
    total = sum(record.nbytes for record in records)
    parameters = _parameters(records)
    return CheckpointInfo(
        path=str(index.path),
        format=index.format,
        family=_family(index, config),
        layers=layers,
        top_k=_top_k(index, config) if layers else None,
        width=_width(index, config),
        parameters=parameters,
        dense_bytes=total - expert_bytes,
        expert_bytes=expert_bytes,
        one_expert_bytes=max((layer.nbytes // layer.num_experts for layer in layers), default=0),
        expert_dtypes=_bytes_by_dtype(record for record in records if _expert_of(record) is not None),
        dtypes=_bytes_by_dtype(records),
        files={file.name: file.stat().st_size for file in index.files},
        fits=what_fits(parameters, memory),
    )


def _expert_of(record: TensorRecord) -> tuple[str, int] | None:
    """The layer whose experts a tensor is of, and how many there are at least; None for other tensors."""
    if match := _EXPERT.fullmatch(record.name):
        return match["layer"], int(match["expert"]) + 1
    match = _STACKED.fullmatch(record.name)
    if match is None and len(record.shape) == 3:
        match = _STACKED_LINEAR.fullmatch(record.name)
    return (match["layer"], record.shape[0]) if match and record.shape else None


def _parameters(records: Iterable[TensorRecord]) -> int:
    return sum(record.numel for record in records if not record.name.endswith(_SCALE))


def _bytes_by_dtype(records: Iterable[TensorRecord]) -> dict[str, int]:
    dtypes: dict[str, int] = {}
    for record in records:
        name = str(record.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + record.nbytes
    return dtypes


def what_fits(parameters: int, memory: int | None) -> tuple[Fit, ...]:
    """For this machine's memory, where known, and common GPUs: do ``parameters`` fit, with headroom?"""
    places = [("this machine's memory", memory)] if memory is not None else []
    places += [(f"{size} GB GPU", size * GIB) for size in _GPU_SIZES]
    return tuple(
        Fit(
            name,
            capacity,
            {dtype: parameters * width <= capacity * (1 - HEADROOM) for dtype, width in _ITEM_BYTES.items()},
        )
        for name, capacity in places
    )


def machine_memory() -> int | None:
    """Bytes of memory this process may use: the machine's, or the control group's where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def render_info(info: CheckpointInfo, console: Console) -> None:
    """Print ``info`` for a reader."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(info):
        facts.add_row(name, value)
    console.print(facts)
    table = Table(box=box.SIMPLE, title="do all weights fit?", title_justify="left")
    table.add_column("memory", no_wrap=True)
    for dtype, width in _ITEM_BYTES.items():
        table.add_column(f"{dtype}, {readable(info.parameters * width)}", no_wrap=True)
    for fit in info.fits:
        name = fit.memory if "GPU" in fit.memory else f"{fit.memory}, {readable(fit.capacity)}"
        table.add_row(name, *("fits" if good else "too small" for good in fit.fits.values()))
    console.print(table)
    console.print(f"{HEADROOM:.0%} of each memory is left for activations and the rest of the process.")


def info_as_json(info: CheckpointInfo, buffer: BufferPlan | None = None) -> str:
    """``info`` as JSON, with what would be resident where that was asked for."""
    content = asdict(info)
    if buffer is not None:
        content["buffer"] = asdict(buffer)
    return json.dumps(content, indent=2)


def _facts(info: CheckpointInfo) -> Iterable[tuple[str, str]]:
    yield "checkpoint", f"{info.path} ({info.format})"
    yield "family", info.family
    yield "MoE layers", "; ".join(_phases(info)) or "none"
    if info.layers:
        counts = sorted({layer.num_experts for layer in info.layers})
        yield "experts per layer", " or ".join(map(str, counts))
        yield "experts per token", "unknown" if info.top_k is None else str(info.top_k)
    yield "parameters", f"{info.parameters:,}"
    total = max(info.dense_bytes + info.expert_bytes, 1)
    yield "dense weights", f"{readable(info.dense_bytes)} ({info.dense_bytes / total:.0%})"
    if info.layers:
        yield "expert weights", f"{readable(info.expert_bytes)} ({info.expert_bytes / total:.0%})"
        if len(info.dtypes) > 1:
            yield "their dtype", _sizes(info.expert_dtypes)
        yield "one expert", readable(info.one_expert_bytes)
    yield "dtype", _sizes(info.dtypes)
    yield "files", _sizes(info.files)


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({readable(size)})" for name, size in sizes.items())


def _phases(info: CheckpointInfo) -> Iterable[str]:
    for phase in dict.fromkeys(layer.phase for layer in info.layers):
        numbers = [str(layer.number) for layer in info.layers if layer.phase == phase]
        yield f"{phase} {len(numbers)} (layers {', '.join(numbers)})"


def _moe_layers(records: Iterable[TensorRecord]) -> tuple[MoELayerInfo, ...]:
    groups: dict[str, list[tuple[int, TensorRecord]]] = {}
    for record in records:
        if (known := _expert_of(record)) is not None:
            groups.setdefault(known[0], []).append((known[1], record))
    layers = [
        MoELayerInfo(
            name=name,
            phase="encoder" if "encoder" in name.split(".") else "decoder",
            number=int(found[1]) if (found := _NUMBER.search(f"{name}.")) else None,
            num_experts=max(count for count, _ in members),
            nbytes=sum(record.nbytes for _, record in members),
            parameters=_parameters(record for _, record in members),
            slot_bytes=_slot_bytes(members),
        )
        for name, members in groups.items()
    ]
    return tuple(sorted(layers, key=lambda layer: (layer.phase != "encoder", layer.number or 0, layer.name)))


def _slot_bytes(members: Sequence[tuple[int, TensorRecord]]) -> int:
    """Bytes of one expert in a slot, where each tensor starts on a boundary; ``members`` are a layer's tensors."""
    num_experts = max(count for count, _ in members)
    sizes = [record.numel * record.dtype.itemsize for _, record in members]
    if len(sizes) < num_experts:  # all experts of the layer in one tensor
        return sum(aligned(size // num_experts) for size in sizes)
    return sum(aligned(size) for size in sizes) // num_experts


def _distinct(records: Iterable[TensorRecord]) -> list[TensorRecord]:
    """Each byte range once: tied embeddings are several names of one."""
    return list({(one.path, one.offset, one.nbytes, one.shape): one for one in records}.values())


def _config_of(index: CheckpointIndex) -> Mapping[str, Any]:
    if index.format == "fairseq":
        return {}
    folder = index.path if index.path.is_dir() else index.path.parent
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"is not a JSON object: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(path, "is not a JSON object")
    return config


def _family(index: CheckpointIndex, config: Mapping[str, Any]) -> str:
    if index.format == "fairseq":
        model = index.metadata.get("cfg", {}).get("model") or {}
        return f"fairseq {model.get('arch') or model.get('_name') or 'of unknown architecture'}"
    return str(config.get("model_type") or "unknown (no config.json beside the weights)")


def _top_k(index: CheckpointIndex, config: Mapping[str, Any]) -> int | None:
    if index.format == "fairseq":
        model = index.metadata.get("cfg", {}).get("model") or {}
        return 1 if model.get("moe_top1_expert") else 2
    if config.get("model_type") == "fairseq_moe_lm":
        return 1 if config.get("top1") else 2
    known = config.get("num_experts_per_tok", _TOP_K.get(str(config.get("model_type"))))
    return known if isinstance(known, int) else None


def _width(index: CheckpointIndex, config: Mapping[str, Any]) -> int | None:
    if index.format == "fairseq":
        model = index.metadata.get("cfg", {}).get("model") or {}
        known = model.get("decoder_embed_dim")
    else:
        known = config.get("d_model", config.get("hidden_size"))
    return known if isinstance(known, int) else None
