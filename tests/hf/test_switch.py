"""Switch Transformers. Checked with Transformers 5.23.0 and 5.24.0, which drop as the rule says, and 5.6.0: never."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.errors import MoEError, OptionError
from fairseq_moe_opt.moe import available_kernels
from hf_integration import from_pretrained, optimize
from hf_integration.footprint import model_sizes
from tests.helpers.compare import assert_close_relative
from tests.helpers.switch import DROPS, batch, by_definition, greedy, logits, tiny_switch

CAPACITY = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "router bias, gelu": {"router_bias": True, "dense_act_fn": "gelu_new"},
    "every layer sparse": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "untied": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts serve two tokens a sequence, by its own options."""
    path = tmp_path_factory.mktemp("switch") / "model"
    tiny_switch(expert_capacity=CAPACITY).save_pretrained(path)
    return path


def encodings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    return result


@pytest.mark.parametrize("left_padded", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_tokens_are_transformers_own(variant: str, left_padded: bool) -> None:
    model, inputs = tiny_switch(**VARIANTS[variant]), batch(left_padded)
    expected, tokens, encoded = logits(model, inputs), greedy(model, inputs), encodings(model, inputs)
    handle = optimize(model)
    assert_close_relative(logits(model, inputs), expected)
    assert torch.equal(greedy(model, inputs), tokens)
    # Padding is routed too: not even what nobody reads differs.
    assert_close_relative(encodings(model, inputs), encoded)
    for layer in handle.report().layers:
        assert layer.tokens == layer.routed_rows == layer.computed_rows > 0
        assert sum(rows > 0 for rows in layer.expert_rows) > 1
    assert len(set(tokens.flatten().tolist())) > 2


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("capacity", ["none", "checkpoint"])
def test_capacity_is_of_each_sequence(capacity: str, gating: str) -> None:
    model, inputs = tiny_switch(expert_capacity=CAPACITY), batch()
    oracle = by_definition(model, CAPACITY if capacity == "checkpoint" else None)
    expected, tokens = logits(oracle, inputs), greedy(oracle, inputs)
    if (capacity == "checkpoint") == DROPS:
        assert_close_relative(logits(model, inputs), expected)
    other = by_definition(model, None if capacity == "checkpoint" else CAPACITY)
    handle = optimize(model, capacity=capacity, gating=gating)
    assert_close_relative(logits(model, inputs), expected)
    dropped = sum(layer.dropped_rows for layer in handle.report().layers)
    assert (dropped > 0) == (capacity == "checkpoint")
    assert torch.equal(greedy(model, inputs), tokens)
    assert not torch.allclose(logits(model, inputs), logits(other, inputs), rtol=1e-3)  # the capacity binds


def test_padding_takes_no_capacity_where_the_options_say_so() -> None:
    model = tiny_switch(expert_capacity=CAPACITY, router_ignore_padding_tokens=True)
    inputs = batch(left_padded=True)
    optimize(model, capacity="checkpoint")
    encoded = encodings(model, inputs)
    encoder = model.moe.report().layers[0]
    assert (encoder.tokens, encoder.routed_rows) == (36, 24)  # of 12 + 8 + 4 tokens
    assert encoder.computed_rows == 24 - encoder.dropped_rows < 24
    oracle = by_definition(model, CAPACITY)
    for row, length in enumerate((12, 8, 4)):
        alone = {name: inputs[name][row : row + 1, 12 - length :] for name in ("input_ids", "attention_mask")}
        assert_close_relative(encoded[row, 12 - length :], encodings(oracle, alone)[0])


@pytest.mark.parametrize("kernel", available_kernels())
def test_undo_restores_everything(kernel: str) -> None:
    model, inputs = tiny_switch(), batch()
    before, parameters = logits(model, inputs), {id(parameter) for parameter in model.parameters()}
    block = model.encoder.block[1].layer[-1].mlp
    signatures = [str(inspect.signature(f)) for f in (block.forward, block.router.forward, model.generate)]
    attributes = [set(vars(module)) for module in model.modules()]
    handle = optimize(model, kernel=kernel)
    assert [str(inspect.signature(f)) for f in (block.forward, block.router.forward, model.generate)] == signatures
    assert_close_relative(logits(copy.deepcopy(model), inputs), before)
    assert {layer.kernels for layer in handle.report().layers} <= {(), (kernel,)}
    handle.undo()
    assert torch.equal(logits(model, inputs), before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {id(parameter) for parameter in model.parameters()} == parameters


@pytest.mark.parametrize("capacity", ["none", "checkpoint"])
@pytest.mark.parametrize(
    "memory",
    [
        {"expert_memory": "100%"},
        {"expert_memory": "25%", "eviction": "lru", "prefetch": "router"},
        {"expert_memory": "25%", "expert_pool": "layer", "host_memory": "30%"},
    ],
)
def test_buffered_is_resident_bit_for_bit(folder: Path, memory: dict[str, Any], capacity: str) -> None:
    inputs = batch()
    resident = from_pretrained(folder, capacity=capacity)
    model = from_pretrained(folder, capacity=capacity, **memory)
    assert torch.equal(logits(model, inputs), logits(resident, inputs))
    for how in ({}, {"num_beams": 3}):
        assert torch.equal(greedy(model, inputs, **how), greedy(resident, inputs, **how))
    report = model.moe.report()
    assert report.expert_bytes == resident.moe.report().expert_bytes == 16 * 2 * 32 * 48 * 4
    assert report.buffer.slots == (16 if memory["expert_memory"] == "100%" else 4)
    oracle = by_definition(tiny_switch(expert_capacity=CAPACITY), CAPACITY if capacity == "checkpoint" else None)
    assert torch.equal(greedy(model, inputs), greedy(oracle, inputs))
    with pytest.raises(MoEError, match="no complete state dict"):
        model.state_dict()
    model.moe.undo()
    original = tiny_switch(expert_capacity=CAPACITY).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("memory", ["all", "25%"])
def test_bfloat16(folder: Path, memory: str) -> None:
    inputs = batch()
    model = from_pretrained(folder, dtype="bfloat16", capacity="checkpoint", expert_memory=memory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model, inputs).dtype == torch.bfloat16
    oracle = by_definition(tiny_switch(expert_capacity=CAPACITY).bfloat16(), CAPACITY)
    assert_close_relative(logits(model, inputs).float(), logits(oracle, inputs).float(), 2e-2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}  # the router's too, still


@pytest.mark.parametrize("memory", ["all", "25%"])
def test_int8_experts(folder: Path, memory: str) -> None:
    inputs, expected = batch(), logits(by_definition(tiny_switch()), batch())
    model = from_pretrained(folder, expert_dtype="int8", expert_memory=memory)
    assert_close_relative(logits(model, inputs), expected, 5e-2)
    assert model.moe.report().expert_bytes == 16 * (2 * 32 * 48 + (32 + 48) * 4)


def test_router_logits_have_their_own_shape() -> None:
    model, inputs = tiny_switch(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1), batch()
    stock = model(**inputs, output_router_logits=True) if DROPS else None
    optimize(model)
    if stock is None:
        recorded = model.encoder(inputs["input_ids"], output_router_logits=True).router_logits
        assert [tuple(one.shape) for one in recorded] == [(3, 12, 8)]
        return
    result = model(**inputs, output_router_logits=True)
    for mine, theirs in zip(result.encoder_router_logits, stock.encoder_router_logits, strict=True):
        assert_close_relative(mine, theirs)
    assert_close_relative(result.encoder_z_loss, stock.encoder_z_loss)


def test_gradients_are_those_of_the_definition() -> None:
    plain = {"router_jitter_noise": 0.0, "dropout_rate": 0.0, "expert_capacity": CAPACITY}
    model, labels = tiny_switch(**plain), batch()["decoder_input_ids"]
    oracle = by_definition(model, CAPACITY)
    optimize(model, capacity="checkpoint")
    gradients = []
    for one in (model, oracle):
        one.train()
        one(**{**batch(), "labels": labels}).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert_close_relative(gradients[0][name], gradient, 1e-4)


def test_jitter_is_of_the_router_alone_and_of_training() -> None:
    model = tiny_switch(router_jitter_noise=0.5)
    optimize(model)
    router, rows = model.encoder.block[1].layer[-1].mlp.router, torch.randn(2, 5, 32)
    given = rows.clone()
    assert torch.equal(router(rows)[2], router(rows)[2])
    router.train()
    assert not torch.allclose(router(rows)[2], router(rows)[2])
    assert torch.equal(rows, given)


def test_sizes_come_from_the_configuration_alone(folder: Path) -> None:
    dense, layers = model_sizes(folder, 4)
    assert [(layer.phase, layer.num_experts, layer.expert_bytes) for layer in layers] == [
        ("encoder", 8, 2 * 32 * 48 * 4),
        ("decoder", 8, 2 * 32 * 48 * 4),
    ]
    model = tiny_switch()
    assert dense + 16 * 2 * 32 * 48 * 4 == sum(parameter.numel() for parameter in model.parameters()) * 4


def test_an_activation_that_is_none_of_the_engines_is_refused() -> None:
    with pytest.raises(OptionError, match="tanh"):
        optimize(tiny_switch(dense_act_fn="tanh"))
