"""What families have in common whose experts are pairs of linear layers, ``fc1`` and ``fc2``, in modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.build import (
    BufferedShare,
    ExpertBuffer,
    ExpertLayer,
    ExpertShare,
    LayerSpec,
    ModuleShare,
    build_layer,
    connect_routers,
    needs_packed_experts,
)
from fairseq_moe_opt.checkpoints import TensorRecord
from fairseq_moe_opt.checkpoints.expert_dtypes import SCALE_SUFFIX
from fairseq_moe_opt.moe import MoELayer
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from fairseq_moe_opt.moe.module_experts import Int8ModuleExperts, ModuleExperts, PackedModuleExperts
from fairseq_moe_opt.moe.trace import TraceLayer
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread
from hf_integration.padding import PaddingMasks, watch_padding
from hf_integration.patching import Installed, Patches

PHASES = ("encoder", "decoder")
NO_EXPERTS: Mapping[str, Collection[int]] = MappingProxyType({})
_LINEARS = ("fc1", "fc2")

Pairs = Sequence[tuple[nn.Module, nn.Module]]
"""(fc1, fc2) of experts."""
Gate = Callable[[Tensor], Tensor]


def phase_of(name: str) -> str:
    """The phase of the layer ``name``."""
    return "decoder" if "decoder." in name else "encoder"


@dataclass(frozen=True)
class PairedExperts:
    """The sparse layers of a model.

    Attributes:
        blocks: by name, in the model's order; each has ``num_experts`` and a container ``experts``.
        label: what that container calls an expert, by its number.
    """

    blocks: Mapping[str, nn.Module]
    label: str

    def pairs(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """(fc1, fc2) of every expert, by name: the container may hold other modules."""
        labels = map(self.label.format, range(num_experts(block)))
        experts = [block.get_submodule(f"experts.{label}") for label in labels]
        return [(expert.get_submodule("fc1"), expert.get_submodule("fc2")) for expert in experts]

    def linears(self, but_of: Mapping[str, Collection[int]] = NO_EXPERTS) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of every expert's ``fc1`` and ``fc2``, in the model's order.

        ``but_of``: experts of a layer, by its name, that are left out.
        """
        for name, block in self.blocks.items():
            for index, pair in enumerate(self.pairs(block)):
                if index in but_of.get(name, ()):
                    continue
                for layer, linear in zip(_LINEARS, pair, strict=True):
                    yield f"{name}.experts.{self.label.format(index)}.{layer}", linear

    def layers(self, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
        """Where the experts of every layer lie; ``records`` finds a parameter by its name in the model."""
        return tuple(
            ExpertLayer(
                name,
                phase_of(name),
                tuple(
                    _records(f"{name}.experts.{self.label.format(index)}", records)
                    for index in range(num_experts(block))
                ),
            )
            for name, block in self.blocks.items()
        )

    def trace_layers(self) -> tuple[TraceLayer, ...]:
        """Name, phase and E of every layer."""
        return tuple(TraceLayer(name, phase_of(name), num_experts(block)) for name, block in self.blocks.items())


class Host(Protocol):
    """What a family says of its own blocks."""

    NAME: str

    def layer_spec(self, name: str, config: Any) -> LayerSpec:
        """What ``config`` says of the sparse layer ``name``."""

    def gates(self, block: nn.Module, patches: Patches) -> tuple[Gate, Gate]:
        """The layer's gate, which calls the block's own so that its hooks run, and the same without hooks."""

    def forward(self, block: nn.Module, layer: MoELayer, masks: PaddingMasks) -> Callable[..., Any]:
        """An object that computes the block's forward through ``layer``."""


def install(
    host: Host,
    model: nn.Module,
    experts: PairedExperts,
    options: MoEOptions,
    buffer: ExpertBuffer | None = None,
    spread: ExpertSpread | None = None,
) -> Installed:
    """Replace the forward of every sparse layer; parameters, modules and their names stay.

    With ``buffer``, experts come from its stores; their own parameters hold nothing. With ``spread``, only this rank's
    experts are here, and rows travel to those of others.
    """
    patches = Patches()
    masks = watch_padding(model, PHASES, patches)
    layers: list[MoELayer] = []
    quiet_gates: list[Gate] = []
    shares: dict[str, ExpertShare] = {}
    expert_bytes = 0
    for name, block in experts.blocks.items():
        pairs = experts.pairs(block)
        held = pairs if spread is None else [pairs[expert] for expert in spread.held(name)]
        expert_bytes += _module_experts(held).nbytes
        store = _expert_store(held, options, patches) if buffer is None else buffer.stores[name]
        exchange = None if spread is None else spread.exchange(name)
        if spread is not None:
            shares[name] = _share(pairs, store, spread.held(name))
        gate, quiet = host.gates(block, patches)
        layer = build_layer(host.layer_spec(name, model.config), options, gate, store, exchange=exchange)
        patches.replace_forward(block, host.forward(block, layer, masks))
        layers.append(layer)
        quiet_gates.append(quiet)
    if buffer is None:
        return Installed(host.NAME, tuple(layers), patches, expert_bytes, masks, shares=shares)
    connect_routers(layers, quiet_gates, buffer)
    return Installed(host.NAME, tuple(layers), patches, expert_bytes, masks, buffer.report, shares)


def num_experts(block: nn.Module) -> int:
    """E of a block."""
    return cast(int, block.num_experts)


def _records(prefix: str, find: Callable[[str], TensorRecord]) -> dict[str, TensorRecord]:
    records = {f"{one}_{leaf}": find(f"{prefix}.{one}.{leaf}") for one in _LINEARS for leaf in ("weight", "bias")}
    for one in _LINEARS:
        if records[f"{one}_weight"].dtype == torch.int8:
            records[f"{one}_scale"] = find(f"{prefix}.{one}.weight{SCALE_SUFFIX}")
    return records


def _expert_store(pairs: Pairs, options: MoEOptions, patches: Patches) -> ModuleExperts:
    weight = cast(Tensor, pairs[0][0].weight)
    if not needs_packed_experts(options, weight.device, weight.dtype):
        return _module_experts(pairs)
    packed = PackedModuleExperts(pairs)
    patches.on_undo(packed.unpack)
    return packed


def _share(pairs: Pairs, store: ModuleExperts | BufferedExperts, held: Sequence[int]) -> ExpertShare:
    return BufferedShare(store) if isinstance(store, BufferedExperts) else ModuleShare(pairs, store, held)


def _module_experts(pairs: Pairs) -> ModuleExperts:
    return Int8ModuleExperts(pairs) if isinstance(pairs[0][0], Int8Linear) else ModuleExperts(pairs)
