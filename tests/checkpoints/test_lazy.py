"""A state dict that stays in its files, and what else is saved in them as the objects it was."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_moe_opt.checkpoints import open_index
from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.checkpoints.saved_content import as_saved, slots_in
from fairseq_moe_opt.checkpoints.torch_zip import open_torch_zip
from fairseq_moe_opt.errors import CheckpointError
from tests.helpers.checkpoint_files import E, M, fairseq_state, save_fairseq

GATE = "encoder.layers.0.moe_layer.gate.wg.weight"


@pytest.fixture
def lazy(tmp_path: Path) -> LazyStateDict:
    return LazyStateDict(open_index(save_fairseq(tmp_path / "x.pt", fairseq_state())))


def test_it_is_a_mapping_that_reads_on_demand(lazy: LazyStateDict) -> None:
    expected = fairseq_state()
    assert list(lazy) == list(expected) and len(lazy) == len(expected)
    assert all(torch.equal(lazy[name], tensor) for name, tensor in expected.items())
    assert lazy[GATE] is not lazy[GATE]
    assert lazy.shape_of(GATE) == (E, M)
    lazy.index.path.unlink()
    assert GATE in lazy and lazy.shape_of(GATE) == (E, M)
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be opened"):
        lazy[GATE]


def test_entries_are_renamed_replaced_and_removed_as_in_a_dictionary(lazy: LazyStateDict) -> None:
    lazy["new"] = lazy.pop(GATE)
    del lazy["encoder.version"]
    lazy["decoder.version"] = torch.tensor([4.0])
    assert GATE not in lazy and "encoder.version" not in lazy
    assert torch.equal(lazy["new"], fairseq_state()[GATE])
    assert lazy.shape_of("decoder.version") == (1,)
    assert GATE in lazy.index  # which still says where everything lies


def test_it_reads_into_memory_that_is_there(lazy: LazyStateDict) -> None:
    for dtype in (torch.float32, torch.float16):
        out = torch.zeros(E, M, dtype=dtype)
        lazy.read_into(GATE, out)
        assert torch.equal(out, fairseq_state()[GATE].to(dtype))
    lazy["two"] = torch.ones(2)
    lazy.read_into("two", out := torch.zeros(2))
    assert out.tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="has shape"):
        lazy.read_into(GATE, torch.zeros(M, E))


def test_a_copy_is_a_plain_dictionary(lazy: LazyStateDict) -> None:
    copied = copy.deepcopy(lazy)
    assert isinstance(copied, dict)
    assert torch.equal(copied[GATE], fairseq_state()[GATE])


def test_saved_content_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {
        "best": np.float64(0.25),
        "step": np.int64(7),
        "half": np.float32(0.5),
        "strange": np.float16(1.0),
        "cfg": argparse.Namespace(langs=["a"], pair=("b", None)),
        "tensor": torch.arange(3),
    }
    torch.save(content, tmp_path / "x.pt")
    found = open_torch_zip(tmp_path / "x.pt").content
    assert len(list(slots_in(found))) == 1
    made = as_saved(found, lambda slot: slot.shape)
    assert made == {**content, "strange": None, "tensor": (3,)}
    assert (type(made["best"]), type(made["step"])) == (float, int)
