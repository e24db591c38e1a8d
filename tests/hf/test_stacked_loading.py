"""``from_pretrained`` of models behind the ``ExpertsInterface``: resident and buffered, from every stored form.

Checked with Transformers 5.6.0, 5.23.0 and 5.24.0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fairseq_moe_opt.checkpoints import open_index
from fairseq_moe_opt.errors import CheckpointError, MoEError, OptionError
from fairseq_moe_opt.moe.quantization import dequantize_rows, quantize_rows
from fairseq_moe_opt.moe.trace import read_trace
from hf_integration import from_pretrained, optimize
from hf_integration.experts_module import ExpertsModule, experts_modules
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import FAMILIES, greedy, language_model, letters_tokenizer, logits_of
from tests.helpers.releases import families

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of a family, as Transformers saves it."""

    @cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        language_model(family).save_pretrained(folder)
        return folder

    return save


@cache
def expected(family: str) -> tuple[Tensor, Tensor]:
    model = language_model(family)
    model.set_experts_implementation("eager")
    return logits_of(model), greedy(model)


def check(model: PreTrainedModel, family: str) -> None:
    logits, tokens = expected(family)
    assert_close_relative(logits_of(model), logits)
    assert torch.equal(greedy(model), tokens)


@pytest.mark.parametrize("family", families(FAMILIES))
def test_resident_and_buffered(saved: Saved, family: str) -> None:
    resident = from_pretrained(saved(family))
    check(resident, family)
    model = from_pretrained(saved(family), expert_memory="25%")
    check(model, family)
    report = model.moe.report()
    assert report.buffer is not None
    assert report.buffer.slots < report.buffer.experts
    assert report.expert_bytes == resident.moe.report().expert_bytes
    assert all(layer.cache is not None and layer.cache.misses > 0 for layer in report.layers)
    model.moe.undo()
    originals = dict(language_model(family).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, originals[name]), name
    check(model, family)


def test_how_the_families_are_stored(saved: Saved) -> None:
    """Both forms are met above: tensors of single experts, and stacks of all."""
    names = {family: set(open_index(saved(family))) for family in ("Mixtral", "Olmoe", "GptOss", "GraniteMoe")}
    assert "model.layers.0.block_sparse_moe.experts.7.w3.weight" in names["Mixtral"]
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in names["Olmoe"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names["GptOss"]
    assert any(name.endswith("input_linear.weight") for name in names["GraniteMoe"])


@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
@pytest.mark.parametrize("how", [{"host_memory": "50%"}, {"dtype": "bfloat16"}, {"kernel": "naive"}], ids=str)
def test_other_ways_to_buffer(saved: Saved, family: str, how: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "dtype" in how else torch.float32
    resident = from_pretrained(saved(family), dtype=dtype)
    model = from_pretrained(saved(family), expert_memory="30%", **how)
    assert logits_of(model).dtype == dtype
    assert_close_relative(logits_of(model), logits_of(resident), 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
def test_int8_experts_are_quantised_as_they_are_read(saved: Saved, family: str) -> None:
    model = from_pretrained(saved(family), expert_memory="100%", expert_dtype="int8")
    report = model.moe.report()
    resident = from_pretrained(saved(family))
    assert report.expert_bytes < resident.moe.report().expert_bytes / 2.5
    for _, module in experts_modules(resident):  # the floats that the codes stand for
        experts = ExpertsModule.of(module)
        for name, stack in experts.layout.views(experts.stacks()).items():
            if name.endswith("weight"):
                for matrix in stack.detach():
                    matrix.copy_(dequantize_rows(*quantize_rows(matrix)))
    assert_close_relative(logits_of(model), logits_of(resident))
    with pytest.raises(OptionError, match=r"expert_dtype.* expert_memory='100%'"):
        from_pretrained(saved(family), expert_dtype="int8")


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("how", [{}, {"host_memory": "50%"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffered_output_is_the_same_bit_for_bit(
    saved: Saved, family: str, how: dict[str, Any], dtype: torch.dtype
) -> None:
    resident = from_pretrained(saved(family), dtype=dtype)
    model = from_pretrained(saved(family), dtype=dtype, expert_memory="30%", **how)
    assert torch.equal(logits_of(model), logits_of(resident))
    kernels = {layer.kernels for layer in model.moe.report().layers}
    assert kernels == {layer.kernels for layer in resident.moe.report().layers}


def test_interleaved_halves_are_read_once(saved: Saved) -> None:
    """Gate and up of GPT-OSS take turns in the file: one read serves both."""
    model = from_pretrained(saved("GptOss"), expert_memory="100%")
    logits_of(model)
    size = model.moe.report().expert_bytes // 16
    for layer in model.moe.report().layers:
        assert layer.cache.misses > 0
        assert layer.cache.bytes_read["file"] == layer.cache.misses * size


def test_traces_of_a_run(saved: Saved, tmp_path: Path) -> None:
    model = from_pretrained(saved("Olmoe"), expert_memory="50%", trace=str(tmp_path / "trace.bin"))
    greedy(model)
    trace = read_trace(str(tmp_path / "trace.bin"))
    assert [layer.name for layer in trace.layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    warm = from_pretrained(saved("Olmoe"), expert_memory="50%", warm_start=str(tmp_path / "trace.bin"))
    check(warm, "Olmoe")


@pytest.mark.parametrize("memory", ["all", "40%"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_the_text_generation_pipeline(saved: Saved, family: str, memory: str) -> None:
    texts = []
    for model in (language_model(family), from_pretrained(saved(family), expert_memory=memory)):
        model.generation_config.eos_token_id = None
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=letters_tokenizer())
        texts.append(pipe(["a b c", "d e"], max_new_tokens=6, do_sample=False, batch_size=2))
    assert texts[0] == texts[1]
    assert all(layer.routed_rows > 0 for layer in model.moe.report().layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuned_checkpoints_in_shards(family: str, tmp_path: Path) -> None:
    """Weights after two steps of training, saved by the model itself in many files. Checked with 5.23.0."""
    model = language_model(family)
    tuned = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.arange(3, 27).view(2, 12)
    for _ in range(2):
        tuned.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        tuned.step()
    before, logits, tokens = expected(family)[0], logits_of(model), greedy(model)
    assert float((before - logits).abs().max() / logits.abs().max()) > 1e-3
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    for memory in ("all", "25%"):
        loaded = from_pretrained(tmp_path, expert_memory=memory)
        assert_close_relative(logits_of(loaded), logits)
        assert torch.equal(greedy(loaded), tokens)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_an_optimised_model_that_was_trained_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = language_model(family)
    optimize(model)
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    logits = logits_of(model)
    model.save_pretrained(tmp_path)
    for memory in ("all", "25%"):
        assert_close_relative(logits_of(from_pretrained(tmp_path, expert_memory=memory)), logits)


def test_what_a_buffered_model_cannot_do(saved: Saved) -> None:
    model = from_pretrained(saved("Mixtral"), expert_memory="25%")
    with pytest.raises(MoEError, match="buffered, so it has no complete state dict"):
        model.state_dict()
    with pytest.raises(MoEError, match="load it again"):
        model.half()
    with pytest.raises(OptionError, match=r"prefetch.*'previous'"):
        from_pretrained(saved("Mixtral"), expert_memory="25%", prefetch="router")


def test_checkpoints_that_lack_something(saved: Saved, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    for lost, how in (("experts.3.w1", "25%"), ("input_layernorm", "25%"), ("input_layernorm", "all")):
        folder = tmp_path / f"{lost}-{how}"
        shutil.copytree(saved("Mixtral"), folder)
        tensors = load_file(folder / "model.safetensors")
        gone = next(name for name in tensors if lost in name)
        save_file({k: v for k, v in tensors.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks|has 7 tensors"):
            from_pretrained(folder, expert_memory=how)
