"""Small checkpoint files of every kind that tests need."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

E, M, F, V = 4, 8, 16, 11
"""Experts, model width, FFN width and vocabulary of ``tiny_fairseq``."""


def fairseq_options(**changes: Any) -> dict[str, Any]:
    """``cfg.model`` of a tiny NLLB-style model: 1 + 1 layers, both of them MoE."""
    options: dict[str, Any] = {"_name": "transformer", "activation_fn": "relu", "share_all_embeddings": True}
    for side in ("encoder", "decoder"):
        options |= {f"{side}_layers": 1, f"{side}_embed_dim": M, f"{side}_ffn_embed_dim": F}
        options |= {f"{side}_attention_heads": 2, f"{side}_normalize_before": True}
    options |= {"max_source_positions": 32, "max_target_positions": 48}
    options |= {"moe_freq": 1, "moe_expert_count": E, "moe_eom": 0.2, "use_moe_pad_mask": True}
    options |= {"moe_second_expert_policy": "all", "moe_eval_capacity_token_fraction": 1.0}
    return options | changes


def fairseq_state(experts: range = range(E), rows: int = V) -> dict[str, Tensor]:
    """A state dict with fairseq's names for ``fairseq_options``, holding the given experts."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    embedding = draw(rows, M)
    state = {"encoder.embed_tokens.weight": embedding, "decoder.embed_tokens.weight": embedding}
    state["decoder.output_projection.weight"] = embedding
    for side in ("encoder", "decoder"):
        state[f"{side}.version"] = torch.tensor([3.0])
        state[f"{side}.layers.0.moe_layer.gate.wg.weight"] = draw(E, M)
        for expert in range(E):
            drawn = {"fc1.weight": draw(F, M), "fc1.bias": draw(F), "fc2.weight": draw(M, F), "fc2.bias": draw(M)}
            if expert in experts:
                prefix = f"{side}.layers.0.moe_layer.experts.{expert - experts.start}"
                state |= {f"{prefix}.{name}": tensor for name, tensor in drawn.items()}
        for norm in ("layer_norm", "layers.0.self_attn_layer_norm", "layers.0.final_layer_norm"):
            state |= {f"{side}.{norm}.weight": draw(M), f"{side}.{norm}.bias": draw(M)}
    return state


def save_fairseq(
    path: Path, state: Mapping[str, Tensor], updates: int = 5, task: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """Writes what fairseq's trainer writes, with ``cfg.model`` as an argparse Namespace."""
    content = {
        "args": None,
        "cfg": {
            "model": argparse.Namespace(**fairseq_options(**options)),
            "task": argparse.Namespace(**(task or {"_name": "translation"})),
        },
        "model": dict(state),
        "optimizer_history": [{"num_updates": updates}],
        "extra_state": {"metrics": torch.tensor(1.0, dtype=torch.float64)},
    }
    torch.save(content, path)
    return path


def save_sharded(folder: Path, ranks: int = 2, stem: str = "checkpoint", updates: int = 5) -> Path:
    """Writes shared and rank files; returns the path ``STEM.pt`` that does not exist itself."""
    state = fairseq_state()
    shared = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    save_fairseq(folder / f"{stem}-shared.pt", shared, updates)
    each = E // ranks
    for rank in range(ranks):
        part = fairseq_state(range(rank * each, (rank + 1) * each))
        experts = {name: tensor for name, tensor in part.items() if ".experts." in name}
        save_fairseq(folder / f"{stem}-rank-{rank}.pt", experts, updates)
    return folder / f"{stem}.pt"


@contextmanager
def namespaces_allowed() -> Iterator[None]:
    """``torch.load`` builds Namespaces in the block; afterwards what was allowed before, still is."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    yield
    if argparse.Namespace not in before:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
