"""Byte-range readers against torch.load and the safetensors library, and everything they have to refuse."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fairseq_moe_opt.checkpoints import open_index, read_tensor
from fairseq_moe_opt.errors import CheckpointError

STATE = {
    "half": torch.arange(12, dtype=torch.float16).reshape(3, 4),
    "bfloat": torch.linspace(-1, 1, 10).to(torch.bfloat16),
    "single": torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)),
    "long": torch.tensor([1, -2, 3]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def write_safetensors(path: Path) -> Path:
    save_file(STATE, path)
    return path


def write_bin(path: Path) -> Path:
    torch.save(STATE, path)
    return path


@pytest.mark.parametrize("name, write", [("x.safetensors", write_safetensors), ("x.bin", write_bin)])
def test_every_tensor_is_read_bit_for_bit(tmp_path: Path, name: str, write: object) -> None:
    index = open_index(write(tmp_path / name))
    assert set(index) == set(STATE)
    for key, expected in STATE.items():
        actual = read_tensor(index[key])
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)


def test_reading_goes_into_the_memory_given(tmp_path: Path) -> None:
    record = open_index(write_safetensors(tmp_path / "x.safetensors"))["single"]
    packed = torch.full((2, *record.shape), 7.0)
    address = packed.data_ptr()
    returned = read_tensor(record, out=packed[1])
    assert returned.data_ptr() == address + packed[0].numel() * 4
    assert torch.equal(packed[1], STATE["single"])
    assert torch.equal(packed[0], torch.full(record.shape, 7.0))


def test_out_of_another_dtype_or_layout_is_converted(tmp_path: Path) -> None:
    record = open_index(write_safetensors(tmp_path / "x.safetensors"))["half"]
    assert torch.equal(read_tensor(record, torch.empty(3, 4)), STATE["half"].float())
    transposed = torch.empty(4, 3, dtype=torch.float16).T
    assert torch.equal(read_tensor(record, transposed), STATE["half"])
    with pytest.raises(CheckpointError, match=r"'half' has shape \(3, 4\), wanted \(4, 3\)"):
        read_tensor(record, torch.empty(4, 3))


def test_out_that_requires_grad_can_be_filled(tmp_path: Path) -> None:
    record = open_index(write_safetensors(tmp_path / "x.safetensors"))["half"]
    parameter = torch.nn.Parameter(torch.empty(3, 4))
    read_tensor(record, parameter)
    assert torch.equal(parameter.detach(), STATE["half"].float())


def test_strided_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    state = {
        "base": base,
        "transposed": base.T,
        "column": base[:, 3],
        "slice": base[1:4, 2:9:3],
        "expanded": base[0, :3].expand(4, 3),
        "tail": base.flatten()[50:],
        "one": base[2:3, 4:5],
        "parameter": torch.nn.Parameter(base[0]),
    }
    torch.save(state, tmp_path / "x.bin")
    index = open_index(tmp_path / "x.bin")
    for name, expected in state.items():
        assert torch.equal(read_tensor(index[name]), expected), name
    assert index["base"].offset == index["transposed"].offset
    assert index["tail"].nbytes == 40
    assert not index["transposed"].is_contiguous and index["one"].is_contiguous


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_folder(tmp_path: Path, kind: str) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    halves = [dict(list(STATE.items())[:3]), dict(list(STATE.items())[3:])]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        name = f"{stem}-{number:05d}-of-00002.{kind}"
        (save_file if kind == "safetensors" else torch.save)(half, tmp_path / name)
        weight_map |= dict.fromkeys(half, name)
    index_file = tmp_path / f"{stem}.{kind}.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    index = open_index(tmp_path)
    assert {name: torch.equal(read_tensor(index[name]), STATE[name]) for name in index} == dict.fromkeys(STATE, True)
    assert len(index.files) == 2
    (tmp_path / f"{stem}-00002-of-00002.{kind}").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.* is missing"):
        open_index(tmp_path)
    index_file.write_text(json.dumps({"weight_map": {"lost": f"{stem}-00001-of-00002.{kind}"}}))
    with pytest.raises(CheckpointError, match="lacks tensor 'lost'"):
        open_index(tmp_path)
    index_file.write_text(json.dumps({"weight_map": {"half": "../elsewhere.bin"}}))
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        open_index(tmp_path)


def test_missing_empty_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_index(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no checkpoint: expected"):
        open_index(tmp_path)
    for name in ("x.safetensors", "x.bin", "x.pt", "x.other"):
        path = tmp_path / name
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="empty"):
            open_index(path)
        path.write_bytes(b"this is no checkpoint of any kind, only a line of text")
        with pytest.raises(CheckpointError, match=r"is (no|not a) .*") as caught:
            open_index(path)
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name, write", [("x.safetensors", write_safetensors), ("x.bin", write_bin)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_file_is_refused_when_opened(tmp_path: Path, name: str, write: object, keep: float) -> None:
    path = write(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="truncated"):
        open_index(path)


def test_a_file_cut_after_opening_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors")
    record = max(open_index(path).values(), key=lambda found: found.offset)
    with path.open("r+b") as stream:
        stream.truncate(record.offset + record.nbytes - 1)
    with pytest.raises(CheckpointError, match=f"truncated: tensor '{record.name}'"):
        read_tensor(record)


def test_safetensors_header_that_contradicts_itself(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="'x': 8 bytes for shape"):
        open_index(tmp_path / "x.safetensors")


def test_legacy_file_names_the_way_out(tmp_path: Path) -> None:
    for name in ("x.bin", "x.pt"):
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match="moe-opt convert"):
            open_index(tmp_path / name)


def test_compressed_zip_is_refused_by_member(tmp_path: Path) -> None:
    write_bin(tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as source,
        zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="is compressed, so tensors have no byte ranges"):
        open_index(tmp_path / "x.bin")


def test_zip_that_is_no_pytorch_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        open_index(tmp_path / "x.bin")
