"""Placements in Transformers' own expert parallelism: two gloo processes give the tokens of one. Checked with 5.23.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fairseq_moe_opt.errors import PlacementError
from fairseq_moe_opt.placement import Placement
from hf_integration import place_experts
from hf_integration.placed_experts import equal_order
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import greedy, language_model, logits_of
from tests.helpers.releases import EXPERT_PARALLEL, RELEASE
from tests.helpers.ranks import start_ranks, values_of

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
ORDERS = ((6, 1, 3, 4), (0, 5, 2, 7)), ((7, 6, 5, 0), (3, 2, 1, 4))


def placement(*layers: tuple[tuple[int, ...], ...]) -> Placement:
    return Placement(dict(zip(LAYERS, layers, strict=True)), 8, 2, "hand")


def run(folder: str, layers: tuple[tuple[tuple[int, ...], ...], ...]) -> Any:
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="moe_opt")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, experts_implementation="moe_opt"
    ).eval()
    model.generation_config.eos_token_id = None
    before = logits_of(model)
    place_experts(model, placement(*layers))
    return before, logits_of(model), greedy(model)


@pytest.mark.skipif(
    RELEASE < EXPERT_PARALLEL, reason=f"Transformers has ep_implementation from {EXPERT_PARALLEL} on"
)
@pytest.mark.parametrize("family", ["Mixtral"])
def test_two_processes_give_the_tokens_of_one(family: str, tmp_path: Path) -> None:
    model = language_model(family)
    model.save_pretrained(tmp_path)
    for before, logits, tokens in values_of(start_ranks(2, run, str(tmp_path), ORDERS, timeout=60.0, deadline=90.0)):
        assert_close_relative(before, logits_of(model))
        assert_close_relative(logits, logits_of(model))
        assert torch.equal(tokens, greedy(model))


def test_placements_that_cannot_be_honoured_name_the_launcher() -> None:
    uneven = placement(((0, 1, 2), (3, 4, 5, 6, 7)), ORDERS[1])
    with pytest.raises(PlacementError, match=r"gives ranks 3, 5 experts .* hf_integration\.launch"):
        equal_order(uneven, LAYERS[0], 8)
    replicas = placement(((0, 1, 2, 3, 4), (4, 5, 6, 7, 0)), ORDERS[1])
    with pytest.raises(PlacementError, match=r"has replicas .* hf_integration\.launch"):
        equal_order(replicas, LAYERS[0], 8)
    assert equal_order(placement(*ORDERS), LAYERS[0], 8) == (6, 1, 3, 4, 0, 5, 2, 7)
    with pytest.raises(PlacementError, match="no experts of this model run through"):
        place_experts(language_model("Mixtral"), uneven)
