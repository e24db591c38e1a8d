"""Objects through the ranks' common store."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist

from fairseq_moe_opt.parallel import Mail


def test_a_letter_is_taken_once_by_its_name(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    here, there = Mail(store), Mail(store)
    assert not there.arrived("a")
    here.send("a", ([1, 2], torch.arange(3)))
    here.send("b", "another")
    assert there.arrived("a") and there.arrived("b")
    numbers, tensor = there.take("a")
    assert numbers == [1, 2] and tensor.tolist() == [0, 1, 2]
    assert not there.arrived("a") and there.take("b") == "another"
