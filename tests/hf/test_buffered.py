"""Buffered models: the same tokens and logits as resident ones, bit for bit; clear words for what they cannot do."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.buffering import POLICIES, simulate
from fairseq_moe_opt.checkpoints import convert, open_index
from fairseq_moe_opt.errors import CheckpointError, MoEError, OptionError
from fairseq_moe_opt.moe.trace import Trace, read_trace, write_trace
from hf_integration import from_pretrained, optimize
from tests.helpers.nllb import batch, logits, tiny_model

EXPERT_BYTES = (32 * 48 + 48 + 48 * 32 + 32) * 4
SLOT_BYTES = EXPERT_BYTES
"""The same: each of its tensors is a multiple of 64 bytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buffered") / "model"
    tiny_model().save_pretrained(path)
    return path


def tokens(model: Any, **how: Any) -> Tensor:
    inputs = batch()
    torch.manual_seed(7)
    result: Tensor = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        min_new_tokens=8,
        max_new_tokens=8,
        **how,
    )
    return result


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
}


@pytest.mark.parametrize("eviction", sorted(POLICIES))
@pytest.mark.parametrize(
    "memory",
    [{"expert_memory": "100%"}, {"expert_memory": SLOT_BYTES}, {"expert_memory": "40%", "expert_pool": "layer"}],
)
def test_tokens_and_logits_are_those_of_the_resident_model(folder: Path, eviction: str, memory: dict[str, Any]) -> None:
    resident = from_pretrained(folder)
    model = from_pretrained(folder, eviction=eviction, **memory)
    assert torch.equal(logits(model, batch()), logits(resident, batch()))
    for how in WAYS.values():
        assert torch.equal(tokens(model, **how), tokens(resident, **how))


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gatings_and_dtypes(folder: Path, gating: str, dtype: str) -> None:
    resident = from_pretrained(folder, gating=gating, dtype=dtype)
    model = from_pretrained(folder, gating=gating, dtype=dtype, expert_memory="25%")
    assert torch.equal(logits(model, batch()), logits(resident, batch()))
    assert torch.equal(tokens(model), tokens(resident))


EXPERT_DTYPES: dict[str, int] = {
    "checkpoint": EXPERT_BYTES,
    "bf16": EXPERT_BYTES // 2,
    "int8": 2 * 32 * 48 + (48 + 32) * (4 + 4),
}
"""Bytes of an expert in memory: an int8 one has float32 biases and scales."""


@pytest.mark.parametrize("converted", [False, True], ids=["as floats", "converted"])
@pytest.mark.parametrize("host", ["0", "30%", "page-cache"])
@pytest.mark.parametrize("name", EXPERT_DTYPES)
def test_experts_with_a_dtype_of_their_own(folder: Path, tmp_path: Path, name: str, host: str, converted: bool) -> None:
    if converted and name != "checkpoint":
        convert(folder, tmp_path / "converted", expert_dtype=name)
        folder = tmp_path / "converted"
    for kernel in ("loop", "naive"):
        resident = from_pretrained(folder, expert_dtype=name, kernel=kernel)
        model = from_pretrained(folder, expert_dtype=name, kernel=kernel, expert_memory="25%", host_memory=host)
        assert torch.equal(logits(model, batch()), logits(resident, batch()))
        for _ in range(2):
            assert torch.equal(tokens(model, num_beams=2), tokens(resident, num_beams=2))
    report, size = model.moe.report(), EXPERT_DTYPES[name]
    assert report.expert_bytes == resident.moe.report().expert_bytes == 16 * size
    assert size <= report.buffer.slot_bytes < size + 4 * 64
    assert report.buffer.arena_bytes == 4 * report.buffer.slot_bytes
    assert report.buffer.host_bytes == (report.buffer.arena_bytes if host == "30%" else 0)
    for layer in report.layers:
        fetched = layer.cache.misses * size if converted else layer.cache.misses * EXPERT_BYTES
        assert set(layer.cache.bytes_read) <= {"file", "host"}
        if host != "30%":
            assert layer.cache.bytes_read["file"] >= fetched
        assert layer.cache.bytes_read.get("host", 0) % size == 0
    assert (report.buffer.workspace_bytes == 0) == (converted or name == "checkpoint")


def test_int8_experts_come_back_when_undone(folder: Path) -> None:
    resident, model = (from_pretrained(folder, expert_dtype="int8", **how) for how in ({}, {"expert_memory": "25%"}))
    before = tokens(model)
    model.moe.undo()
    expected = resident.state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    optimize(model)
    assert torch.equal(tokens(model), before)


@pytest.mark.usefixtures("two_threads")
def test_waves_do_not_change_bits_with_several_cores(folder: Path) -> None:
    """An expert that comes alone in its wave must not get more cores, and other rounding, than beside others."""
    resident, model = from_pretrained(folder), from_pretrained(folder, expert_memory=SLOT_BYTES)
    ids = torch.randint(4, 96, (8, 60))
    with torch.no_grad():  # gradients would have the resident experts computed another way
        one, other = (m.get_encoder()(ids).last_hidden_state for m in (resident, model))
    assert torch.equal(one, other)


def test_bin_shards_and_half_precision_files(tmp_path: Path) -> None:
    model = tiny_model().to(torch.float16)
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    resident = from_pretrained(tmp_path, dtype="float32")
    buffered = from_pretrained(tmp_path, dtype="float32", expert_memory="30%")
    assert torch.equal(tokens(buffered), tokens(resident))
    report = buffered.moe.report()
    assert report.layers[0].cache.bytes_read["file"] == report.layers[0].cache.misses * EXPERT_BYTES // 2


def test_no_expert_is_in_memory_beside_the_slots(folder: Path) -> None:
    model = from_pretrained(folder, expert_memory="25%")
    report = model.moe.report()
    assert report.buffer.arena_bytes == report.buffer.slots * SLOT_BYTES <= report.expert_bytes // 4
    assert report.expert_bytes == 16 * EXPERT_BYTES
    held = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert held == {name for name, _ in model.named_parameters() if ".experts." in name}


def test_the_report_says_what_the_cache_did(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder, expert_memory="50%", report=str(tmp_path / "report.json"))
    tokens(model)
    report = model.moe.report()
    for layer in report.layers:
        cache = layer.cache
        assert cache.hits + cache.misses == round(layer.active_experts * layer.calls)
        assert cache.bytes_read == {"file": cache.misses * EXPERT_BYTES}
        assert cache.waves >= layer.calls and cache.stall_seconds >= 0
        assert set(cache.resident) <= set(range(8))
    assert sum(len(layer.cache.resident) for layer in report.layers) == report.buffer.slots
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["buffer"]["policy"] == "reuse"
    assert content["layers"][1]["cache"]["miss_rate"] == report.layers[1].cache.miss_rate


def test_on_a_cpu_nothing_is_computed_elsewhere(folder: Path) -> None:
    model = from_pretrained(folder, expert_memory="30%", host_memory="50%", host_compute="auto")
    assert torch.equal(logits(model, batch()), logits(from_pretrained(folder), batch()))
    report = model.moe.report()
    assert report.buffer.host_compute_rows == 0
    assert all(layer.cache.on_host == 0 for layer in report.layers)


@pytest.mark.parametrize("prefetch", ["off", "previous", "router"])
@pytest.mark.parametrize("host", ["0", "30%", "page-cache"])
def test_tiers_and_prefetch_change_no_token(folder: Path, prefetch: str, host: str) -> None:
    expected = tokens(from_pretrained(folder), num_beams=2)
    model = from_pretrained(folder, expert_memory="30%", prefetch=prefetch, host_memory=host)
    for _ in range(2):
        assert torch.equal(tokens(model, num_beams=2), expected)
    report = model.moe.report()
    assert report.buffer.host_bytes == (4 * SLOT_BYTES if host == "30%" else 0)
    tiers = {tier for layer in report.layers for tier in layer.cache.bytes_read}
    assert tiers == ({"file", "host"} if host == "30%" else {"file"})
    decoder = report.layers[1].cache
    assert (decoder.predicted > 0) == (prefetch != "off")
    assert 0 <= decoder.precision <= 1 and 0 <= decoder.recall <= 1


def test_guessing_leaves_the_router_logits_alone(folder: Path) -> None:
    model = from_pretrained(folder, expert_memory="30%", prefetch="router")
    with torch.no_grad():
        outputs = model(**batch(), output_router_logits=True)
    assert [tuple(one.shape) for one in outputs.decoder_router_logits] == [(15, 8)]


def test_a_trace_warms_the_slots(folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "trace.json")
    first = from_pretrained(folder, expert_memory="50%", trace=path, prefetch="off")
    expected = tokens(first)
    trace = read_trace(path)
    assert [layer.num_experts for layer in trace.layers] == [8, 8]
    assert len(trace.phase("decoder")) == 8
    warm = from_pretrained(folder, expert_memory="50%", warm_start=path, prefetch="off")
    sized = from_pretrained(folder, expert_memory="50%", warm_start=path, expert_pool="layer", prefetch="off")
    for model in (warm, sized):
        assert torch.equal(tokens(model), expected)
        now, before = (m.moe.report().layers for m in (model, first))
        assert sum(layer.cache.misses for layer in now) < sum(layer.cache.misses for layer in before)
    with pytest.raises(CheckpointError, match=r"trace\.json: was recorded from another model"):
        write_trace(Trace(trace.layers[:1], ()), path)
        from_pretrained(folder, expert_memory="50%", warm_start=path)


def test_what_the_simulation_says_is_what_the_model_does(folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "trace.json")
    for eviction in POLICIES:
        model = from_pretrained(folder, expert_memory="40%", eviction=eviction, prefetch="off", trace=path)
        tokens(model, num_beams=2)
        report = model.moe.report()
        foretold = simulate(read_trace(path).visits, report.buffer.slots, eviction)
        for layer in report.layers:
            assert (layer.cache.hits, layer.cache.misses) == (foretold[layer.name].hits, foretold[layer.name].misses)


def test_two_models_and_two_threads(folder: Path) -> None:
    expected = tokens(from_pretrained(folder), num_beams=2)
    models = [from_pretrained(folder, expert_memory="20%"), from_pretrained(folder, expert_memory="60%")]
    found: list[bool] = []

    def run(model: Any) -> None:
        inputs = batch()
        for _ in range(3):
            with torch.no_grad():
                result = type(model).generate(
                    model,
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    min_new_tokens=8,
                    max_new_tokens=8,
                    num_beams=2,
                )
            found.append(torch.equal(result, expected))

    threads = [threading.Thread(target=run, args=(models[index % 2],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12


def test_undo_reads_the_experts_back(folder: Path) -> None:
    model = from_pretrained(folder, expert_memory="25%")
    before = tokens(model)
    model.moe.undo()
    expected = tiny_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    optimize(model)
    assert torch.equal(tokens(model), before)


def test_undo_refuses_what_does_not_fit_and_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_pretrained(folder, expert_memory="25%")
    before = tokens(model)
    monkeypatch.setattr("hf_integration.buffered.available_memory", lambda device: 1000)
    with pytest.raises(MoEError, match=r"undo would read all experts into memory: 197\.0 KiB, of which 1000 B"):
        model.moe.undo()
    assert model.moe.active and torch.equal(tokens(model), before)
    monkeypatch.undo()
    model.moe.undo()
    assert not hasattr(model, "moe")


def test_a_copy_shares_the_experts(folder: Path) -> None:
    model = from_pretrained(folder, expert_memory="25%")
    other = copy.deepcopy(model)
    assert torch.equal(tokens(other), tokens(model))
    assert other.moe is not model.moe


def test_what_it_cannot_do_is_said(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder, expert_memory="25%")
    with pytest.raises(MoEError, match="no complete state dict to save"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(MoEError, match=r"buffered on cpu in torch\.float32: load it again"):
        model.to(torch.bfloat16)
    with pytest.raises(MoEError, match="cannot be pickled"):
        pickle.dumps(model)
    assert model.to("cpu") is model
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(MoEError, match=r"gradients are wanted, but buffered experts.*torch\.no_grad"):
        model(**batch())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too small": (
        {"expert_memory": 5000},
        r"expert_memory.*'5000' has no room for one expert.*possible is 12608 bytes",
    ),
    "too small a layer": (
        {"expert_memory": SLOT_BYTES, "expert_pool": "layer"},
        r"no room for 2 experts \(one a layer\): the smallest possible is 25216 bytes",
    ),
    "no size": ({"expert_memory": "many"}, r"'many' is not a size like 2GiB"),
    "packed kernel": ({"expert_memory": "25%", "kernel": "grouped_mm"}, "use kernel='loop'"),
    "eviction of nothing": ({"eviction": "lifo"}, r"'eviction': 'lifo' has no effect with expert_memory='all'"),
    "prefetch of nothing": ({"prefetch": "off"}, "'prefetch': 'off' has no effect"),
    "host computing of nothing": ({"host_compute": "auto"}, "'host_compute': 'auto' has no effect with expert_mem"),
    "host computing without a tier": (
        {"expert_memory": "25%", "host_compute": "auto", "host_memory": "page-cache"},
        "'auto' has no effect with host_memory='page-cache'; give host_memory a size",
    ),
    "host computing of padded rows": (
        {"expert_memory": "25%", "host_compute": "auto", "host_memory": "50%", "gating": "static"},
        "'auto' has no effect with gating='static'",
    ),
    "unknown eviction": ({"expert_memory": "25%", "eviction": "belady"}, "not one of auto, reuse, lfru"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_refused_before_a_weight_is_read(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("hf_integration.loading.read_tensor", fail)
    options, message = REFUSED[case]
    with pytest.raises(OptionError, match=message):
        from_pretrained(folder, **options)


def test_a_loaded_model_on_a_cpu_has_nothing_to_save() -> None:
    with pytest.raises(OptionError, match=r"would save nothing.*from_pretrained\(folder, expert_memory"):
        optimize(tiny_model(), expert_memory="25%")


def test_a_fault_of_the_file_passes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = from_pretrained(tmp_path, expert_memory="20%")
    expected = tokens(model)
    good = path.read_bytes()
    path.write_bytes(good[:-100_000])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: has .* expert \d+ of model\.encoder\.layers\.1\.ffn"
    ):
        tokens(model)
    path.write_bytes(good)
    assert torch.equal(tokens(model), expected)


def test_every_expert_is_found_in_the_index(folder: Path) -> None:
    assert sum(".experts." in name for name in open_index(folder)) == 2 * 8 * 4
