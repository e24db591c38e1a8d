"""Experts with a dtype of their own in a whole model: loaded either way, saved, undone, generating; and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import NllbMoeForConditionalGeneration

from fairseq_moe_opt.checkpoints import convert, open_index
from fairseq_moe_opt.errors import CheckpointError, KernelError, OptionError
from fairseq_moe_opt.moe.int8_linear import Int8Linear
from hf_integration import from_pretrained, optimize
from tests.helpers.nllb import batch, logits, tiny_model

EXPERT = "model.encoder.layers.1.ffn.experts.expert_2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "floats")
    return tmp_path / "floats"


@pytest.fixture
def int8_folder(folder: Path) -> Path:
    convert(folder, folder.parent / "int8", expert_dtype="int8")
    return folder.parent / "int8"


def distance(one: nn.Module, other: nn.Module) -> float:
    return float((logits(one, batch()) - logits(other, batch())).abs().max())  # type: ignore[arg-type]


def test_quantised_while_loading_or_by_conversion_is_the_same(folder: Path, int8_folder: Path) -> None:
    loaded, converted = from_pretrained(folder, expert_dtype="int8"), from_pretrained(int8_folder)
    one, other = loaded.state_dict(), converted.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(loaded, batch()), logits(converted, batch()))
    again = from_pretrained(int8_folder, expert_dtype="int8")
    assert torch.equal(logits(again, batch()), logits(converted, batch()))
    assert again.moe.options.expert_dtype == "int8"


def test_logits_are_near_those_of_floats(folder: Path) -> None:
    reference = from_pretrained(folder)
    scale = float(logits(reference, batch()).abs().max())
    assert 0 < distance(from_pretrained(folder, expert_dtype="int8"), reference) < 0.02 * scale
    assert 0 < distance(from_pretrained(folder, expert_dtype="bf16"), reference) < 0.02 * scale


def test_experts_take_a_quarter_of_the_memory(folder: Path) -> None:
    floats, model = from_pretrained(folder), from_pretrained(folder, expert_dtype="int8")
    matrices = sum(p.numel() for name, p in floats.named_parameters() if ".experts." in name and p.dim() == 2)
    saved = floats.moe.report().expert_bytes - model.moe.report().expert_bytes
    channels = sum(b.numel() for name, b in model.named_buffers() if name.endswith("weight_scale"))
    assert saved == 3 * matrices - 4 * channels
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert sum(t.nbytes for t in (*floats.parameters(), *floats.buffers())) - held == saved
    assert model.config.dtype == torch.float32
    assert (
        from_pretrained(folder, expert_dtype="bf16").moe.report().expert_bytes * 2 == floats.moe.report().expert_bytes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"kernel": "naive"}, {"kernel": "loop"}, {"gating": "static"}], ids=str)
def test_every_way_generates(int8_folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = from_pretrained(int8_folder, dtype=dtype, **options)
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=8, num_beams=1, do_sample=False)
    reference = from_pretrained(int8_folder, dtype=dtype, kernel="naive")
    if dtype == torch.float32:
        assert torch.equal(tokens, reference.generate(**inputs, max_new_tokens=8, num_beams=1, do_sample=False))
    assert tokens.shape[0] == 3
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert distance(model, reference) < tolerance * float(logits(reference, batch()).abs().max())


def test_gradients_pass_the_experts_and_reach_all_else(int8_folder: Path) -> None:
    model = from_pretrained(int8_folder)
    assert not any(".experts." in name and name.endswith("weight") for name, _ in model.named_parameters())
    model(**batch()).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert model.get_submodule(EXPERT).fc1.bias.grad is not None


def test_saved_models_load_as_they_were(folder: Path, tmp_path: Path) -> None:
    for name in ("int8", "bf16"):
        model = from_pretrained(folder, expert_dtype=name)
        model.save_pretrained(tmp_path / name)
        index = open_index(tmp_path / name)
        wanted = {"int8": torch.int8, "bf16": torch.bfloat16}[name]
        assert index[f"{EXPERT}.fc1.weight"].dtype == wanted
        assert (f"{EXPERT}.fc1.weight_scale" in index) == (name == "int8")
        assert json.loads((tmp_path / name / "config.json").read_text())["expert_dtype"] == name
        again = from_pretrained(tmp_path / name)
        assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_undo_leaves_a_model_that_holds_int8_and_runs(int8_folder: Path) -> None:
    """What was lost when the weights were read does not come back; all that ``optimize`` did goes."""
    model = from_pretrained(int8_folder)
    expected, state = logits(model, batch()), {k: v.clone() for k, v in model.state_dict().items()}
    model.moe.undo()
    assert not hasattr(model, "moe")
    expert = model.get_submodule(EXPERT)
    assert isinstance(expert.fc1, Int8Linear)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    rows = torch.randn(3, expert.fc1.in_features)
    hidden = torch.relu(expert.fc1(rows))
    assert torch.equal(expert(rows), expert.fc2(hidden))
    optimize(model, expert_dtype="int8")
    assert torch.equal(logits(model, batch()), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, batch()), expected)


def test_codes_that_transformers_took_for_weights_are_refused(int8_folder: Path) -> None:
    model = NllbMoeForConditionalGeneration.from_pretrained(int8_folder)
    with pytest.raises(CheckpointError, match=r"int8: its experts are int8, .* load it with hf_integration"):
        optimize(model)


def test_refusals(folder: Path, int8_folder: Path) -> None:
    with pytest.raises(OptionError, match=r"'expert_dtype': the experts of .*int8 are int8"):
        from_pretrained(int8_folder, expert_dtype="bf16")
    with pytest.raises(OptionError, match=r"'expert_dtype': 'int8' takes effect where weights are read"):
        optimize(tiny_model(), expert_dtype="int8")
    with pytest.raises(KernelError, match=r"'grouped_mm' cannot run here: .*use kernel='loop'"):
        from_pretrained(int8_folder, kernel="grouped_mm")
    with pytest.raises(OptionError, match="is not one of checkpoint, bf16, int8"):
        from_pretrained(folder, expert_dtype="int4")
    tensors = load_file(int8_folder / "model.safetensors")
    tensors.pop(f"{EXPERT}.fc2.weight_scale")
    save_file(tensors, int8_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"has int8 weights '{EXPERT}.fc2.weight' without their scales"):
        from_pretrained(int8_folder)
