"""What there is to profile in a Transformers model: whole forwards, attention, sparse layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import transformers
from torch import nn

from fairseq_moe_opt.moe import MoELayer
from fairseq_moe_opt.moe.cache_report import BufferReport
from fairseq_moe_opt.profiling import LayerFacts, Part, Profiler, WeightBytes, tensor_bytes
from fairseq_moe_opt.profiling.clock import ATTENTION

_ENCODER, _DECODER = "encoder", "decoder"


def profiler_for(model: nn.Module, layers: tuple[MoELayer, ...]) -> Profiler:
    """A profiler for a ``model`` with these ``layers``; it is not attached yet."""
    return Profiler([facts_of(layer) for layer in layers], layers, list(parts_of(model)), partial(_device_of, model))


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def facts_of(layer: MoELayer) -> LayerFacts:
    """What a layer of the engine is."""
    counters, config = layer.counters, layer.config
    return LayerFacts(
        counters.name, counters.phase, counters.num_experts, layer.router.top_k, config.checkpoint_capacity
    )


def parts_of(model: nn.Module) -> Iterator[Part]:
    """The model's own forward, which is the decoder's with everything around it, the encoder's, and all attention.

    A language model is all decoder. The outermost modules with Attention in the name of their class are attention:
    Transformers names them so in every family.
    """
    encoder = _encoder(model)
    yield Part(model, type(model).__name__, _DECODER)
    if encoder is not None:
        yield Part(encoder[1], encoder[0], _ENCODER)
    found: list[str] = []
    for name, module in model.named_modules():
        if "Attention" in type(module).__name__ and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
            inside = encoder is not None and name.startswith(f"{encoder[0]}.")
            yield Part(module, name, _ENCODER if inside else _DECODER, ATTENTION)


def _encoder(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of an encoder-decoder model's encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    wanted = model.get_encoder()  # type: ignore[operator]
    return next(((name, module) for name, module in model.named_modules() if module is wanted), None)


def weights_of(model: nn.Module, expert_bytes: int, buffer: BufferReport | None) -> WeightBytes:
    """Static memory: where experts are buffered, their slots stand for them."""
    total = tensor_bytes([model])
    if buffer is None:
        return WeightBytes(max(0, total - expert_bytes), expert_bytes)
    return WeightBytes(total, buffer.arena_bytes)


def about(model: nn.Module, family: str, options: dict[str, object]) -> dict[str, object]:
    """The lines at the top of a report."""
    parameter = next(model.parameters())
    device = str(parameter.device)
    if parameter.device.type == "cuda":
        device = f"{device}, {torch.cuda.get_device_name(parameter.device)}"
    return {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "family": family,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": options,
    }
