"""The paper's models scaled down, with random weights: plain attention, dense FFNs, and the engine's sparse layers.

Speed and memory depend on shapes and on who is asked for, not on what weights say. So weights are random, and gates
have a bias that gives each expert its share in a batch of a synthetic trace (``placement.synthetic``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fairseq_moe_opt.build import LayerSpec, build_layer
from fairseq_moe_opt.moe.experts import ResidentPackedExperts
from fairseq_moe_opt.moe.layer import MoELayer
from fairseq_moe_opt.moe.routing import CapacityRule, GShardTop2Router
from fairseq_moe_opt.moe.types import PackedExperts, Routing
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.placement import synthetic_history
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, Shape

DENSE, STATIC, DYNAMIC = "dense", "static", "dynamic"
VARIANTS = (DENSE, STATIC, DYNAMIC)
TRACE_STEPS = 8
"""Batches of a trace that a gate takes turns with."""
FITTING_TOKENS, FITTING_STEPS, FITTING_RATE = 2048, 20, 0.6
"""Tokens that a gate's bias is fitted on, its corrections, and what share of the error's logarithm the first one is."""
NEVER = 0.01
"""Rows taken for an expert that got none, so that it has a logarithm."""


class SkewedGate:
    """(T, D) tokens to (T, E) logits: a projection, as in every gate, and a bias for the popularity of each ``step``.

    Args:
        weight: (E, D) of the projection.
        shares: (steps, E) that experts should have of a batch's rows.
        top_k: experts a token chooses.
    """

    def __init__(self, weight: Tensor, shares: Tensor, top_k: int) -> None:
        self._weight, self._shares, self._top_k = weight, shares, top_k
        self._bias = torch.log(shares)
        self._is_fitted = False
        self.step = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.linear(tokens, self._weight, self._bias[self.step % len(self._bias)])

    def fit(self, tokens: Tensor) -> None:
        """Choose the biases with which these (T, D) tokens give each expert its share; the first tokens decide."""
        if self._is_fitted:
            return
        logits = functional.linear(tokens, self._weight)
        least = 0.5 / logits.shape[0]
        for bias, share in zip(self._bias, self._shares, strict=True):
            for step in range(FITTING_STEPS):
                chosen = (logits + bias).topk(self._top_k, dim=1).indices.flatten()
                found = torch.bincount(chosen, minlength=len(bias)) / chosen.numel()
                bias += FITTING_RATE * (1 - step / FITTING_STEPS) * torch.log((share + least) / (found + least))
        self._is_fitted = True


class Attention(nn.Module):
    """Multi-head attention over itself, or with one query a sentence over keys and values that are there."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None, *, causal: bool = False, appends: bool = True
    ) -> Tensor:
        """(B, L, D) to the same.

        Args:
            x: the input.
            past: (B, heads, P, D / heads) keys and values to look at instead of those of ``x``.
            causal: no token looks at a later one.
            appends: the last place of ``past`` is for the keys and values of ``x``.
        """
        query = self._split(self.query(x))
        if past is None:
            keys, values = self._split(self.key(x)), self._split(self.value(x))
        else:
            keys, values = past
            if appends:
                keys[:, :, -1:], values[:, :, -1:] = self._split(self.key(x)), self._split(self.value(x))
        mixed = functional.scaled_dot_product_attention(query, keys, values, is_causal=causal)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class DenseFFN(nn.Module):
    """What the dense twin has where the model has experts, and what the other layers have."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.ffn)
        self.fc2 = nn.Linear(shape.ffn, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


@dataclass
class SparseFFN:
    """One sparse layer: the same experts with static and with dynamic gating, and the gate of both."""

    layers: Mapping[str, MoELayer]
    gate: SkewedGate


class Block(nn.Module):
    """Attention, attention over the source in the decoder, then an FFN: each with its norm before, and a residual."""

    def __init__(self, shape: Shape, sparse: SparseFFN | None) -> None:
        super().__init__()
        is_decoder = shape.phase == DECODER
        self.attention = Attention(shape)
        self.source = Attention(shape) if is_decoder else None
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(3 if is_decoder else 2))
        self.ffn = DenseFFN(shape)
        self.sparse = sparse


@dataclass(frozen=True)
class Batch:
    """A forward's input: (B, L) ids, and the decoder's keys and values of each layer, own and of the source."""

    ids: Tensor
    past: tuple[tuple[Tensor, Tensor], ...] = ()
    source: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass
class Watch:
    """Filled by a forward: seconds in sparse layers, and each one's routing."""

    sparse_seconds: float = 0.0
    routings: list[Routing] = field(default_factory=list)


class Model(nn.Module):
    """One phase of a model; ``run`` says with which variant of its sparse layers."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        sparse = iter(_sparse_layers(shape, seed))
        self.blocks = nn.ModuleList(
            Block(shape, next(sparse) if shape.is_sparse(place) else None) for place in range(shape.layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.requires_grad_(False)
        with torch.inference_mode():
            batch = self.make_batch(max(1, FITTING_TOKENS // shape.tokens(1)))
            self.run(batch, DYNAMIC, fitting=True)

    @property
    def sparse(self) -> tuple[SparseFFN, ...]:
        """The sparse layers."""
        return tuple(block.sparse for block in self._blocks() if block.sparse is not None)

    def _blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.blocks)

    def make_batch(self, size: int) -> Batch:
        """Random ids; in the decoder one a sentence, and what attention has kept of the ones before."""
        shape = self.shape
        length = 1 if shape.phase == DECODER else shape.length
        ids = torch.randint(shape.vocabulary, (size, length))
        if shape.phase != DECODER:
            return Batch(ids)

        def kept(places: int) -> tuple[tuple[Tensor, Tensor], ...]:
            sizes = (size, shape.heads, places, shape.width // shape.heads)
            return tuple((torch.randn(sizes), torch.randn(sizes)) for _ in range(shape.layers))

        return Batch(ids, kept(shape.length + 1), kept(shape.length))

    def run(
        self,
        batch: Batch,
        variant: str,
        step: int = 0,
        *,
        watch: Watch | None = None,
        inject: Sequence[Routing] = (),
        fitting: bool = False,
    ) -> Tensor:
        """Logits, or the encoder's output.

        Args:
            batch: the input.
            variant: of the sparse layers.
            step: chooses the popularities of experts.
            watch: is filled.
            inject: the sparse layers' routings, instead of their own.
            fitting: fit the gates to what they get to see.
        """
        injected = iter(inject)
        x = self.embedding(batch.ids)
        for place, block in enumerate(self._blocks()):
            past = batch.past[place] if batch.past else None
            x = x + block.attention(block.norms[0](x), past, causal=self.shape.phase == LM)
            if block.source is not None:
                x = x + block.source(block.norms[1](x), batch.source[place], appends=False)
            rows = block.norms[-1](x)
            if block.sparse is None or variant == DENSE:
                x = x + block.ffn(rows)
            else:
                if fitting:
                    block.sparse.gate.fit(rows.view(-1, rows.shape[-1]))
                x = x + _apply(block.sparse, rows, variant, step, watch, next(injected, None))
        x = self.norm(x)
        return x if self.shape.phase == ENCODER else functional.linear(x, self.embedding.weight)


def _apply(
    sparse: SparseFFN, rows: Tensor, variant: str, step: int, watch: Watch | None, routing: Routing | None
) -> Tensor:
    started = time.perf_counter()
    layer, flat = sparse.layers[variant], rows.view(-1, rows.shape[-1])
    sparse.gate.step = step
    if routing is None:
        found = layer(flat)
        routing, output = found.routing, found.output
    else:
        output = layer.apply(flat, routing)
    if watch is not None:
        watch.routings.append(routing)
        watch.sparse_seconds += time.perf_counter() - started
    return output.view(rows.shape)


def _sparse_layers(shape: Shape, seed: int) -> list[SparseFFN]:
    paper = shape.paper
    history = synthetic_history(shape.phase, paper.experts, TRACE_STEPS, shape.sparse_layers, seed)
    found = []
    for name, counts in history.layers.items():
        share = torch.from_numpy(counts.astype("float32")).clamp_min(NEVER)
        weight = torch.randn(paper.experts, shape.width) / shape.width**0.5
        gate = SkewedGate(weight, share / share.sum(1, keepdim=True), paper.top_k)
        experts = PackedExperts.empty(paper.experts, shape.width, shape.ffn, dtype=torch.float32)
        for tensor in (experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias):
            if tensor is not None:
                tensor.uniform_(-(shape.width**-0.5), shape.width**-0.5)
        store = ResidentPackedExperts(experts)
        router = GShardTop2Router(paper.experts, CapacityRule(paper.capacity))
        spec = LayerSpec(name, "encoder" if shape.phase == ENCODER else "decoder", router)
        options = {
            STATIC: MoEOptions(gating="static", capacity="checkpoint"),
            DYNAMIC: MoEOptions(gating="dynamic", capacity="none"),
        }
        layers = {variant: build_layer(spec, chosen, gate, store) for variant, chosen in options.items()}
        found.append(SparseFFN(layers, gate))
    return found
