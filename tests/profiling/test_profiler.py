"""A profiler on whole models: its components add up, a slow part shows where it is, and nothing is left behind."""

from __future__ import annotations

import copy
import json
import pickle
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_integration
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe import MoELayer
from fairseq_moe_opt.moe.kernels import get_kernel
from fairseq_moe_opt.moe.trace import read_trace
from fairseq_moe_opt.profiling import ALL_CALLS, Profile, Profiler, clock, experts, write_profile
from fairseq_moe_opt.profiling.clock import ATTENTION, EXPERTS, FETCH, GATE, REST
from fairseq_moe_opt.profiling.findings import findings
from hf_integration.reading import read_lines
from tests.helpers.translation_models import nllb_moe, word_tokenizer

pytest.importorskip("matplotlib")

ENCODER, DECODER = "model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"
NAP = 0.5


def inputs(seed: int = 0, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 36, (rows, 9), generator=generator)


def generate(model: Any, seed: int = 0, **how: Any) -> Tensor:
    ids: Tensor = model.generate(input_ids=inputs(seed), num_beams=1, do_sample=False, **{"max_new_tokens": 8, **how})
    return ids


@pytest.fixture
def model() -> Any:
    made = nllb_moe()
    hf_integration.optimize(made)
    return made


@pytest.fixture
def profiler(model: Any) -> Iterator[Profiler]:
    found = model.moe.profiler()
    found.attach()
    yield found
    found.detach()


def layer_of(model: Any, name: str) -> MoELayer:
    return next(layer for layer in model.moe._installed.layers if layer.counters.name == name)


def test_components_add_up_to_the_whole(model: Any, profiler: Profiler) -> None:
    with profiler.input("a"):
        generate(model)
    times = profiler.inputs[0].times
    assert len(times.forwards["encoder"]) == 1 and len(times.forwards["decoder"]) >= 7
    for phase in ("encoder", "decoder"):
        components = times.components(phase)
        assert all(components[name] > 0 for name in (GATE, EXPERTS, ATTENTION, REST))
        assert sum(components.values()) == pytest.approx(times.whole(phase), rel=0.05)
        # Nothing was sent anywhere.
        assert components["exchange sizes"] == components["exchange tokens"] == 0


def test_the_whole_is_what_a_watch_beside_it_shows(model: Any, profiler: Profiler) -> None:
    def around(module: Any, seen: list[float]) -> Callable[..., Any]:
        forward = module.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                seen.append(time.perf_counter() - start)

        return timed

    encoder, seen = model.get_encoder(), []
    encoder.forward = around(encoder, seen)
    with profiler.input("a"):
        for seed in range(5):
            generate(model, seed, max_new_tokens=1)
    # Each forward apart, so that a pause of the machine between two readings spoils one of them at most.
    pairs = zip(profiler.inputs[0].times.forwards["encoder"], seen, strict=True)
    assert sorted(whole / outside for whole, outside in pairs)[2] == pytest.approx(1, rel=0.05)


class Naps:
    """Time as a thread alone on its core would see it: what it computed, and naps that nobody has to wait for."""

    def __init__(self) -> None:
        self._napped = 0.0

    def take(self) -> None:
        self._napped += NAP

    def now(self) -> float:
        return time.thread_time() + self._napped


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Naps:
    found = Naps()
    for module in (clock, experts):
        monkeypatch.setattr(module, "perf_counter", found.now)
    return found


class _SlowKernel:
    """The loop kernel with one expert that naps."""

    def __init__(self, expert: int, naps: Naps) -> None:
        self._expert, self._naps, self._loop = expert, naps, get_kernel("loop")
        self.name, self.needs_packed = "loop", False

    def run(self, rows: Tensor, segments: Any, *rest: Any) -> None:
        if any(segment.expert == self._expert for segment in segments):
            self._naps.take()
        self._loop.run(rows, segments, *rest)


def test_a_planted_slow_expert_shows_in_its_component_layer_and_number(
    model: Any, profiler: Profiler, naps: Naps, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler.begin("before")
    generate(model)
    trace = profiler.inputs[0].trace
    used = [expert for visit in trace.visits if visit.layer == DECODER for expert in visit.experts]
    slow = max(set(used), key=used.count)
    kernel = _SlowKernel(slow, naps)
    monkeypatch.setattr(layer_of(model, DECODER), "_kernel", lambda _: kernel)
    with profiler.input("after"):
        generate(model)
    found = profiler.inputs[1].times
    napped = NAP * used.count(slow)
    assert found.of_layer(DECODER)[EXPERTS] >= napped
    others = [seconds for key, seconds in found.seconds.items() if (key.place, key.component) != (DECODER, EXPERTS)]
    assert max(others) < napped / 2
    profiler.current = None
    with profiler.one_by_one():
        generate(model)
    # Others may be slow now and then, where the machine has something else to do; none is as slow.
    slowest = max(profiler.expert_times, key=lambda one: one.seconds)
    assert slowest.is_slow and (slowest.layer, slowest.expert) == (DECODER, slow)


def test_slow_weights_show_as_fetching(
    model: Any, profiler: Profiler, naps: Naps, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = layer_of(model, ENCODER).store
    waves = store.waves

    def late(*args: Any, **kwargs: Any) -> Any:
        naps.take()
        yield from waves(*args, **kwargs)

    monkeypatch.setattr(store, "waves", late)
    with profiler.input("a"):
        generate(model)
    seconds = profiler.inputs[0].times.of_layer(ENCODER)
    assert seconds[FETCH] >= NAP > seconds[EXPERTS]


def test_off_leaves_nothing(model: Any) -> None:
    def state() -> list[Any]:
        modules = [
            (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ]
        layers = [
            (layer._observers, layer.counters.watch, layer.counters.expert_watch)
            for layer in model.moe._installed.layers
        ]
        return [modules, layers]

    before, expected = state(), generate(model)
    profiler = model.moe.profiler()
    profiler.attach()
    profiler.attach()
    assert state() != before and profiler.is_attached
    with profiler.input("a"):
        assert torch.equal(generate(model), expected)
    profiler.detach()
    assert state() == before and not profiler.is_attached
    rows = profiler.inputs[0].trace.visits
    assert torch.equal(generate(model), expected) and profiler.inputs[0].trace.visits == rows


def test_memory_of_one_forward_is_that_of_its_tensors(model: Any, profiler: Profiler) -> None:
    profiler.record_memory()
    with profiler.input("a"):
        generate(model, max_new_tokens=12)
        generate(model, max_new_tokens=12)
    assert set(profiler.timelines) == {"encoder", "decoder"}
    # 36 rows of width 64 in float32 are there in the dense network, 36 * 2 of 32 and one of zeros in the sparse one.
    peaks = profiler.timelines["encoder"].peaks()
    assert peaks[REST] >= 36 * 64 * 4 and peaks["dispatch"] >= 36 * 2 * 32 * 4
    assert profiler.timelines["encoder"].peak.nbytes < 2**20
    # The forwards that were recorded are not timed.
    times = profiler.inputs[0].times
    assert len(times.forwards["encoder"]) == 1
    recorded = [visit for visit in profiler.inputs[0].trace.visits if visit.layer == DECODER]
    assert len(times.forwards["decoder"]) == len(recorded) - 1


def test_a_report_is_whole_and_self_contained(model: Any, profiler: Profiler, tmp_path: Path) -> None:
    profiler.record_memory()
    for seed in range(2):
        generate(model, seed)
    with profiler.one_by_one():
        generate(model)
    for seed, label in enumerate(("first", "second & <last>")):
        with profiler.input(label):
            generate(model, seed)
    profile = model.moe.profile_of(profiler)
    written = write_profile(profile, tmp_path / "out")
    names = {path.name for path in written}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    kinds = ("heat", "loads", "correlation")
    assert pictures == {f"{kind}-{phase}.png" for kind in kinds for phase in ("encoder", "decoder")} | {
        f"{name}.png" for name in ("time", "memory", "skew", "reuse", "experts")
    }
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == page.count("<img ") == len(pictures)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(|<script|<link""", page)
    assert "second &amp; &lt;last&gt;" in page and "second & <last>" not in page
    content = json.loads((tmp_path / "out" / "profile.json").read_text(encoding="utf-8"))
    assert content["findings"] == findings(profile)
    assert [one["label"] for one in content["inputs"]] == ["first", "second & <last>"]
    assert content["layers"][0] == {
        "name": ENCODER,
        "phase": "encoder",
        "num_experts": 8,
        "top_k": 2,
        "capacity_fraction": 1.0,
        "waste_factor": 4.0,
    }
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert content["memory"]["weight_bytes"] >= weights
    assert content["memory"]["expert_bytes"] == 2 * 8 * (2 * 32 * 64 + 32 + 64) * 4
    trace = read_trace(tmp_path / "out" / "trace-first.json")
    assert trace == profile.inputs[0].trace
    # A second profile, of nothing, leaves nothing of the first.
    nothing = Profile.of(model.moe.profiler(), {}, profile.weights)
    again = write_profile(nothing, tmp_path / "out")
    assert {path.name for path in again} == {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in again} == {"index.html", "profile.json"}


def test_an_option_profiles_everything_until_undone(tmp_path: Path) -> None:
    model = nllb_moe()
    handle = hf_integration.optimize(model, profile=str(tmp_path / "out"))
    expected = generate(model)
    with handle.profile_input("second"):
        assert torch.equal(generate(model), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(generate(copied), expected)
    assert pickle.loads(pickle.dumps(model.moe._profiler)).inputs == []
    handle.undo()
    content = json.loads((tmp_path / "out" / "profile.json").read_text(encoding="utf-8"))
    assert [one["label"] for one in content["inputs"]] == [ALL_CALLS, "second"]
    assert all(one["seconds"] > 0 and one["phases"]["decoder"]["forwards"] for one in content["inputs"])
    assert not hasattr(model, "moe") and all("forward" not in vars(module) for module in model.modules())


def test_wrong_folders_and_words_are_refused(tmp_path: Path, model: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="is a file; a folder is wanted"):
        hf_integration.optimize(nllb_moe(), profile=str(tmp_path / "file"))
    for word in ("yes", "True", " "):
        with pytest.raises(OptionError, match="is not true or false, nor a folder"):
            hf_integration.optimize(nllb_moe(), profile=word)
    with pytest.raises(OptionError, match="names no folder"), model.moe.profile_input("a"):
        pass


def test_static_gating_is_timed_step_by_step() -> None:
    model = nllb_moe()
    handle = hf_integration.optimize(model, gating="static")
    profiler = handle.profiler()
    profiler.attach()
    with profiler.input("a"):
        generate(model)
    seconds = profiler.inputs[0].times.of_layer(DECODER)
    assert all(seconds[name] > 0 for name in (GATE, "dispatch", EXPERTS, "combine"))


class _Reader(torch.nn.Module):
    """Notes what a language model would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"max_position_embeddings": 3})()
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> None:
        self.seen.append((tuple(input_ids.shape), int(attention_mask.sum())))


def test_a_language_model_reads_all_lines() -> None:
    reader, done = _Reader(), []
    read_lines(reader, word_tokenizer(), ["cat", "", "dog cat", "cat dog cat dog"], 2, done.append)
    # Ends of sentences count; the longest line is cut to three positions.
    assert reader.seen == [((2, 3), 6), ((1, 2), 2)] and sum(done) == 4
