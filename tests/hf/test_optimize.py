"""``optimize`` and its handle: attach, use in every way a model is used, undo."""

from __future__ import annotations

import copy
import inspect
import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import NllbMoeForConditionalGeneration, NllbMoeModel, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from fairseq_moe_opt.errors import NoMoELayerError, OptionError
from fairseq_moe_opt.moe import available_kernels
from hf_integration import optimize
from tests.helpers.nllb import batch, logits, tiny_config, tiny_model

KERNELS = available_kernels()


def greedy(model: NllbMoeForConditionalGeneration, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    result: torch.Tensor = model.generate(**ids, min_new_tokens=8, max_new_tokens=8, do_sample=False, **options)
    return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_undo_restores_everything(kernel: str) -> None:
    model, inputs = tiny_model(), batch()
    before = logits(model, inputs)
    parameters = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = model.model.encoder.layers[1].ffn
    signatures = [str(inspect.signature(f)) for f in (block.forward, block.router.forward, model.generate)]
    attributes = [set(vars(module)) for module in model.modules()]

    handle = optimize(model, kernel=kernel)
    assert [str(inspect.signature(f)) for f in (block.forward, block.router.forward, model.generate)] == signatures
    assert not torch.equal(logits(model, inputs), before)
    handle.undo()
    handle.undo()

    assert torch.equal(logits(model, inputs), before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {id(parameter) for parameter in model.parameters()} == {id(one) for one in parameters.values()}
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    storages = [p.untyped_storage().data_ptr() for p in block.parameters()]
    assert len(set(storages)) == len(storages)  # every parameter owns its storage again
    assert optimize(model, kernel=kernel).active and not handle.active


@pytest.mark.parametrize("kernel", KERNELS)
def test_save_pretrained_after_optimize_writes_the_same(kernel: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    optimize(model, kernel=kernel)
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == files
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_dtypes_and_gradient_modes_agree_with_naive(dtype: torch.dtype, mode: type) -> None:
    model, inputs = tiny_model().to(dtype), batch()
    optimize(model, kernel="naive")
    expected = logits(model, inputs)
    model.moe.undo()
    optimize(model)
    with mode():
        actual = model(**inputs).logits
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)
    assert model.model.encoder.layers[1].ffn.router.classifier.weight.dtype == dtype


def test_casting_after_optimize_is_followed() -> None:
    model, inputs = tiny_model(), batch()
    for kernel in KERNELS:
        optimize(model, kernel=kernel)
        logits(model, inputs)
        model.to(torch.bfloat16)
        fresh = tiny_model().to(torch.bfloat16)
        optimize(fresh, kernel=kernel)
        assert torch.equal(logits(model, inputs), logits(fresh, inputs))
        model.moe.undo()
        model.load_state_dict(tiny_model().state_dict())
        model.to(torch.float32)
        model.load_state_dict(tiny_model().state_dict())


@pytest.mark.parametrize("kernel", KERNELS)
def test_new_weights_are_seen_at_once(kernel: str) -> None:
    model, inputs = tiny_model(0), batch()
    optimize(model, kernel=kernel)
    model.load_state_dict(tiny_model(7).state_dict())
    other = tiny_model(7)
    optimize(other, kernel=kernel)
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_router_logits_are_recorded() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    assert [tuple(one.shape) for one in outputs.encoder_router_logits] == [(27, 8)]
    assert [tuple(one.shape) for one in outputs.decoder_router_logits] == [(15, 8)]
    assert outputs.encoder_router_logits[0].std() > 0.1


def test_router_loss_trains() -> None:
    model, inputs = tiny_model().train(), batch()
    optimize(model)
    labels = inputs.pop("decoder_input_ids")
    loss = model(**inputs, labels=labels, output_router_logits=True).loss
    loss.backward()
    gradients = [
        model.get_parameter(f"model.decoder.layers.1.ffn.experts.expert_{e}.fc1.weight").grad for e in range(8)
    ]
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients) >= 3
    assert model.model.encoder.layers[1].ffn.router.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("left_padded", [False, True])
def test_padding_does_not_change_real_tokens(left_padded: bool) -> None:
    model, inputs = tiny_model(), batch(left_padded=left_padded)
    optimize(model)
    together = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    assert (model.moe.report().layers[0].routed_rows, model.moe.report().layers[0].tokens) == (2 * 18, 27)
    kept = inputs["attention_mask"][1].bool()
    alone = model.get_encoder()(inputs["input_ids"][1:2, kept]).last_hidden_state
    torch.testing.assert_close(together[1, kept], alone[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_decoding_equals_recomputing(cache: str | None) -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    options = {} if cache is None else {"cache_implementation": cache}
    cached = greedy(model, inputs, **options)
    assert torch.equal(cached, greedy(model, inputs, use_cache=False))


def test_generate_in_the_usual_ways() -> None:
    model, inputs = tiny_model(), batch()
    results = {}
    for gating in ("dynamic", "static"):
        optimize(model, gating=gating)
        torch.manual_seed(3)
        results[gating] = [
            greedy(model, inputs, forced_bos_token_id=7),
            greedy(model, inputs, num_beams=3, num_return_sequences=2),
            model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=True, num_return_sequences=2),
        ]
        model.moe.undo()
    assert results["dynamic"][0][:, 1].tolist() == [7, 7, 7] and results["dynamic"][1].shape[0] == 6
    for dynamic, static in zip(results["dynamic"], results["static"], strict=True):
        assert torch.equal(dynamic, static)


def test_streamer_gets_every_token() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, streamer = tiny_model(), Collect()
    optimize(model)
    ids = batch()["input_ids"][:1]
    result = model.generate(ids, max_new_tokens=5, streamer=streamer)
    assert streamer.tokens == [*result[0].tolist(), -1]


def test_each_generate_call_leaves_its_own_report(tmp_path: Path) -> None:
    model, inputs = tiny_model(), batch()
    handle = optimize(model, profile=True, report=str(tmp_path / "report.json"))
    greedy(model, inputs)
    first = handle.report()
    greedy(model, inputs)
    second = handle.report()
    assert first.tokens == second.tokens == {"encoder": 27, "decoder": 3 * 8}
    assert second.family == "nllb-moe" and second.options["profile"] is True
    assert [layer.name for layer in second.layers] == [
        "model.encoder.layers.1.ffn",
        "model.decoder.layers.1.ffn",
    ]
    assert all(0 < layer.active_experts <= 8 and layer.kernels in {("loop",), ("fused",)} for layer in second.layers)
    assert 0 < sum(second.step_seconds.values()) < second.seconds
    assert second.peak_memory_bytes > 2**20 and second.expert_bytes == 2 * 8 * (2 * 32 * 48 + 32 + 48) * 4
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(second.to_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_two_threads_generate_at_once() -> None:
    model = tiny_model()
    optimize(model)
    inputs = [batch(seed) for seed in range(4)]
    expected = [greedy(model, one) for one in inputs]
    results: dict[int, torch.Tensor] = {}

    def work(place: int) -> None:
        results[place] = greedy(model, inputs[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[place], expected[place]) for place in range(4))


def test_a_copied_model_is_its_own() -> None:
    model, inputs = tiny_model(), batch()
    optimize(model)
    expected = logits(model, inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied, inputs), expected)
    copied.moe.undo()
    assert not hasattr(copied, "moe") and hasattr(model, "moe")


def test_the_bare_model_is_optimised_too() -> None:
    torch.manual_seed(0)
    model = NllbMoeModel(tiny_config()).eval()
    handle = optimize(model)
    with torch.no_grad():
        model(**batch())
    assert handle.report().tokens == {"encoder": 27, "decoder": 15}


def test_a_model_without_experts_is_refused() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(NoMoELayerError, match=r"T5ForConditionalGeneration has no .* known family \(nllb-moe, "):
        optimize(T5ForConditionalGeneration(config))
    with pytest.raises(NoMoELayerError, match="nllb-moe"):
        optimize(tiny_model(encoder_sparse_step=0, decoder_sparse_step=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernl": "loop"},
            r"'kernl': no such option; there are gating, capacity, kernel, dense, expert_dtype, expert_memory, "
            r"host_memory, eviction, expert_pool, prefetch, host_compute, warm_start, trace, rebalance_every, profile, "
            r"report$",
        ),
        ({"kernel": "fast"}, r"'kernel': 'fast' is not one of auto, naive, loop, grouped_mm"),
        ({"gating": "none"}, r"'gating': 'none' is not one of dynamic, static"),
        ({"capacity": 0.5}, r"'capacity': 0.5 is not one of none, checkpoint"),
        ({"rebalance_every": -1}, r"'rebalance_every': -1 is not 0 or a whole number above it"),
        ({"rebalance_every": 2}, r"'rebalance_every': 2 has no effect: one process has all experts; leave it out"),
        ({"profile": "yes"}, r"'profile': 'yes' is not true or false"),
        ({"gating": "static", "kernel": "loop"}, r"'kernel': 'loop' has no effect with gating='static'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    model = tiny_model()
    with pytest.raises(OptionError, match=message):
        optimize(model, **options)
    assert not hasattr(model, "moe")


def test_optimising_twice_is_refused() -> None:
    model = tiny_model()
    optimize(model)
    with pytest.raises(OptionError, match=r"already optimised; call model.moe.undo\(\)"):
        optimize(model, kernel="naive")


def test_a_preset_gives_options_and_is_overridden(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("gating: static\ncapacity: checkpoint\n", encoding="utf-8")
    handle = optimize(tiny_model(), preset=preset, capacity="none")
    assert (handle.options.gating, handle.options.capacity) == ("static", "none")
    assert optimize(tiny_model(), preset="faithful").options.capacity == "checkpoint"
    with pytest.raises(OptionError, match=r"preset.*nothing-like-it"):
        optimize(tiny_model(), preset="nothing-like-it")
