"""How many processes a launcher says there are, against how many there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from fairseq_moe_opt.errors import ParallelError
from hf_integration.world import announced_processes, check_world, join_world

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
SCRIPT = ("-m", "hf_integration.launch", "translate", "--num_processes", "9")


def test_a_launcher_that_starts_fewer_processes_than_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # What accelerate's MULTI_CPU leaves in the environment of its only process.
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ParallelError, match=r"MULTI_CPU; use MULTI_GPU with use_cpu: true"):
        join_world(torch.device("cpu"), 1.0)


@pytest.mark.parametrize(
    "command",
    [
        ("python", "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu2.yaml"), *SCRIPT),
        ("python", "/site-packages/accelerate/commands/launch.py", "--num-processes=2", *SCRIPT),
        ("/bin/python", "/bin/accelerate", "launch", "--config_file", str(CONFIGS / "gpu8.yaml"), "--num_processes", "2", *SCRIPT),
        ("/bin/accelerate-launch", "--config_file", str(CONFIGS / "gpu2.yaml"), *SCRIPT),
    ],
)
def test_what_accelerate_was_told(command: tuple[str, ...]) -> None:
    (count,) = announced_processes(BY_ACCELERATE, command).values()
    assert count == 2
    assert announced_processes({}, command) == {}


def test_what_cannot_be_known_is_not_compared() -> None:
    assert announced_processes({**BY_ACCELERATE, "WORLD_SIZE": "x"}, ("bash", "-c", "...")) == {}
    assert announced_processes(BY_ACCELERATE, ()) == {}
    check_world({}, 1)


def test_every_count_has_to_be_right() -> None:
    announced = announced_processes({"WORLD_SIZE": "2", "PMI_SIZE": "4"}, ())
    assert announced == {"WORLD_SIZE": 2, "PMI_SIZE": 4}
    check_world({"WORLD_SIZE": 2}, 2)
    with pytest.raises(ParallelError, match="PMI_SIZE says there are 4 processes, but this one is among 2"):
        check_world(announced, 2)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_know_nothing_of_each_other_stop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [one for one in os.environ if one in ("WORLD_SIZE", "MASTER_ADDR")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv(name, "4")
    try:
        with pytest.raises(ParallelError, match=f"{name} says there are 4 processes, but this one is among 1"):
            join_world(torch.device("cpu"), 5.0)
        monkeypatch.setenv(name, "1")
        dist.destroy_process_group()
        assert join_world(torch.device("cpu"), 5.0).size == 1
    finally:
        dist.destroy_process_group()
