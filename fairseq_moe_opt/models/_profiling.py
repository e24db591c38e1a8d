"""What there is to profile in a fairseq model: whole forwards, attention, sparse layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_moe_opt.build import capacity_fraction
from fairseq_moe_opt.models._block import MoEBlock
from fairseq_moe_opt.profiling import ALL_CALLS, LayerFacts, Part, Profiler, WeightBytes, tensor_bytes
from fairseq_moe_opt.profiling.clock import ATTENTION


def started_profiler(model: nn.Module, blocks: Sequence[MoEBlock]) -> Profiler:
    """A profiler that looks at ``model`` from now on, on whatever device it will be by its first forward."""
    layers = [(block.spec.layer, block.spec.layer.router) for block in blocks]
    facts = [
        LayerFacts(layer.name, layer.phase, router.num_experts, router.top_k, capacity_fraction(router))
        for layer, router in layers
    ]
    profiler = Profiler(facts, blocks, list(_parts(model)), partial(device_of, model))
    profiler.attach()
    profiler.record_memory()
    profiler.begin(ALL_CALLS)
    return profiler


def device_of(model: nn.Module) -> torch.device:
    """Where the model is now."""
    return next(model.parameters()).device


def weights_of(model: nn.Module | None, expert_bytes: int, arena_bytes: int | None) -> WeightBytes:
    """Static memory: where experts are buffered, their slots stand for them."""
    total = 0 if model is None else tensor_bytes([model])
    if arena_bytes is None:
        return WeightBytes(max(0, total - expert_bytes), expert_bytes)
    return WeightBytes(total, arena_bytes)


def _parts(model: nn.Module) -> Iterator[Part]:
    for phase in ("encoder", "decoder"):
        side = getattr(model, phase, None)
        if not isinstance(side, nn.Module):
            continue
        yield Part(side, phase, phase)
        for name, module in side.named_modules():
            if isinstance(module, MultiheadAttention):
                yield Part(module, f"{phase}.{name}", phase, ATTENTION)
