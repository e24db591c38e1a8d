"""The writer of PyTorch's zip files: ``torch.load`` and this package's own reader see what ``torch.save`` writes."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe_opt.checkpoints import read_tensor
from fairseq_moe_opt.checkpoints.records import TensorRecord
from fairseq_moe_opt.checkpoints.torch_writer import ALIGNMENT, write_torch
from fairseq_moe_opt.checkpoints.torch_zip import only_tensors, open_torch_zip, tensor_records
from fairseq_moe_opt.checkpoints.writers import Output
from fairseq_moe_opt.errors import CheckpointError
from tests.helpers.checkpoint_files import namespaces_allowed

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def torch_load(path: Path, **how: Any) -> Any:
    with namespaces_allowed():
        return torch.load(path, weights_only=True, **how)


@pytest.fixture
def content() -> dict[str, Any]:
    tensors = {str(dtype): (torch.randn(5, 7) * 9).to(dtype) for dtype in DTYPES}
    strided = torch.arange(12.0).reshape(3, 4).t()
    odd = {"scalar": torch.tensor(2.5, dtype=torch.float64), "none": torch.empty(0, 3), "strided": strided}
    return {
        "model": {**tensors, **odd},
        "cfg": {"model": argparse.Namespace(moe_freq=2, langs=["a", "b"], pair=("a", None))},
        "extra_state": OrderedDict(step=3, best=None, half=0.5, on=True),
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it_back(tmp_path: Path, content: dict[str, Any], mmap: bool) -> None:
    write_torch(tmp_path / "x.pt", content)
    loaded = torch_load(tmp_path / "x.pt", mmap=mmap)
    assert loaded["cfg"] == content["cfg"] and loaded["extra_state"] == content["extra_state"]
    assert list(loaded["model"]) == list(content["model"])
    for name, tensor in content["model"].items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert torch.equal(loaded["model"][name], tensor), name


def test_our_reader_sees_the_same_as_of_torch_s_own_file(tmp_path: Path, content: dict[str, Any]) -> None:
    write_torch(tmp_path / "ours.pt", content)
    torch.save(content, tmp_path / "torchs.pt")
    for path in (tmp_path / "ours.pt", tmp_path / "torchs.pt"):
        archive = open_torch_zip(path)
        records = tensor_records(archive, only_tensors(archive.content["model"]))
        for name, tensor in content["model"].items():
            assert torch.equal(read_tensor(records[name]), tensor), name
            assert records[name].offset % ALIGNMENT == 0


def test_records_are_copied_converted_and_shared(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(4, 3), "b": torch.ones(2)}, tmp_path / "source.pt")
    archive = open_torch_zip(tmp_path / "source.pt")
    records = tensor_records(archive, only_tensors(archive.content))
    same, half = Output("a", records["a"], torch.float32), Output("a", records["a"], torch.float16)
    write_torch(
        tmp_path / "x.pt", {"one": same, "two": same, "half": half, "b": Output("b", records["b"], torch.float32)}
    )
    loaded, expected = torch_load(tmp_path / "x.pt"), read_tensor(records["a"])
    assert torch.equal(loaded["one"], expected) and torch.equal(loaded["half"], expected.half())
    assert loaded["one"].data_ptr() == loaded["two"].data_ptr() != loaded["half"].data_ptr()
    with zipfile.ZipFile(tmp_path / "x.pt") as written:
        assert sum("/data/" in name for name in written.namelist()) == 3
        assert written.testzip() is None


def test_members_of_more_than_four_gigabytes(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 64-bit form of headers, which zipfile takes above a limit that is lowered here."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    write_torch(tmp_path / "x.pt", content)
    assert (tmp_path / "x.pt").read_bytes().count(b"\x01\x00\x10\x00") > 5
    archive = open_torch_zip(tmp_path / "x.pt")
    records = tensor_records(archive, only_tensors(archive.content["model"]))
    monkeypatch.undo()
    loaded = torch_load(tmp_path / "x.pt")["model"]
    for name, tensor in content["model"].items():
        assert torch.equal(loaded[name], tensor) and torch.equal(read_tensor(records[name]), tensor)
        assert records[name].offset % ALIGNMENT == 0


def test_a_dtype_without_storage_type_and_a_source_cut_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt: .*cannot store a tensor as torch\.float8_e5m2"):
        write_torch(tmp_path / "x.pt", {"a": torch.zeros(2).to(torch.float8_e5m2)})
    (tmp_path / "short").write_bytes(b"1234")
    record = TensorRecord("a", torch.float32, (4,), (1,), tmp_path / "short", 0, 16)
    with pytest.raises(CheckpointError, match=r"short: is truncated"):
        write_torch(tmp_path / "x.pt", {"a": Output("a", record, torch.float32)})
