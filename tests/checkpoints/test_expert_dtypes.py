"""Experts converted to int8 or bfloat16: names, shapes, notes, and how far the weights are from what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fairseq_moe_opt.checkpoints import convert, open_index
from fairseq_moe_opt.checkpoints.expert_dtypes import is_scale, scale_of
from fairseq_moe_opt.errors import CheckpointError, OptionError
from tests.helpers.checkpoint_files import E, F, M, fairseq_state, save_fairseq, save_sharded

EXPERT = "model.decoder.layers.0.ffn.experts.expert_3"


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    """A converted folder, all float32."""
    convert(save_fairseq(tmp_path / "x.pt", fairseq_state()), tmp_path / "floats")
    return tmp_path / "floats"


@pytest.mark.parametrize("source", ["fairseq", "hf"])
def test_int8_from_either_kind_of_source(tmp_path: Path, floats: Path, source: str) -> None:
    path = save_sharded(tmp_path, 2) if source == "fairseq" else floats
    done = convert(path, tmp_path / "int8", expert_dtype="int8")
    before, after = written(floats), written(tmp_path / "int8")
    scales = {name for name in after if name.endswith("_scale")}
    # Two layers, E experts, two matrices each.
    assert len(scales) == 2 * E * 2
    assert set(after) - scales == set(before)
    assert after[f"{EXPERT}.fc1.weight"].dtype == torch.int8
    assert after[f"{EXPERT}.fc1.weight"].shape == (F, M)
    assert after[f"{EXPERT}.fc1.weight_scale"].dtype == torch.float32
    assert after[f"{EXPERT}.fc1.weight_scale"].shape == (F,)
    for name, tensor in before.items():
        scale = after.get(f"{name}_scale")
        if scale is None:
            assert torch.equal(after[name], tensor), name
        else:
            error = (after[name].double() * scale.double()[:, None] - tensor.double()).abs()
            assert bool((error <= scale.double()[:, None] * (0.5 + 1e-5)).all()), name
    assert metadata_of(tmp_path / "int8" / "model.safetensors") == {"format": "pt", "expert_dtype": "int8"}
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["expert_dtype"] == "int8"
    assert config["dtype"] == "float32"
    assert done.nbytes == sum(tensor.nbytes for tensor in after.values())
    assert done.tensors == len(after)


def test_bf16_is_of_the_experts_alone(tmp_path: Path, floats: Path) -> None:
    convert(floats, tmp_path / "bf16", expert_dtype="bf16")
    for name, tensor in written(tmp_path / "bf16").items():
        assert tensor.dtype == (torch.bfloat16 if ".experts." in name else torch.float32), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["expert_dtype"] == "bf16"
    assert metadata_of(tmp_path / "bf16" / "model.safetensors")["expert_dtype"] == "bf16"


def test_the_rest_may_have_another_dtype_too(tmp_path: Path, floats: Path) -> None:
    convert(floats, tmp_path / "int8", dtype="bfloat16", expert_dtype="int8")
    after = written(tmp_path / "int8")
    assert after[f"{EXPERT}.fc1.weight_scale"].dtype == torch.float32
    assert {tensor.dtype for name, tensor in after.items() if name.endswith("bias")} == {torch.bfloat16}
    # Quantised from the weights as they were, not from rounded ones.
    convert(floats, tmp_path / "alone", expert_dtype="int8")
    assert torch.equal(written(tmp_path / "alone")[f"{EXPERT}.fc1.weight"], after[f"{EXPERT}.fc1.weight"])


def test_shards_of_int8_are_bounded(tmp_path: Path, floats: Path) -> None:
    done = convert(floats, tmp_path / "int8", expert_dtype="int8", shard_bytes=1000)
    assert len(done.files) > 3
    assert all(metadata_of(file)["expert_dtype"] == "int8" for file in done.files)
    index = open_index(tmp_path / "int8")
    assert scale_of(index, f"{EXPERT}.fc2.weight").shape == (M,)


def test_int8_folders_are_copied_as_they_are(tmp_path: Path, floats: Path) -> None:
    convert(floats, tmp_path / "int8", expert_dtype="int8")
    convert(tmp_path / "int8", tmp_path / "copy", dtype="bfloat16")
    before, after = written(tmp_path / "int8"), written(tmp_path / "copy")
    for name in before:
        same = before[name].dtype == torch.int8 or name.endswith("_scale")
        assert torch.equal(after[name], before[name] if same else before[name].bfloat16()), name
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["expert_dtype"] == "int8"
    assert metadata_of(tmp_path / "copy" / "model.safetensors")["expert_dtype"] == "int8"


def test_a_note_that_is_no_longer_true_goes(tmp_path: Path, floats: Path) -> None:
    convert(floats, tmp_path / "bf16", expert_dtype="bf16")
    convert(tmp_path / "bf16", tmp_path / "copy")
    convert(tmp_path / "bf16", tmp_path / "wide", dtype="float32")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["expert_dtype"] == "bf16"
    assert "expert_dtype" not in json.loads((tmp_path / "wide" / "config.json").read_text())


def test_refusals(tmp_path: Path, floats: Path) -> None:
    with pytest.raises(OptionError, match=r"'expert_dtype': 'int4' is not one of bf16, int8"):
        convert(floats, tmp_path / "out", expert_dtype="int4")
    convert(floats, tmp_path / "int8", expert_dtype="int8")
    for wanted in ("bf16", "int8"):
        with pytest.raises(CheckpointError, match="int8: its experts are int8 already"):
            convert(tmp_path / "int8", tmp_path / "out", expert_dtype=wanted)
    with pytest.raises(CheckpointError, match="int8: its experts are int8, which fairseq cannot hold"):
        convert(tmp_path / "int8", tmp_path / "out.pt", to="fairseq")
    with pytest.raises(OptionError, match=r"'expert_dtype': only a Transformers folder .* to='hf'"):
        convert(floats, tmp_path / "out.pt", to="fairseq", expert_dtype="int8")
    dense = tmp_path / "dense"
    dense.mkdir()
    torch.save({"model.decoder.layers.0.fc1.weight": torch.ones(2, 2)}, dense / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="dense: has no experts that could become int8"):
        convert(dense, tmp_path / "out", expert_dtype="int8")
    broken = fairseq_state()
    broken["decoder.layers.0.moe_layer.experts.1.fc1.weight"][0, 0] = float("nan")
    with pytest.raises(OptionError, match="infinite or not a number"):
        convert(save_fairseq(tmp_path / "nan.pt", broken), tmp_path / "out", expert_dtype="int8")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.pt").exists()


def test_missing_and_misshapen_scales_are_named(tmp_path: Path) -> None:
    weights = {"a.weight": torch.zeros(3, 2, dtype=torch.int8), "b.weight": torch.zeros(3, 2, dtype=torch.int8)}
    torch.save({**weights, "b.weight_scale": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    index = open_index(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: has int8 weights 'a.weight' without their scales"):
        scale_of(index, "a.weight")
    with pytest.raises(CheckpointError, match=r"'b.weight_scale' has shape \(2,\), the weights ask for \(3,\)"):
        scale_of(index, "b.weight")
    assert is_scale(index, "b.weight_scale")
    assert not is_scale(index, "a.weight")
