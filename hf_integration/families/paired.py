"""What families have in common whose experts are pairs of linear layers in modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

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
"""The two linear layers of experts, in the order they are computed in."""
Gate = Callable[[Tensor], Tensor]
"""(..., D) to (..., E): of rows, or of sequences where the block's forward gives the layer their number."""


def phase_of(name: str) -> str:
    """The phase of the layer ``name``."""
    return "decoder" if "decoder." in name else "encoder"


@dataclass(frozen=True)
class PairedExperts:
    """The sparse layers of a model.

    Attributes:
        blocks: by name, in the model's order; each has a container ``experts``.
        label: what that container calls an expert, by its number.
        names: what an expert calls its two linear layers, which are ``fc1`` and ``fc2`` to the engine.
    """

    blocks: Mapping[str, nn.Module]
    label: str
    names: tuple[str, str] = _LINEARS

    def pairs(self, block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The two linear layers of every expert, by name: the container may hold other modules."""
        first, second = self.names
        labels = map(self.label.format, range(num_experts(block)))
        experts = [block.get_submodule(f"experts.{label}") for label in labels]
        return [(expert.get_submodule(first), expert.get_submodule(second)) for expert in experts]

    def linears(self, but_of: Mapping[str, Collection[int]] = NO_EXPERTS) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of both linear layers of every expert, in the model's order.

        ``but_of``: experts of a layer, by its name, that are left out.
        """
        for name, block in self.blocks.items():
            for index, pair in enumerate(self.pairs(block)):
                if index in but_of.get(name, ()):
                    continue
                for layer, linear in zip(self.names, pair, strict=True):
                    yield f"{name}.experts.{self.label.format(index)}.{layer}", linear

    def layers(self, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
        """Where the experts of every layer lie; ``records`` finds a parameter by its name in the model."""
        return tuple(
            ExpertLayer(
                name,
                phase_of(name),
                tuple(
                    self._records(f"{name}.experts.{self.label.format(index)}", pair, records)
                    for index, pair in enumerate(self.pairs(block))
                ),
            )
            for name, block in self.blocks.items()
        )

    def trace_layers(self) -> tuple[TraceLayer, ...]:
        """Name, phase and E of every layer."""
        return tuple(TraceLayer(name, phase_of(name), num_experts(block)) for name, block in self.blocks.items())

    def _records(
        self, prefix: str, pair: tuple[nn.Module, nn.Module], find: Callable[[str], TensorRecord]
    ) -> dict[str, TensorRecord]:
        """An expert's tensors by the engine's names for them."""
        records: dict[str, TensorRecord] = {}
        for one, name, linear in zip(_LINEARS, self.names, pair, strict=True):
            leaves = ("weight",) if linear.bias is None else ("weight", "bias")
            records |= {f"{one}_{leaf}": find(f"{prefix}.{name}.{leaf}") for leaf in leaves}
            if records[f"{one}_weight"].dtype == torch.int8:
                records[f"{one}_scale"] = find(f"{prefix}.{name}.weight{SCALE_SUFFIX}")
        return records


class Host(Protocol):
    """What a family says of its own blocks."""

    @property
    def name(self) -> str:
        """Of the family."""

    @property
    def layer_spec(self) -> Callable[[str, Any], LayerSpec]:
        """What a configuration says of the sparse layer of that name."""

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
        return Installed(host.name, tuple(layers), patches, expert_bytes, masks, shares=shares)
    connect_routers(layers, quiet_gates, buffer)
    return Installed(host.name, tuple(layers), patches, expert_bytes, masks, buffer.report, shares)


def num_experts(block: nn.Module) -> int:
    """E of a block, which it knows itself, or its router."""
    knows = block if hasattr(block, "num_experts") else block.get_submodule("router")
    return cast(int, knows.num_experts)


class RouterForward:
    """A router's forward cut down to its logits, in ``router_dtype``, which ``output_router_logits`` records (place 2).

    The classifier stays in its own dtype: nothing of the model is cast for good.
    """

    def __init__(self, router: Any) -> None:
        self._router = router
        self.__wrapped__ = type(router).forward.__get__(router)

    def __call__(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[None, None, Tensor]:
        classifier, dtype = self._router.classifier, self._router.dtype
        bias = None if classifier.bias is None else classifier.bias.to(dtype)
        return None, None, functional.linear(hidden_states.to(dtype), classifier.weight.to(dtype), bias)


@dataclass(frozen=True)
class RouterHost:
    """The ``Host`` of blocks that have a ``router`` as NLLB-MoE's, with a ``classifier`` in it.

    Attributes:
        name: of the family.
        layer_spec: what a configuration says of a sparse layer.
        block_forward: makes the object that computes a block's forward, from block, layer and masks.
        router_forward: makes the one that computes a router's.
    """

    name: str
    layer_spec: Callable[[str, Any], LayerSpec]
    block_forward: Callable[[Any, MoELayer, PaddingMasks], Callable[..., Any]]
    router_forward: type[RouterForward] = RouterForward

    def gates(self, block: nn.Module, patches: Patches) -> tuple[Gate, Gate]:
        """See ``Host``."""
        router = block.get_submodule("router")
        forward = self.router_forward(router)
        patches.replace_forward(router, forward)
        return RouterGate(router), QuietGate(forward)

    def forward(self, block: nn.Module, layer: MoELayer, masks: PaddingMasks) -> Callable[..., Any]:
        """See ``Host``."""
        return self.block_forward(block, layer, masks)


class RouterGate:
    """A layer's gate: calls the router module, so that its forward hooks run."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    def __call__(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self._router(tokens)[2])


class QuietGate:
    """The same logits without the router's hooks, for a guess that no one else is to see."""

    def __init__(self, forward: RouterForward) -> None:
        self._forward = forward

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens)[2]


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
