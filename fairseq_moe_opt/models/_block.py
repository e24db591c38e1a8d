"""The sparse layer as a module: fairseq's names in the state dict, the engine in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_moe_opt.buffering import BufferedExperts
from fairseq_moe_opt.build import (
    BufferedShare,
    ExpertShare,
    LayerSpec,
    ModuleShare,
    build_layer,
    connect_routers,
    needs_packed_experts,
)
from fairseq_moe_opt.errors import MoEError, OptionError
from fairseq_moe_opt.models._file_experts import FileExperts, MetaExperts, RefuseStateDict
from fairseq_moe_opt.models._losses import note_cmr_gate, note_gate_loss, wants_gate_losses
from fairseq_moe_opt.models._sharing import AgreedKernel
from fairseq_moe_opt.moe import CapacityRule, GShardTop2Router, MoELayer, Top1Router
from fairseq_moe_opt.moe.module_experts import ModuleExperts, PackedModuleExperts
from fairseq_moe_opt.moe.protocols import RoutingObserver, StepWatch, TokenExchange
from fairseq_moe_opt.moe.report import Watch
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ExpertSpread


@dataclass(frozen=True)
class BlockSpec:
    """What a module of one sparse layer is made from.

    Attributes:
        layer: the engine's description.
        width: D.
        ffn_width: F.
        capacity_length: where the capacity's fraction is of ``capacity_length`` times the batch instead of all rows.
        train_batch: sentences that a smaller batch is padded to in training, 0 for none.
        valid_batch: the same in validation; generation never pads.
    """

    layer: LayerSpec
    width: int
    ffn_width: int
    capacity_length: int | None = None
    train_batch: int = 0
    valid_batch: int = 0


class Gate(nn.Module):
    """Tokens (T, D) to logits (T, E); its weight is ``gate.wg.weight`` (E, D)."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits in the tokens' dtype."""
        return cast(Tensor, self.wg(tokens))


class Expert(nn.Module):
    """The parameters of one expert; the engine computes with them."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)


class MoEBlock(nn.Module):
    """``moe_layer`` of a transformer layer: (T, B, D) in and out, rows routed in the order ``b * T + t``.

    The engine's layer is made at the first forward, when device and dtype are known, and again when they change in a
    way that matters to it. With options that buffer experts they have no memory here, and are computed from the files
    that ``keep_in`` tells of. Where they are ``apart``, on several ranks, ``spread_over`` tells which are here.
    """

    def __init__(self, spec: BlockSpec, options: MoEOptions, apart: bool = False) -> None:
        super().__init__()
        self.spec, self.options = spec, options
        self.gate = Gate(spec.width, self.num_experts)
        in_memory = not (options.buffered or apart)
        self.experts = nn.ModuleList(self._build_experts()) if in_memory else MetaExperts(self._build_experts)
        if options.buffered and not apart:
            self.register_state_dict_pre_hook(RefuseStateDict("buffered", "with moe_expert_memory='all'"))
        self.held: Sequence[int] = range(self.num_experts)
        self._exchange: TokenExchange | None = None
        self._kernel: AgreedKernel | None = None
        self._observers: tuple[RoutingObserver, ...] = ()
        self._watch: StepWatch | None = None
        self._engine: MoELayer | None = None
        self._store: ModuleExperts | BufferedExperts | None = None
        self._files: FileExperts | None = None
        self._in_generation = False

    @property
    def num_experts(self) -> int:
        """E."""
        return self.spec.layer.router.num_experts

    @property
    def engine(self) -> MoELayer:
        """The engine's layer for the device, dtype and mode the module is in now."""
        weight = self.gate.wg.weight
        if self.options.buffered:
            return self._engine_over_files(weight.device, weight.dtype)
        # Packing makes parameters views of one tensor, which an optimizer must never see.
        options = self.options
        if self._kernel is not None:
            options = self._kernel.settled(options, weight.device, weight.dtype)
        packed = not self.training and needs_packed_experts(options, weight.device, weight.dtype)
        if self._engine is None or packed != isinstance(self._store, PackedModuleExperts):
            self._engine = self._build(options, packed)
        return self._engine

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, or of this rank's, at the dtype in which they are computed."""
        if self.options.buffered:
            return cast(BufferedExperts, self.engine.store).nbytes
        own = (parameter for parameter in self.experts.parameters() if not parameter.is_meta)
        return sum(parameter.numel() * parameter.element_size() for parameter in own)

    def spread_over(self, spread: ExpertSpread, kernel: AgreedKernel) -> None:
        """Hold only this rank's experts, for all ranks of ``spread``; ``kernel`` is agreed by them."""
        name = self.spec.layer.name
        self.held, self._exchange, self._kernel = spread.held(name), spread.exchange(name), kernel
        state = f"spread over {spread.ranks.size} ranks"
        self.register_state_dict_pre_hook(RefuseStateDict(state, "in one process"))
        if not self.options.buffered:
            cast(MetaExperts, self.experts).give_memory(self.held)
        self._engine = None

    def share(self) -> ExpertShare:
        """This rank's experts as the engine computes them now, which can be exchanged for others."""
        engine = self.engine
        if isinstance(engine.store, BufferedExperts):
            return BufferedShare(engine.store)
        pairs = [(expert.fc1, expert.fc2) for expert in cast("Iterable[Expert]", self.experts)]
        return ModuleShare(pairs, cast(ModuleExperts, engine.store), self.held)

    def take_part(self) -> None:
        """Compute what other ranks send, with no token of this one."""
        self.engine(self.gate.wg.weight.new_empty(0, self.spec.width))

    def keep_in(self, files: FileExperts) -> None:
        """Compute from experts in ``files`` from now on."""
        self._files, self._engine = files, None

    def observe(self, observer: RoutingObserver) -> None:
        """Tell ``observer`` of every routing from now on."""
        self._observers = (*self._observers, observer)
        self._engine = None

    def stop_observing(self, observer: RoutingObserver) -> None:
        """Tell ``observer`` nothing any more."""
        self._observers = tuple(one for one in self._observers if one is not observer)
        self._engine = None

    def watch(self, watch: StepWatch | None) -> None:
        """Tell ``watch`` of every step from now on; None ends that."""
        self._watch = watch
        if self._engine is not None:
            self._engine.watch(watch)

    def watch_experts(self, watch: Watch | None) -> None:
        """Run experts one at a time in the contexts that ``watch`` gives, until the engine's layer is made again."""
        self.engine.watch_experts(watch)

    def run_as(self, options: MoEOptions) -> None:
        """Run as ``options`` say from the next forward on; counters start anew.

        Raises OptionError when experts would have to come into memory, or to leave it, for that.
        """
        if options.buffered != self.options.buffered:
            held = "in the checkpoint's files" if self.options.buffered else "in memory"
            raise OptionError(
                "expert_memory",
                f"{options.expert_memory!r}: the experts of this model are {held} since it was loaded; load it again",
            )
        self.options = options
        self._engine = None

    def forward(self, hidden: Tensor, padding: Tensor | None = None) -> Tensor:
        """(T, B, D) through the experts; rows with True in ``padding`` (B, T) go nowhere and give 0.

        In training and validation a batch of fewer sentences than fairseq's ``--batch-size`` asks for is filled up with
        padding, as in the branches: those rows count in the capacity and in the means of ``l_aux``.
        """
        length, batch, width = hidden.shape
        tokens = hidden.transpose(0, 1)
        mask = None if padding is None else padding[:, -length:]
        sentences = max(batch, self._expected_batch)
        if sentences > batch:
            tokens, mask = _fill_batch(tokens, mask, sentences - batch)
        engine = self.engine
        self._fit_capacity(engine, sentences)
        rows = None if mask is None else mask.reshape(-1)
        result = engine(tokens.reshape(-1, width), rows, training=self.training, with_aux_loss=wants_gate_losses())
        note_gate_loss(result.routing.aux_loss)
        return result.output.view(sentences, length, width)[:batch].transpose(0, 1)

    def make_generation_fast_(self, **_: Any) -> None:
        """fairseq's ``prepare_for_inference_`` ends here: batches are never filled up from now on.

        Device and dtype are what they are going to be, so a budget that is too small is noticed before any data.
        """
        self._in_generation = True
        if self.options.buffered or self._kernel is not None:
            self._engine = self.engine

    @property
    def _expected_batch(self) -> int:
        if self.training:
            return self.spec.train_batch
        return 0 if self._in_generation else self.spec.valid_batch

    def _fit_capacity(self, engine: MoELayer, batch: int) -> None:
        """Where the capacity depends on the batch's size, tell the router what it is."""
        length, router = self.spec.capacity_length, self.spec.layer.router
        if length is None or self.options.capacity == "none" or not isinstance(router, (GShardTop2Router, Top1Router)):
            return
        if router.capacity is not None:
            engine.router = _with_capacity(router, replace(router.capacity, eval_length=length * batch))

    def _build_experts(self) -> Iterator[Expert]:
        return (Expert(self.spec.width, self.spec.ffn_width) for _ in range(self.num_experts))

    def _engine_over_files(self, device: torch.device, dtype: torch.dtype) -> MoELayer:
        name = self.spec.layer.name
        if self._files is None:
            raise MoEError(f"{name}: the experts of this model are buffered, but no checkpoint has been loaded into it")
        with self._files.lock:
            buffer = self._files.buffer(device, dtype)
            if self._engine is None or self._store is not buffer.stores[name]:
                self._store = buffer.stores[name]
                self._engine = self._layer(self.options, self._store)
                connect_routers([self._engine], [self._quiet_gate], buffer)
            return self._engine

    def _quiet_gate(self, tokens: Tensor) -> Tensor:
        """The gate's logits without its hooks, for a guess that no one else is to see."""
        return functional.linear(tokens, self.gate.wg.weight)

    def _build(self, options: MoEOptions, packed: bool) -> MoELayer:
        if isinstance(self._store, PackedModuleExperts):
            self._store.unpack()
        experts = [cast(Expert, self.experts[expert]) for expert in self.held]
        pairs = [(expert.fc1, expert.fc2) for expert in experts]
        self._store = PackedModuleExperts(pairs) if packed else ModuleExperts(pairs)
        return self._layer(options, self._store)

    def _layer(self, options: MoEOptions, store: ModuleExperts | BufferedExperts) -> MoELayer:
        spec, observers = self.spec.layer, self._observers
        layer = build_layer(spec, options, self.gate, store, observers, exchange=self._exchange)
        layer.watch(self._watch)
        return layer


def _fill_batch(tokens: Tensor, mask: Tensor | None, missing: int) -> tuple[Tensor, Tensor]:
    """``missing`` sentences of zeros after (B, T, D) tokens, and a mask (B + missing, T) that is True there."""
    if mask is None:
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    tokens = functional.pad(tokens, (0, 0, 0, 0, 0, missing))
    return tokens, functional.pad(mask, (0, 0, 0, missing), value=True)


def _with_capacity(router: GShardTop2Router | Top1Router, capacity: CapacityRule) -> GShardTop2Router | Top1Router:
    return replace(router, capacity=capacity)


class CMRGate(nn.Module):
    """How much of each token goes through the experts; its weight is ``cmr_layer.gate.wg`` (1, D), with bias."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.wg = nn.Linear(width, 1)
        self.dropout = dropout

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        """(T, B, D) to (T, B, 1) in 0 ... 1; 0 where ``padding`` (B, T) is True."""
        share = functional.dropout(torch.sigmoid(self.wg(hidden)), self.dropout, self.training)
        if padding is not None:
            share = share.masked_fill(padding[:, -hidden.shape[0] :].t().unsqueeze(-1), 0.0)
        return share


class CMRLayer(nn.Module):
    """Conditional MoE routing: ``(1 - g) * dense(x) + g * experts(x)``.

    The block is a part of this module and of the transformer layer, so its keys are in the state dict twice, as in
    the branches' checkpoints.
    """

    def __init__(self, moe_layer: MoEBlock, dropout: float) -> None:
        super().__init__()
        self.moe_layer = moe_layer
        self.gate = CMRGate(moe_layer.spec.width, dropout)

    def forward(self, hidden: Tensor, dense: Callable[[Tensor], Tensor], padding: Tensor | None) -> Tensor:
        """(T, B, D) in and out; ``dense`` is the layer's own feed-forward network."""
        share = self.gate(hidden, padding)
        note_cmr_gate(share, padding)
        return cast(Tensor, (1 - share) * dense(hidden) + share * self.moe_layer(hidden, padding))
