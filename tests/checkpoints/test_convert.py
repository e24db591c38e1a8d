"""``convert``: what it writes loads in Transformers, is bounded in size, and is never half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fairseq_moe_opt.checkpoints import convert, open_index, read_tensor
from fairseq_moe_opt.errors import CheckpointError, OptionError
from tests.helpers.checkpoint_files import fairseq_state, save_fairseq, save_sharded
from tests.helpers.goldens import DATA, FAIRSEQ_GOLDENS

EXAMPLE = DATA.parents[1] / "examples" / "demo" / "model"


def test_fairseq_shards_become_one_folder(tmp_path: Path) -> None:
    done = convert(save_sharded(tmp_path, 2), tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    state = fairseq_state()
    assert torch.equal(written["model.shared.weight"], state["encoder.embed_tokens.weight"])
    assert torch.equal(
        written["model.decoder.layers.0.ffn.experts.expert_3.fc1.weight"],
        state["decoder.layers.0.moe_layer.experts.3.fc1.weight"],
    )
    assert done.tensors == len(written) == len(state) - 4
    assert done.nbytes == sum(tensor.numel() * 4 for tensor in written.values())
    assert done.tokenizer is None
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "golden", ["A_top2_eom/checkpoint_last.pt", "A_top2_eom/checkpoint_single.pt", "F_multilingual"]
)
def test_transformers_finds_every_weight(tmp_path: Path, golden: str) -> None:
    transformers = pytest.importorskip("transformers")
    convert(FAIRSEQ_GOLDENS / golden, tmp_path / "hf")
    model, info = transformers.NllbMoeForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    assert model.lm_head.weight.data_ptr() == model.model.shared.weight.data_ptr()
    assert model.generation_config.decoder_start_token_id == 2


def test_dtype_is_converted_for_floats(tmp_path: Path) -> None:
    path = save_fairseq(tmp_path / "x.pt", fairseq_state())
    convert(path, tmp_path / "hf", dtype="bfloat16")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    expected = fairseq_state()["encoder.layer_norm.bias"].to(torch.bfloat16)
    assert torch.equal(written["model.encoder.layer_norm.bias"], expected)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    path = save_fairseq(tmp_path / "x.pt", fairseq_state())
    done = convert(path, tmp_path / "hf", shard_bytes=2000)
    assert len(done.files) > 3
    for file in done.files:
        with safe_open(file, "pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 2000 or len(sizes) == 1
    convert(path, tmp_path / "whole")
    shards, whole = open_index(tmp_path / "hf"), open_index(tmp_path / "whole")
    assert set(shards) == set(whole)
    assert all(torch.equal(read_tensor(shards[name]), read_tensor(whole[name])) for name in whole)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_folder_becomes_safetensors(tmp_path: Path, legacy: bool) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    shared = torch.randn(5, 2)
    state = {"model.shared.weight": shared, "lm_head.weight": shared, "other": torch.ones(3)[::2]}
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (source / "config.json").write_text('{"model_type": "nllb-moe", "torch_dtype": "float32"}')
    (source / "tokenizer.json").write_text("{}")
    done = convert(source, tmp_path / "hf", dtype="float16")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(written) == {"model.shared.weight", "other"}
    assert torch.equal(written["model.shared.weight"], shared.half())
    assert done.tokenizer == "copied"
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {"model_type": "nllb-moe", "dtype": "float16"}


def test_legacy_shards_of_bin_and_fairseq(tmp_path: Path) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    halves = {"a": torch.ones(2)}, {"b": torch.zeros(2)}
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    torch.save(halves[0], source / names[0], _use_new_zipfile_serialization=False)
    torch.save(halves[1], source / names[1])
    weight_map = {"a": names[0], "b": names[1]}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "hf")
    assert set(open_index(tmp_path / "hf")) == {"a", "b"}
    fairseq = save_fairseq(tmp_path / "x.pt", fairseq_state())
    content = torch.load(fairseq, weights_only=False)
    torch.save(content, fairseq, _use_new_zipfile_serialization=False)
    convert(fairseq, tmp_path / "from_fairseq")
    expected = fairseq_state()["encoder.layer_norm.bias"]
    assert torch.equal(read_tensor(open_index(tmp_path / "from_fairseq")["model.encoder.layer_norm.bias"]), expected)


def test_legacy_file_with_foreign_content_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Path("y")}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"x\.bin: cannot be loaded: "):
        convert(tmp_path / "x.bin", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_destination_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    path = save_fairseq(tmp_path / "x.pt", fairseq_state())
    target = tmp_path / "hf"
    target.mkdir()
    convert(path, target)
    before = sorted(file.name for file in target.iterdir())
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        convert(path, target)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(path, path)
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(path, tmp_path / "no" / "hf")
    assert sorted(file.name for file in target.iterdir()) == before


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    path = save_fairseq(tmp_path / "x.pt", fairseq_state())
    (tmp_path / "dict.txt").write_text("not a dictionary\n")
    shutil.copyfile(DATA / "demo_small" / "spm.model", tmp_path / "spm.model")
    with pytest.raises(CheckpointError, match=r"dict\.txt: is not a fairseq dictionary: line 1"):
        convert(path, tmp_path / "hf")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["dict.txt", "spm.model", "x.pt"]


def test_refusals_of_arguments_and_models(tmp_path: Path) -> None:
    path = save_fairseq(tmp_path / "x.pt", fairseq_state())
    with pytest.raises(OptionError, match="'int8' is not one of float16, bfloat16, float32"):
        convert(path, tmp_path / "hf", dtype="int8")
    with pytest.raises(OptionError, match="'onnx' is not a format"):
        convert(path, tmp_path / "hf", to="onnx")
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nothing.pt", tmp_path / "hf")
    for golden, said in (("C_top1", "top-1"), ("D_cmr", "conditional MoE")):
        with pytest.raises(CheckpointError, match=f"cannot express .*{said}"):
            convert(FAIRSEQ_GOLDENS / golden, tmp_path / "hf")
    untied = fairseq_state() | {"decoder.output_projection.weight": torch.ones(11, 8)}
    with pytest.raises(CheckpointError, match=r"untied embeddings: decoder.output_projection.weight differs"):
        convert(save_fairseq(tmp_path / "u.pt", untied), tmp_path / "hf")


def test_the_example_model_is_complete() -> None:
    index = open_index(EXAMPLE)
    config = json.loads((EXAMPLE / "config.json").read_text())
    assert {record.dtype for record in index.values()} == {torch.float16}
    assert index["model.shared.weight"].shape == (config["vocab_size"], config["d_model"])
    experts = {name.split(".")[6] for name in index if ".experts." in name}
    assert experts == {f"expert_{number}" for number in range(config["num_experts"])}
    assert all(file.stat().st_size < 30e6 for file in EXAMPLE.iterdir())
