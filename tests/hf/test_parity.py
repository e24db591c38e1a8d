"""Optimised NLLB-MoE against Transformers 4.57.1, and proof that the comparison can tell right from wrong."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fairseq_moe_opt.moe import available_kernels
from hf_integration import optimize
from hf_integration.families import nllb_moe
from tests.helpers.compare import assert_close_relative
from tests.helpers.goldens import HF_GOLDENS, TOLERANCE, read_arrays, read_json, real_difference
from tests.helpers.releases import NLLB_SEEN_WRONG, RELEASE

MODELS = ("experts8", "experts16")
SIDES = ("left", "right")
SETTINGS: dict[str, dict[str, Any]] = read_json(HF_GOLDENS / MODELS[0] / "goldens.json")["settings"]
DROP_FREE = tuple(name for name in SETTINGS if name.startswith("cap1.00"))


@cache
def arrays(model: str) -> dict[str, Tensor]:
    return dict(read_arrays(HF_GOLDENS / model / "goldens.npz"))


def inputs(model: str, side: str) -> dict[str, Tensor]:
    prefix = f"inputs.{side}."
    return {key.removeprefix(prefix): value for key, value in arrays(model).items() if key.startswith(prefix)}


def load(model: str, setting: str) -> nn.Module:
    """The golden's model in float32 under one setting, as the installed Transformers has it."""
    folder: Path = HF_GOLDENS / model / "model"
    config = transformers.NllbMoeConfig.from_pretrained(folder, **SETTINGS[setting])
    loaded, info = transformers.NllbMoeForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def differences(model: nn.Module, name: str, setting: str, side: str) -> tuple[float, float]:
    """Relative differences of logits and of the encoder's output at real positions."""
    given = inputs(name, side)
    with torch.inference_mode():
        out = model(**given)
    expected = arrays(name)
    logits = real_difference(out.logits, expected[f"{setting}.{side}.logits"], given["decoder_attention_mask"])
    encoder = real_difference(
        out.encoder_last_hidden_state, expected[f"{setting}.{side}.encoder"], given["attention_mask"]
    )
    return logits, encoder


def generate(model: nn.Module, name: str, side: str, beams: int) -> Tensor:
    facts = read_json(HF_GOLDENS / name / "goldens.json")
    given = inputs(name, side)
    tokens: Tensor = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        forced_bos_token_id=facts["forced_bos_token_id"],
        max_new_tokens=facts["max_new_tokens"],
        num_beams=beams,
        do_sample=False,
    )
    return tokens


def check(model: nn.Module, name: str, setting: str, side: str) -> None:
    """Logits and encoder output to the tolerance, greedy and beam tokens identical."""
    assert max(differences(model, name, setting, side)) <= TOLERANCE
    expected = arrays(name)
    assert torch.equal(generate(model, name, side, 1), expected[f"{setting}.{side}.greedy"])
    if side == "left":  # the slowest check of all: once for every setting is enough
        assert torch.equal(generate(model, name, side, 4), expected[f"{setting}.{side}.beam4"])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_capacity_drops_what_transformers_4_drops(name: str, setting: str, side: str) -> None:
    model = load(name, setting)
    optimize(model, capacity="checkpoint")
    check(model, name, setting, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("setting", DROP_FREE)
@pytest.mark.parametrize("name", MODELS)
def test_default_options_equal_transformers_4_where_it_drops_nothing(name: str, setting: str, side: str) -> None:
    model = load(name, setting)
    optimize(model)
    check(model, name, setting, side)


@pytest.mark.parametrize("options", [{"gating": "static"}, *({"kernel": name} for name in available_kernels())])
@pytest.mark.parametrize(("setting", "capacity"), [("cap1.00", "none"), ("cap0.25_bpr", "checkpoint")])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_compute_agrees(name: str, setting: str, capacity: str, options: dict[str, str]) -> None:
    model = load(name, setting)
    optimize(model, capacity=capacity, **options)
    check(model, name, setting, "left")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_router_logits_lead_to_the_recorded_combine_weights(name: str, setting: str) -> None:
    """``output_router_logits`` gives raw logits; the layer's routing rule makes 4.57.1's weights of them."""
    model = load(name, setting)
    optimize(model, capacity="checkpoint")
    given = inputs(name, "left")
    with torch.inference_mode():
        out = model(**given, output_router_logits=True)
    for phase, mask in (("encoder", "attention_mask"), ("decoder", "decoder_attention_mask")):
        padding = None if model.config.router_ignore_padding_tokens else given[mask].reshape(-1) == 0
        for layer, logits in zip((1, 3), getattr(out, f"{phase}_router_logits"), strict=True):
            spec = nllb_moe.layer_spec(f"model.{phase}.layers.{layer}.ffn", model.config)
            routing = spec.router.route(logits, padding)
            combine = torch.zeros(logits.shape[0], routing.num_experts + 1)
            combine.scatter_add_(1, routing.expert_index, routing.weight)
            expected = arrays(name)[f"{setting}.left.combine.{phase}.{layer}"]
            assert torch.equal(combine[:, :-1] != 0, expected != 0)
            assert_close_relative(combine[:, :-1], expected, TOLERANCE)


def test_undo_brings_back_the_installed_releases_own_numbers() -> None:
    """Wrong or right, they are bit for bit what they were."""
    stock = differences(load("experts8", "cap1.00"), "experts8", "cap1.00", "left")
    model = load("experts8", "cap1.00")
    optimize(model).undo()
    assert differences(model, "experts8", "cap1.00", "left") == stock


@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_fails_for_releases_known_to_be_wrong(name: str) -> None:
    """The test of these tests: without ``optimize`` the same numbers must be far off."""
    if str(RELEASE) not in NLLB_SEEN_WRONG:
        pytest.skip(f"transformers {RELEASE} is not one of {', '.join(NLLB_SEEN_WRONG)}")
    model = load(name, "cap1.00")
    assert min(differences(model, name, "cap1.00", "left")) > 1000 * TOLERANCE
    assert not torch.equal(generate(model, name, "left", 1), arrays(name)["cap1.00.left.greedy"])
