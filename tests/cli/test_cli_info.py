"""``moe-opt info``: numbers against what the files hold, for every format, and bad checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_moe_opt.cli.info import GIB, inspect_checkpoint, what_fits
from fairseq_moe_opt.sizes import readable
from tests.cli.conftest import Run

GOLDENS = Path(__file__).resolve().parents[1] / "data" / "goldens"
# Of the tiny checkpoint: D 32, F 64, 8 experts, two sparse layers, float32.
EXPERT_PARAMETERS = 32 * 64 + 64 + 64 * 32 + 32


def test_a_transformers_folder(checkpoint: Path) -> None:
    info = inspect_checkpoint(checkpoint)
    assert (info.family, info.format, info.top_k) == ("nllb-moe", "safetensors", 2)
    assert [(layer.phase, layer.number, layer.num_experts) for layer in info.layers] == [
        ("encoder", 1, 8),
        ("decoder", 1, 8),
    ]
    assert info.one_expert_bytes == EXPERT_PARAMETERS * 4
    assert info.expert_bytes == 2 * 8 * EXPERT_PARAMETERS * 4
    assert info.dense_bytes + info.expert_bytes == info.parameters * 4 == info.dtypes["float32"]
    assert info.files == {"model.safetensors": (checkpoint / "model.safetensors").stat().st_size}


def test_a_bin_folder_says_the_same(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(checkpoint / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    one, other = inspect_checkpoint(checkpoint), inspect_checkpoint(tmp_path)
    assert other.format == "hf-bin"
    assert (other.expert_bytes, other.dense_bytes, other.layers) == (one.expert_bytes, one.dense_bytes, one.layers)


@pytest.mark.parametrize(
    ("name", "files", "top_k"),
    [
        ("A_top2_eom/checkpoint_last-shared.pt", 3, 2),
        ("A_top2_eom/checkpoint_single.pt", 1, 2),
        ("C_top1/checkpoint_last.pt", 2, 1),
    ],
)
def test_fairseq_checkpoints(name: str, files: int, top_k: int) -> None:
    if name.startswith("C"):
        files = 1 + len(list((GOLDENS / "C_top1").glob("*-rank-*.pt")))
    info = inspect_checkpoint(GOLDENS / name)
    assert info.format == "fairseq"
    assert info.family.startswith("fairseq ")
    assert info.top_k == top_k
    assert len(info.files) == files
    assert info.layers
    assert all(layer.nbytes == layer.num_experts * info.one_expert_bytes for layer in info.layers)


def test_json_is_the_same_as_the_values(run: Run, checkpoint: Path) -> None:
    done = run("info", checkpoint, "--json")
    assert done.code == 0
    content = json.loads(done.out)
    info = inspect_checkpoint(checkpoint)
    assert content["expert_bytes"] == info.expert_bytes
    assert len(content["layers"]) == 2
    assert {fit["memory"] for fit in content["fits"]} >= {"8 GB GPU", "80 GB GPU"}


def test_the_text_names_what_matters(run: Run, checkpoint: Path) -> None:
    done = run("info", checkpoint)
    assert done.code == 0
    for words in ("nllb-moe", "encoder 1 (layers 1); decoder 1 (layers 1)", "16.4 KiB", "float32", "8 GB GPU", "fits"):
        assert words in done.out
    assert "\x1b" not in done.out


def test_a_dense_model_has_no_moe_layers(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.decoder.layers.0.fc1.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    done = run("info", tmp_path)
    assert done.code == 0
    assert "none" in done.out
    assert "unknown (no config.json beside the weights)" in done.out


def test_what_fits_is_about_bytes_and_headroom() -> None:
    billion = 10**9
    fits = {fit.memory: fit.fits for fit in what_fits(5 * billion, 64 * GIB)}
    assert fits["8 GB GPU"] == {"float32": False, "bfloat16": False}
    assert fits["16 GB GPU"] == {"float32": False, "bfloat16": True}
    assert fits["24 GB GPU"] == {"float32": True, "bfloat16": True}
    assert fits["this machine's memory"] == {"float32": True, "bfloat16": True}
    # Exactly as many bytes as there are leave no room for anything else.
    assert what_fits(2 * GIB, None)[0].fits == {"float32": False, "bfloat16": True}
    assert what_fits(4 * GIB, None)[0].fits == {"float32": False, "bfloat16": False}


def test_bytes_are_readable() -> None:
    assert [readable(size) for size in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]


def _missing(folder: Path) -> Path:
    return folder / "nothing"


def _empty_folder(folder: Path) -> Path:
    return folder


def _empty_file(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def _foreign(folder: Path) -> Path:
    (folder / "checkpoint.pt").write_bytes(b"this is no checkpoint at all, but a text file of some length")
    return folder / "checkpoint.pt"


def _truncated(folder: Path) -> Path:
    whole = (GOLDENS / "A_top2_eom" / "checkpoint_single.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    return folder / "checkpoint.pt"


def _broken_config(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{", encoding="utf-8")
    return folder


@pytest.mark.parametrize("make", [_missing, _empty_folder, _empty_file, _foreign, _truncated, _broken_config])
def test_a_bad_checkpoint_is_one_line(run: Run, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    done = run("info", path)
    assert done.code == 2
    assert str(tmp_path) in done.error_line
    assert done.out == ""
