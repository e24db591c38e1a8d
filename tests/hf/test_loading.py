"""``from_pretrained``: the same model as Transformers loads, from byte ranges, and one clear line for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import NllbMoeForConditionalGeneration, NllbMoeModel

from fairseq_moe_opt.errors import CheckpointError, MoEError, NoMoELayerError, OptionError
from fairseq_moe_opt.moe import available_kernels
from hf_integration import from_pretrained, optimize
from tests.helpers.nllb import batch, logits, tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save_bin_shards(model: torch.nn.Module, folder: Path) -> None:
    """A checkpoint as Transformers 4 wrote it: two ``.bin`` shards and their index."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kernel", ["auto", *available_kernels()])
def test_equals_transformers_own_loading(folder: Path, kernel: str) -> None:
    expected = NllbMoeForConditionalGeneration.from_pretrained(folder)
    optimize(expected, kernel=kernel)
    model = from_pretrained(folder, kernel=kernel)
    assert not model.training and model.moe.options.kernel == kernel
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(model, batch()), logits(expected, batch()))
    assert model.lm_head.weight is model.model.shared.weight
    assert model.generation_config.decoder_start_token_id == 2


def test_bin_shards_are_read_in_place(tmp_path: Path) -> None:
    model = tiny_model()
    save_bin_shards(model, tmp_path / "bin")
    optimize(model)
    assert torch.equal(logits(from_pretrained(tmp_path / "bin"), batch()), logits(model, batch()))


def test_a_base_model_checkpoint_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = NllbMoeModel(tiny_config()).eval()
    base.save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base")
    assert torch.equal(model.model.encoder.layers[0].ffn.fc1.weight, base.encoder.layers[0].ffn.fc1.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype_is_converted_while_reading(folder: Path, dtype: torch.dtype | str) -> None:
    model = from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_dtype_defaults_to_the_checkpoints_own(tmp_path: Path) -> None:
    tiny_model().to(torch.float16).save_pretrained(tmp_path / "half")
    assert from_pretrained(tmp_path / "half").dtype == torch.float16


def test_saves_and_loads_again(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder, kernel="grouped_mm")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BAD = {
    "truncated": (
        lambda folder: cut(folder / "model.safetensors", 0.7),
        CheckpointError,
        "model.safetensors",
    ),
    "empty file": (
        lambda folder: cut(folder / "model.safetensors", 0.0),
        CheckpointError,
        "model.safetensors",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "no checkpoint"),
    "no config": (drop_config, CheckpointError, "config.json"),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        CheckpointError,
        "not a JSON object",
    ),
    "another family": (
        lambda folder: change_config(folder, model_type="bert"),
        NoMoELayerError,
        "'bert'.*nllb-moe",
    ),
    "wrong type": (lambda folder: change_config(folder, num_experts="many"), CheckpointError, "config.json: is not a"),
    "other widths": (
        lambda folder: change_config(folder, d_model=64),
        CheckpointError,
        r"shape .*config.json asks for",
    ),
    "more experts": (
        lambda folder: change_config(folder, num_experts=9),
        CheckpointError,
        "lacks the tensor .*expert_8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_get_one_clear_line(folder: Path, case: str) -> None:
    spoil, error, message = BAD[case]
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere/at/all", "./nothing", "nothing"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(Path(path))) + ": no such folder"):
        from_pretrained(path)


def test_options_are_checked_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match="'kernl'"):
        from_pretrained("nowhere/at/all", kernl="loop")


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int8, 3])
def test_wrong_dtype_is_named(folder: Path, dtype: object) -> None:
    with pytest.raises(MoEError, match="option 'dtype'"):
        from_pretrained(folder, dtype=dtype)  # type: ignore[arg-type]


MEASURE = """
import sys
from pathlib import Path

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from hf_integration import from_pretrained, optimize

how, kernel, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
if how == "from_pretrained":
    model = from_pretrained(folder, kernel=kernel)
else:
    model = NllbMoeForConditionalGeneration.from_pretrained(folder)
    optimize(model, kernel=kernel)
print(size, max(status("VmHWM"), status("VmRSS")) - before)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.04 GiB: two sparse layers of 64 experts, d 512, ffn 2048."""
    folder = tmp_path_factory.mktemp("large")
    wide = {"d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "num_experts": 64}
    with torch.device("meta"):
        model = NllbMoeForConditionalGeneration(tiny_config(**wide))
    model.to_empty(device="cpu").save_pretrained(folder, max_shard_size="400MB")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("how", ["from_pretrained", "optimize"])
@pytest.mark.parametrize("kernel", ["auto", "grouped_mm"])
def test_loading_holds_the_checkpoint_once(large_folder: Path, how: str, kernel: str) -> None:
    """Peak growth of a fresh process from before loading to after optimising."""
    command = [sys.executable, "-c", MEASURE, how, kernel, str(large_folder)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    size, growth = map(int, result.stdout.split())
    assert size > 2**30
    assert growth <= 1.1 * size, f"grew by {growth / size:.2f}x the checkpoint"


def test_a_preset_is_read_first(folder: Path, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("gating: static\n", encoding="utf-8")
    assert from_pretrained(folder, preset=preset).moe.options.gating == "static"
    preset.write_text("gatting: static\n", encoding="utf-8")
    with pytest.raises(OptionError, match=r"mine\.yaml.*gatting"):
        from_pretrained("nowhere at all", preset=preset)
