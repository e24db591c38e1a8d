"""Experts by byte range: any layout and dtype, and files that are cut, gone, replaced or stop short."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fairseq_moe_opt.checkpoints import ExpertFiles, open_index
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.types import ExpertKey, ExpertWeights

FIELDS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
SHAPES = {"fc1_weight": (6, 4), "fc1_bias": (6,), "fc2_weight": (4, 6), "fc2_bias": (4,)}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"{e}.{field}": torch.randn(SHAPES[field]).to(dtype) for e in range(3) for field in FIELDS}


def source(path: Path, **how: bool) -> ExpertFiles:
    index = open_index(path)
    return ExpertFiles(
        {ExpertKey("layer", e): {field: index[f"{e}.{field}"] for field in FIELDS} for e in range(3)}, **how
    )


def empty(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    return ExpertWeights(*(torch.full(SHAPES[field], float("nan"), dtype=dtype) for field in FIELDS))


def check(files: ExpertFiles, stored: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    for e in (2, 0, 1, 0):
        into = empty(dtype)
        read = files.load(ExpertKey("layer", e), into)
        for field in FIELDS:
            assert torch.equal(getattr(into, field), stored[f"{e}.{field}"].to(dtype))
        assert read.tier == "file"
        # At least: a strided tensor's range has gaps.
        assert read.nbytes >= sum(stored[f"{e}.{field}"].numel() * stored[f"{e}.{field}"].itemsize for field in FIELDS)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_pages", [False, True])
def test_safetensors_in_any_dtype(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, keep_pages: bool) -> None:
    content = tensors(stored)
    save_file(content, tmp_path / "model.safetensors")
    check(source(tmp_path, keep_pages=keep_pages), content, wanted)


def test_strided_and_shared_storages_of_a_bin_file(tmp_path: Path) -> None:
    content = tensors()
    content = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in content.items()}
    both = torch.randn(12)
    content["0.fc1_bias"], content["1.fc1_bias"] = both[:6], both[::2]
    torch.save(content, tmp_path / "pytorch_model.bin")
    check(source(tmp_path), content)


def test_what_lies_together_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {name: tensor for name, tensor in tensors().items()}
    save_file(content, tmp_path / "model.safetensors")
    calls: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return preadv(descriptor, buffers, offset)

    files = source(tmp_path)
    monkeypatch.setattr(os, "preadv", counted)
    files.load(ExpertKey("layer", 1), empty())
    assert calls == [4]


def test_reads_that_stop_short_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    files, preadv = source(tmp_path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    check(files, content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def replace(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (Path.unlink, r"model\.safetensors: cannot be opened to read expert 1 of layer: No such file"),
    "cut": (cut, r"model\.safetensors: has \d+ bytes, had \d+ when it was opened: expert 1 of layer"),
    "replaced": (replace, r"model\.safetensors: has \d+ bytes, had \d+ when it was opened: expert 1 of layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_expert_and_file_and_passes(tmp_path: Path, fault: str) -> None:
    content, path = tensors(), tmp_path / "model.safetensors"
    save_file(content, path)
    files, good = source(tmp_path), path.read_bytes()
    harm, message = FAULTS[fault]
    harm(path)
    with pytest.raises(CheckpointError, match=message):
        files.load(ExpertKey("layer", 1), empty())
    path.write_bytes(good)
    check(files, content)


def test_a_failing_disk_names_expert_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    files = source(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: reading expert 2 of layer failed: Input/output"):
        files.load(ExpertKey("layer", 2), empty())
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated: expert 2 of layer needs \d+ bytes"):
        files.load(ExpertKey("layer", 2), empty())
