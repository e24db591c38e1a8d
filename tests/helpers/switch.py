"""Tiny random Switch Transformers, and what their sparse layers give by the definition, token by token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from tests.helpers.releases import RELEASE, SWITCH_DROPS

VOCABULARY = 96
DROPS = RELEASE >= SWITCH_DROPS
"""Whether this release of Transformers drops tokens beyond the capacity."""


def tiny_switch(seed: int = 0, **changes: Any) -> SwitchTransformersForConditionalGeneration:
    """2 + 2 layers, the second of each side sparse with 8 experts, whose routing spreads; in evaluation mode."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 8,
        "expert_capacity": 64,
        "router_jitter_noise": 0.01,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                # Small embeddings: where they are not, a tied model repeats the token it was given.
                parameter.normal_(0, 0.1 if "shared" in name else 0.5 if "router" in name else 0.3)
    return model


def batch(left_padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Three sentences of 12, 8 and 4 tokens, and decoder inputs of length 6."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 8, 4)):
        padding = slice(0, 12 - length) if left_padded else slice(length, 12)
        ids[row, padding], mask[row, padding] = 0, 0
    decoder = torch.randint(2, VOCABULARY, (3, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(3, 6, V), without gradients."""
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def greedy(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    """(3, 11) tokens."""
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    result: Tensor = model.generate(**ids, min_new_tokens=10, max_new_tokens=10, do_sample=False, **how)
    return result


class _ByDefinition:
    def __init__(self, block: Any, capacity: int | None) -> None:
        self._block, self._capacity = block, capacity

    def __call__(self, hidden_states: Tensor) -> Tensor:
        router = self._block.router
        weight, bias = router.classifier.weight, router.classifier.bias
        output = torch.zeros_like(hidden_states)
        for sequence, tokens in enumerate(hidden_states):
            served = [0] * router.num_experts
            for place, token in enumerate(tokens):
                scores = weight.to(router.dtype) @ token.to(router.dtype)
                if bias is not None:
                    scores = scores + bias.to(router.dtype)
                probabilities = torch.softmax(scores, 0).to(token.dtype)
                expert = int(probabilities.argmax())
                served[expert] += 1
                if self._capacity is None or served[expert] <= self._capacity:
                    network = self._block.experts[f"expert_{expert}"]
                    output[sequence, place] = probabilities[expert] * network(token)
        return output


def by_definition(model: Any, capacity: int | None = None) -> Any:
    """A copy of ``model`` whose sparse layers are loops over tokens, an expert serving so many of each sequence."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, SwitchTransformersSparseMLP):
            module.forward = _ByDefinition(module, capacity)  # type: ignore[method-assign]
    return copied
