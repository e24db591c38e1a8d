"""What families have in common whose experts are pairs of linear layers, by name in a ``ModuleDict`` of their layer.

NLLB-MoE and Switch Transformers are built so: ``experts.expert_0`` and so on beside a ``router`` with a ``classifier``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

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

Pairs = Sequence[tuple[nn.Module, nn.Module]]
"""The two layers of each of some experts, in the order they are computed in."""


class PairsOfLinears(ABC):
    """A family of that kind.

    Attributes:
        MODEL_TYPE: of ``config.json``.
        model_class: what is loaded for it.
        block_class: its sparse layer.
        linears: what an expert's two layers are called.
    """

    NAME: str
    MODEL_TYPE: ClassVar[str]
    model_class: ClassVar[type[PreTrainedModel]]
    block_class: ClassVar[type[nn.Module]]
    linears: ClassVar[tuple[str, str]]

    @abstractmethod
    def layer_spec(self, name: str, config: Any) -> LayerSpec:
        """What ``config`` says of the sparse layer ``name``."""

    @abstractmethod
    def router_forward(self, router: nn.Module) -> Callable[..., tuple[Any, Any, Tensor]]:
        """What takes the place of the forward of ``router``: logits in third place, where hooks of Transformers look.

        A :class:`RouterForward`, an object, as all that is put into a model is.
        """

    @abstractmethod
    def block_forward(
        self, block: nn.Module, layer: MoELayer, masks: PaddingMasks, phase: str
    ) -> Callable[..., Tensor]:
        """What takes the place of the forward of ``block``: (B, T, D) to (B, T, D) through ``layer``."""

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` holds a sparse layer of this family."""
        return any(True for _ in self._blocks(model))

    def install(
        self,
        model: nn.Module,
        options: MoEOptions,
        buffer: ExpertBuffer | None = None,
        spread: ExpertSpread | None = None,
    ) -> Installed:
        """Replace the forward of every sparse layer; parameters, modules and their names stay.

        With ``buffer``, experts come from its stores; their own parameters hold nothing. With ``spread``, only this
        rank's experts are here, and rows travel to those of others.
        """
        patches = Patches()
        masks = watch_padding(model, PHASES, patches)
        layers: list[MoELayer] = []
        shares: dict[str, ExpertShare] = {}
        expert_bytes = 0
        for name, block in self._blocks(model):
            spec = self.layer_spec(name, model.config)
            pairs = self.expert_pairs(block)
            held = pairs if spread is None else [pairs[expert] for expert in spread.held(name)]
            expert_bytes += _module_experts(held).nbytes
            store = _expert_store(held, options, patches) if buffer is None else buffer.stores[name]
            exchange = None if spread is None else spread.exchange(name)
            if spread is not None:
                shares[name] = _share(pairs, store, spread.held(name))
            router_forward = self.router_forward(block.router)
            layer = build_layer(spec, options, _Gate(block.router), store, exchange=exchange)
            patches.replace_forward(block.router, router_forward)
            patches.replace_forward(block, self.block_forward(block, layer, masks, spec.phase))
            layers.append(layer)
        if buffer is None:
            return Installed(self.NAME, tuple(layers), patches, expert_bytes, masks, shares=shares)
        quiet_gates = [_QuietGate(self.router_forward(block.router)) for _, block in self._blocks(model)]
        connect_routers(layers, quiet_gates, buffer)
        return Installed(self.NAME, tuple(layers), patches, expert_bytes, masks, buffer.report, shares)

    def expert_layers(self, model: nn.Module, records: Callable[[str], TensorRecord]) -> tuple[ExpertLayer, ...]:
        """Where the experts of every sparse layer lie; ``records`` finds a parameter by its name in ``model``."""
        return tuple(
            ExpertLayer(
                name,
                phase_of(name),
                tuple(
                    self._records(f"{name}.experts.expert_{index}", pair, records)
                    for index, pair in enumerate(self.expert_pairs(block))
                ),
            )
            for name, block in self._blocks(model)
        )

    def trace_layers(self, model: nn.Module) -> tuple[TraceLayer, ...]:
        """Name, phase and E of every sparse layer."""
        return tuple(TraceLayer(name, phase_of(name), num_experts(block)) for name, block in self._blocks(model))

    def sparse_blocks(self, model: nn.Module) -> dict[str, Any]:
        """The sparse layers by name, in the model's order."""
        return dict(self._blocks(model))

    def expert_pairs(self, block: Any) -> list[tuple[nn.Module, nn.Module]]:
        """The two layers of every expert, by name: Transformers 5 keeps other modules in the same ModuleDict."""
        first, second = self.linears
        experts = [block.experts[f"expert_{index}"] for index in range(num_experts(block))]
        return [(getattr(expert, first), getattr(expert, second)) for expert in experts]

    def expert_linears(
        self, model: nn.Module, but_of: Mapping[str, Collection[int]] = MappingProxyType({})
    ) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of both layers of every expert, in the model's order.

        ``but_of``: experts of a layer, by its name, that are left out.
        """
        for name, block in self._blocks(model):
            for index, pair in enumerate(self.expert_pairs(block)):
                if index in but_of.get(name, ()):
                    continue
                for layer, linear in zip(self.linears, pair, strict=True):
                    yield f"{name}.experts.expert_{index}.{layer}", linear

    def _blocks(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in model.named_modules():
            if isinstance(module, self.block_class):
                yield name, module

    def _records(
        self, prefix: str, pair: tuple[nn.Module, nn.Module], find: Callable[[str], TensorRecord]
    ) -> dict[str, TensorRecord]:
        """An expert's tensors by the engine's names for them."""
        records: dict[str, TensorRecord] = {}
        for engine_name, name, linear in zip(("fc1", "fc2"), self.linears, pair, strict=True):
            leaves = ["weight"] if linear.bias is None else ["weight", "bias"]
            records |= {f"{engine_name}_{leaf}": find(f"{prefix}.{name}.{leaf}") for leaf in leaves}
            if records[f"{engine_name}_weight"].dtype == torch.int8:
                records[f"{engine_name}_scale"] = find(f"{prefix}.{name}.weight{SCALE_SUFFIX}")
        return records


def num_experts(block: Any) -> int:
    """E of a sparse layer: its router's outputs."""
    return cast(int, block.router.num_experts)


def phase_of(name: str) -> str:
    """The phase of the layer ``name``."""
    return "decoder" if "decoder." in name else "encoder"


class RouterForward:
    """A router's forward cut down to its logits, in ``router_dtype``, which ``output_router_logits`` records (place 2).

    The classifier stays in its own dtype: nothing of the model is cast for good.
    """

    def __init__(self, router: Any) -> None:
        self._router = router
        self.__wrapped__ = type(router).forward.__get__(router)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        classifier, dtype = self._router.classifier, self._router.dtype
        bias = None if classifier.bias is None else classifier.bias.to(dtype)
        return functional.linear(hidden_states.to(dtype), classifier.weight.to(dtype), bias)


class _Gate:
    """The layer's gate: calls the router module, so that its forward hooks run."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    def __call__(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self._router(tokens)[2])


class _QuietGate:
    """The same logits without the router's hooks, for a guess that no one else is to see."""

    def __init__(self, forward: Callable[..., tuple[Any, Any, Tensor]]) -> None:
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
