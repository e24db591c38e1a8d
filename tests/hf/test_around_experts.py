"""What ``optimize`` does besides the experts: dense layers, the cache's room, and their inverse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe import available_kernels
from fairseq_moe_opt.moe.dense import onednn_refusal
from hf_integration import optimize
from hf_integration.roomy_cache import RoomyLayer
from tests.helpers.compare import assert_close_relative
from tests.helpers.nllb import batch, logits, tiny_model
from tests.helpers.switch import tiny_switch

needs_onednn = pytest.mark.skipif(onednn_refusal() is not None, reason=str(onednn_refusal()))
needs_fused = pytest.mark.skipif("fused" not in available_kernels(), reason="the compiled kernel is not built")


def generate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    result: torch.Tensor = model.generate(**ids, **{"max_new_tokens": 20, "do_sample": False, **settings})
    return result


def calls(model: Any) -> dict[str, int]:
    report = model.moe.report().dense
    return {} if report is None else report.calls


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_and_logits_are_those_of_the_dense_layers_as_they_are(beams: int) -> None:
    model, inputs = tiny_model(), batch()
    handle = optimize(model, dense="torch")
    expected, tokens = logits(model, inputs), generate(model, inputs, num_beams=beams)
    assert handle.report().dense is None
    handle.undo()
    optimize(model)
    assert_close_relative(logits(model, inputs), expected)
    assert torch.equal(generate(model, inputs, num_beams=beams), tokens)


@needs_onednn
@needs_fused
def test_the_report_says_what_computed_the_dense_layers() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    logits(model, inputs)
    report = model.moe.report().dense
    # 4 projections of 2 + 2 x 2 attentions, 2 layers of 2 dense networks, and lm_head; the networks run as one.
    assert (report.linears, report.feed_forwards) == (4 * 6 + 4 + 1, 2)
    assert report.calls == {"fused": 25 + 2}
    assert model.moe.report().to_dict()["dense"]["calls"] == report.calls
    model.moe.reset()
    assert calls(model) == {}


@needs_onednn
@needs_fused
def test_many_rows_are_counted_as_onednns() -> None:
    model = tiny_model()
    optimize(model)
    with torch.no_grad():
        model.lm_head(torch.ones(65, model.config.d_model))
        model.model.decoder.layers[0].ffn(torch.ones(65, model.config.d_model))
    assert calls(model) == {"onednn": 2}


def test_linears_for_which_nothing_is_faster_stay_as_they_are_and_networks_run() -> None:
    model, inputs = tiny_model().to(torch.bfloat16), batch()
    optimize(model, kernel="loop")  # torch uses oneDNN by itself
    assert model.moe.report().dense.linears == 0
    assert not any("forward" in vars(module) for module in model.modules() if type(module) is nn.Linear)
    model.moe.undo()
    optimize(model)
    logits(model, inputs)
    compiled = "fused" in available_kernels()
    assert (calls(model).get("fused", 0) > 0) is compiled


@needs_fused
def test_a_network_of_linears_that_were_left_alone_is_still_the_compiled_kernels() -> None:
    model, inputs = tiny_model().double(), batch()
    optimize(model, kernel="auto")
    assert model.moe.report().dense.linears == 0
    model.float()
    logits(model, inputs)
    assert calls(model) == {"fused": 2}


@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_later_goes_on(before: torch.dtype, after: torch.dtype) -> None:
    plain, cast, inputs = tiny_model().to(before).to(after), tiny_model().to(before), batch()
    optimize(plain, dense="torch", kernel="naive")
    optimize(cast, kernel="naive")
    expected, found = logits(plain, inputs), logits(cast.to(after), inputs)
    assert found.dtype == after
    assert_close_relative(found, expected, 1e-5 if after != torch.bfloat16 else 0.05)


@needs_onednn
def test_a_kernel_asked_for_by_name_is_the_only_one() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model, kernel="loop")
    logits(model, inputs)
    assert calls(model) == {"onednn": 27}


def test_undo_takes_all_forwards_back() -> None:
    model, inputs = tiny_model(), batch()
    before = logits(model, inputs)
    forwards = {name: module.forward for name, module in model.named_modules()}
    optimize(model)
    assert "forward" in vars(model.lm_head) and "forward" in vars(model.model.decoder.layers[0].ffn)
    model.moe.undo()
    assert all(module.forward == forwards[name] for name, module in model.named_modules())
    assert torch.equal(logits(model, inputs), before)


def test_training_and_gradients_are_the_host_models() -> None:
    inputs = batch()
    gradients = []
    for options in ({"dense": "torch"}, {}):
        model = tiny_model()
        optimize(model, kernel="naive", **options)
        model(**inputs).logits.square().mean().backward()
        gradients.append(model.model.decoder.layers[0].ffn.fc1.weight.grad)
    assert torch.equal(*gradients)


def test_hooks_inside_a_dense_network_still_run() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    expected = logits(model, inputs)
    seen = []
    model.model.encoder.layers[0].ffn.fc1.register_forward_hook(lambda *_: seen.append(1))
    assert_close_relative(logits(model, inputs), expected)
    assert seen == [1]


def test_layers_of_another_kind_are_left_alone() -> None:
    class Adapter(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    model, inputs = tiny_model(), batch()
    ffn = model.model.encoder.layers[0].ffn
    adapter = Adapter(32, 48)
    adapter.load_state_dict(ffn.fc1.state_dict())
    ffn.fc1 = adapter
    optimize(model, dense="torch")
    expected = logits(model, inputs)
    model.moe.undo()
    optimize(model)
    assert "forward" not in vars(adapter)
    assert_close_relative(logits(model, inputs), expected)


def test_a_copy_computes_with_its_own_weights() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    expected = logits(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(logits(other, inputs), expected)
    assert not logits(model, inputs).any()


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(OptionError, match=r"dense.*'fast' is not one of auto, torch"):
        optimize(tiny_model(), dense="fast")


@needs_onednn
@needs_fused
def test_switch_transformers_dense_layers() -> None:
    model = tiny_switch()
    ids = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        optimize(model, dense="torch")
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        model.moe.undo()
        optimize(model)
        assert_close_relative(model(input_ids=ids, decoder_input_ids=ids).logits, expected)
    report = model.moe.report().dense
    assert report.feed_forwards > 0
    # A network as one, not its two linears.
    assert report.calls == {"fused": report.linears - report.feed_forwards}


def states(length: int, batch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch_size, 3, length, 4), torch.randn(batch_size, 3, length, 4)


def grown(layer: DynamicLayer, seed: int = 0) -> list[torch.Tensor]:
    """A layer through a first forward of 5 tokens, 40 tokens, beams, a crop, chosen rows, and some more."""
    torch.manual_seed(seed)
    seen = []
    with torch.no_grad():
        for step in range(60):
            if step in (10, 20, 21):
                layer.reorder_cache(torch.tensor([1, 1]))
            if step == 30:
                layer.crop(-3)
            if step == 40:
                layer.batch_select_indices(torch.tensor([1, 0]))
            keys, values = layer.update(*states(5 if step == 0 else 1))
            seen += [keys.clone(), values.clone()]
    assert layer.get_seq_length() == 5 + 59 - 3
    return seen


def test_a_roomy_layer_holds_what_a_dynamic_one_does() -> None:
    expected, actual = grown(DynamicLayer()), grown(RoomyLayer())
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))


def test_tokens_that_are_there_stay_where_they_are() -> None:
    layer = RoomyLayer()
    with torch.no_grad():
        layer.update(*states(3))
        places = [layer.update(*states(1))[0].data_ptr() for _ in range(30)]
    assert len(set(places)) <= 3


def test_what_was_handed_out_before_is_not_written_over() -> None:
    layer = RoomyLayer()
    with torch.no_grad():
        layer.update(*states(3))
        keys, _ = layer.update(*states(1))
        kept = keys.clone()
        twin = copy.deepcopy(layer)
        layer.crop(-1)
        layer.update(*states(1))
        twin.update(*states(1))
    assert torch.equal(keys, kept)
    assert torch.equal(twin.keys[:, :, :4], kept) and not torch.equal(layer.keys, kept)


def test_gradients_through_the_cache_are_transformers_own() -> None:
    layer = RoomyLayer()
    keys, values = states(2)
    layer.update(keys.requires_grad_(), values)
    more = torch.randn(2, 3, 1, 4, requires_grad=True)
    found, _ = layer.update(more, torch.randn(2, 3, 1, 4))
    found.sum().backward()
    assert torch.equal(more.grad, torch.ones_like(more)) and torch.equal(keys.grad, torch.ones_like(keys))


def test_a_cache_from_inference_mode_goes_on_outside_of_it() -> None:
    layer = RoomyLayer()
    with torch.inference_mode():
        layer.update(*states(3))
        layer.update(*states(1))
    with torch.no_grad():
        assert layer.update(*states(1))[0].shape[2] == 5


def test_caches_are_roomy_while_optimised_and_only_the_plain_ones() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    kinds = {type(layer) for layer in cache.self_attention_cache.layers}
    assert kinds == {RoomyLayer}
    assert {type(layer) for layer in cache.cross_attention_cache.layers} == {DynamicLayer}
    model.moe.undo()
    later = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        model(**inputs, past_key_values=later)
    assert {type(layer) for layer in later.self_attention_cache.layers} == {DynamicLayer}
