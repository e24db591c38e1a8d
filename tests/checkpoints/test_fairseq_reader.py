"""fairseq's own files: one file, shared and rank files, and their expert numbering."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fairseq_moe_opt.checkpoints import fairseq, open_index, read_tensor
from fairseq_moe_opt.errors import CheckpointError
from tests.helpers.checkpoint_files import E, fairseq_state, save_fairseq, save_sharded
from tests.helpers.goldens import FAIRSEQ_GOLDENS


def torch_model(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False, map_location="cpu")["model"]


@pytest.mark.parametrize("given", ["checkpoint_last.pt", "checkpoint_last-shared.pt", "checkpoint_last-rank-1.pt"])
def test_golden_rank_files_merge_into_the_branch_own_merge(given: str) -> None:
    folder = FAIRSEQ_GOLDENS / "A_top2_eom"
    index = open_index(folder / given)
    merged = torch_model(folder / "checkpoint_single.pt")
    assert set(index) == set(merged)
    for name, expected in merged.items():
        assert torch.equal(read_tensor(index[name]), expected), name
    assert index.format == "fairseq"
    assert index.metadata["rank_files"] == 2
    assert index.metadata["num_updates"] == 1000
    assert index.metadata["cfg"]["model"]["moe_expert_count"] == 8
    assert type(index.metadata["cfg"]["model"]) is dict


def test_golden_single_file() -> None:
    path = FAIRSEQ_GOLDENS / "A_top2_eom" / "checkpoint_single.pt"
    index = open_index(path)
    for name, expected in torch_model(path).items():
        assert torch.equal(read_tensor(index[name]), expected), name


def test_golden_multilingual_folder_in_half_precision() -> None:
    folder = FAIRSEQ_GOLDENS / "F_multilingual"
    index = open_index(folder)
    shared = torch_model(folder / "checkpoint_last-shared.pt")
    second = torch_model(folder / "checkpoint_last-rank-1.pt")
    assert all(torch.equal(read_tensor(index[name]), tensor) for name, tensor in shared.items())
    name = "decoder.layers.3.moe_layer.experts.{}.fc2.weight"
    assert torch.equal(read_tensor(index[name.format(6)]), second[name.format(2)])
    assert index[name.format(6)].name == name.format(6)
    assert index.metadata["cfg"]["task"]["_name"] == "translation_multi_simple_epoch"


@pytest.mark.parametrize("golden, kept", [("C_top1", 64), ("D_cmr", 128), ("E_lm_moe_branch", 32)])
def test_other_goldens_have_all_experts(golden: str, kept: int) -> None:
    index = open_index(FAIRSEQ_GOLDENS / golden)
    numbers = {name for name in index if ".experts." in name and name.endswith("fc1.bias")}
    experts = 8 if golden != "E_lm_moe_branch" else len({name.split(".experts.")[1] for name in numbers})
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in numbers} == set(range(experts))
    assert index.metadata["rank_files"] == 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_rank_files(tmp_path: Path, ranks: int) -> None:
    index = open_index(save_sharded(tmp_path, ranks))
    for name, expected in fairseq_state().items():
        assert torch.equal(read_tensor(index[name]), expected), name


def test_replicas_are_read_once(tmp_path: Path) -> None:
    path = save_sharded(tmp_path, 2)
    for rank in range(2):
        shutil.copyfile(tmp_path / f"checkpoint-rank-{rank}.pt", tmp_path / f"checkpoint-rank-{rank + 2}.pt")
    for copies in (None, 2):
        index = fairseq.read_index(path, copies)
        assert index.metadata["replication_count"] == 2
        assert set(index) == set(fairseq_state())
        assert {file.name for file in index.files} == {
            "checkpoint-shared.pt",
            "checkpoint-rank-0.pt",
            "checkpoint-rank-1.pt",
        }
    with pytest.raises(CheckpointError, match=r"4 rank file.* hold 8 experts a layer, but the routers have 4"):
        fairseq.read_index(path, 4)


def test_missing_rank_files(tmp_path: Path) -> None:
    path = save_sharded(tmp_path, 4)
    (tmp_path / "checkpoint-rank-3.pt").unlink()
    with pytest.raises(CheckpointError, match=r"3 rank file.* hold 3 experts a layer, but the routers have 4"):
        open_index(path)
    (tmp_path / "checkpoint-rank-1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-rank-1\.pt is missing"):
        open_index(path)
    (tmp_path / "checkpoint-rank-0.pt").unlink()
    (tmp_path / "checkpoint-rank-2.pt").unlink()
    with pytest.raises(CheckpointError, match=f"lacks {E} of {E} experts"):
        open_index(path)
    save_sharded(tmp_path, 2)
    (tmp_path / "checkpoint-shared.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-shared\.pt is missing"):
        open_index(path)


def test_rank_file_of_another_checkpoint(tmp_path: Path) -> None:
    path = save_sharded(tmp_path, 2)
    experts = {name: value for name, value in fairseq_state(range(2)).items() if ".experts." in name}
    save_fairseq(tmp_path / "checkpoint-rank-1.pt", experts, updates=6)
    with pytest.raises(CheckpointError, match=r"another checkpoint: 6 updates, checkpoint-shared.pt has 5"):
        open_index(path)
    other = {name: value.half() for name, value in experts.items()}
    save_fairseq(tmp_path / "checkpoint-rank-1.pt", other)
    with pytest.raises(CheckpointError, match=r"rank-1\.pt: is of another checkpoint: its experts differ"):
        open_index(path)


def test_a_folder_needs_exactly_one_checkpoint(tmp_path: Path) -> None:
    save_sharded(tmp_path, 2, "checkpoint_last")
    assert len(open_index(tmp_path)) == len(fairseq_state())
    save_sharded(tmp_path, 2, "checkpoint_best")
    with pytest.raises(CheckpointError, match=r"2 fairseq checkpoints; name one of them: checkpoint_best\.pt"):
        open_index(tmp_path)


def test_pt_files_that_are_no_fairseq_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no `model` entry"):
        open_index(tmp_path / "x.pt")
    torch.save(torch.ones(2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no `model` entry"):
        open_index(tmp_path / "x.pt")
    (tmp_path / "x-shared-shard0.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="fully sharded run"):
        open_index(tmp_path / "x-shared-shard0.pt")
