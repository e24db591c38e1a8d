"""Forced decoding of the branches' checkpoints in stock fairseq against the branches' own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fairseq", reason="fairseq is not installed")

from omegaconf import OmegaConf

from fairseq_moe_opt.models._losses import collect_gate_losses
from fairseq_moe_opt.moe import Routing
from tests.helpers.compare import relative_difference
from tests.helpers.fairseq_runs import (
    BATCHES,
    LANGUAGE_MODEL,
    MODELS,
    arrays,
    dense_weights,
    forced,
    golden_names,
    load_golden,
    real_positions,
    record,
    recorded,
)
from tests.helpers.goldens import TOLERANCE, real_difference

HALF_TOLERANCE = 2e-2
"""fp16 has 10 bits; a routing near a tie may also go the other way."""

CASES = [(model, name) for model in MODELS for name in golden_names(model)]
EXACT = [case for case in CASES if not record(*case)["half"] and record(*case)["seed"] is None]
SEEDED = [case for case in CASES if record(*case)["seed"] is not None]
HALF = [case for case in CASES if record(*case)["half"]]


def check_outputs(model: Any, golden: dict[str, Tensor], batch: str, tolerance: float = TOLERANCE) -> None:
    """Logits, encoder output and every recorded state at the tokens that are not padding."""
    out = forced(model, golden, batch)
    decoder = real_positions(golden, batch, "decoder")
    assert real_difference(out.logits, golden[f"{batch}.logits"], decoder) <= tolerance
    if out.encoder_out is not None:
        encoder = real_positions(golden, batch, "encoder").t()
        assert real_difference(out.encoder_out, golden[f"{batch}.encoder_out"], encoder) <= tolerance
        for index, state in enumerate(out.encoder_states):
            if f"{batch}.encoder_state.{index}" in golden:
                assert real_difference(state, golden[f"{batch}.encoder_state.{index}"], encoder) <= tolerance
    for index, state in enumerate(out.decoder_states):
        if f"{batch}.decoder_state.{index}" in golden:
            assert real_difference(state, golden[f"{batch}.decoder_state.{index}"], decoder.t()) <= tolerance


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("model_name", "name"), EXACT)
def test_outputs_and_routing_are_the_branches_own(model_name: str, name: str, batch: str) -> None:
    model, _ = load_golden(model_name, name)
    golden = arrays(model_name, name)
    with recorded(model) as recorder, collect_gate_losses() as losses:
        check_outputs(model, golden, batch)
    assert len(losses.balance) == len(recorder.routings)
    for layer, loss in zip(recorder.routings, losses.balance, strict=True):
        assert float(loss) == pytest.approx(float(golden[f"{batch}.router.{layer}.l_aux"]), rel=1e-5), layer
    assert len(recorder.routings) == (2 if model_name.startswith("E") else 4)
    for layer, (routing,) in recorder.routings.items():
        prefix = f"{batch}.router.{layer}"
        expected, found = golden[f"{prefix}.combine_SE"], dense_weights(routing)
        assert torch.equal(found > 0, expected > 0), f"{layer}: other experts"
        assert float((found - expected).abs().max()) <= TOLERANCE
        assert routing.capacity == int(golden[f"{prefix}.capacity"])


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("name", [name for model, name in EXACT if model == "A_top2_eom"])
def test_one_file_with_all_experts_gives_the_same(name: str, gating: str) -> None:
    model, _ = load_golden("A_top2_eom", name, "checkpoint_single.pt", moe_gating=gating)
    check_outputs(model, arrays("A_top2_eom", name), "b0")


@pytest.mark.parametrize(("model_name", "name"), [("A_top2_eom", "cap0.25"), (LANGUAGE_MODEL, "cap0.05")])
def test_batch_sizes_of_training_do_not_matter_to_a_loaded_model(model_name: str, name: str) -> None:
    """The language model was trained with --batch-size 16; a batch of 6 is not filled up unless somebody asks."""
    golden = arrays(model_name, name)
    model, _ = load_golden(model_name, name)
    check_outputs(model, golden, "b0")
    model, _ = load_golden(model_name, name, batch_size=16, batch_size_valid=16)
    with recorded(model) as recorder:
        forced(model, golden, "b0")
    layer, (routing,) = next(iter(recorder.routings.items()))
    fraction = record(model_name, name)["overrides"]["moe_eval_capacity_token_fraction"]
    assert routing.capacity == math.ceil(fraction * 16 * golden["b0.src_tokens"].shape[1]), layer
    model.prepare_for_inference_(OmegaConf.create({"common_eval": {}, "generation": {}}))
    check_outputs(model, golden, "b0")


@pytest.mark.parametrize("kernel", ["naive", "loop", "grouped_mm"])
def test_every_kernel_gives_the_same(kernel: str) -> None:
    model, _ = load_golden("A_top2_eom", "cap0.25", moe_kernel=kernel)
    check_outputs(model, arrays("A_top2_eom", "cap0.25"), "b0")
    assert {name for layer in model.moe.report().layers for name in layer.kernels} == {kernel}


@pytest.mark.parametrize("model_name", MODELS)
def test_nothing_is_dropped_by_default(model_name: str) -> None:
    """A checkpoint's own fraction does not count unless somebody asks: only where it does not bind is it the same."""
    model, _ = load_golden(model_name, "cap1.00", moe_capacity="none")
    check_outputs(model, arrays(model_name, "cap1.00"), "b0")


@dataclass(frozen=True)
class Replay:
    """A router that gives a recorded routing."""

    combine: Tensor
    num_experts: int = 8
    top_k: int = 2

    def route(self, logits: Tensor, padding: Tensor | None = None, **_: Any) -> Routing:
        weight, index = self.combine.topk(self.top_k, dim=1)
        return Routing(index.masked_fill(weight == 0, self.num_experts), weight, self.num_experts)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("model_name", "name"), SEEDED)
def test_drawn_second_experts_by_injecting_the_recorded_ones(model_name: str, name: str, batch: str) -> None:
    model, _ = load_golden(model_name, name)
    golden = arrays(model_name, name)
    for block in model.moe.blocks:
        combine = golden[f"{batch}.router.{block.spec.layer.name}.combine_SE"]
        block.engine.router = Replay(combine)
    check_outputs(model, golden, batch)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("model_name", "name"), HALF)
def test_half_precision_is_near(model_name: str, name: str, batch: str) -> None:
    model, _ = load_golden(model_name, name)
    golden = arrays(model_name, name)
    out = forced(model.half(), golden, batch)
    real = real_positions(golden, batch, "decoder")
    assert real_difference(out.logits, golden[f"{batch}.logits"], real) <= HALF_TOLERANCE


@pytest.mark.parametrize("batch", BATCHES)
def test_conditional_gates_are_the_branches_own(batch: str) -> None:
    model, _ = load_golden("D_cmr", "cap1.00")
    golden, gates = arrays("D_cmr", "cap1.00"), {}
    for name, module in model.named_modules():
        if name.endswith("cmr_layer.gate"):
            module.register_forward_hook(lambda _module, _args, out, name=name: gates.update({name: out}))
    forced(model, golden, batch)
    assert len(gates) == 4
    for name, gate in gates.items():
        found = gate.squeeze(-1).t()
        assert relative_difference(found, golden[f"{batch}.router.{name}.gate_value"]) <= TOLERANCE
