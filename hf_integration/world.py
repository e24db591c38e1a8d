"""The ranks that a launcher has started: joined, and counted against what was asked for.

Launchers that start fewer processes than they were told to are silent about it, and every process would then translate
everything alone: accelerate's ``MULTI_CPU`` starts one, and ``mpirun`` starts several that know nothing of each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.parallel import ProcessGroupRanks, join

_BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
"""What ``accelerate launch`` always leaves in the environment."""

_LAUNCH_COMMANDS = frozenset({"accelerate", "accelerate-launch", "accelerate.commands.launch", "launch.py"})
"""Names of what is run; as a module, the system shows its file."""

_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where launchers say how many processes there are: torchrun and accelerate, then two kinds of ``mpirun``."""


def join_world(device: torch.device, timeout: float) -> ProcessGroupRanks:
    """The ranks that the launcher has started, or this one alone where there was none; ``timeout`` in seconds.

    Raises ParallelError when a launcher announces another number of processes than there are.
    """
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        raise ParallelError(
            "the launcher was told to start several processes, but has started one that knows of no other: accelerate "
            "does so with distributed_type MULTI_CPU; use MULTI_GPU with use_cpu: true, as configs/accelerate/cpu2.yaml"
        )
    if "WORLD_SIZE" in os.environ:
        ranks = join(device, timeout)
    else:
        ranks = join(device, timeout, "tcp://127.0.0.1:0", rank=0, size=1)
    check_world(announced_processes(os.environ, _starter()), ranks.size)
    return ranks


def announced_processes(environment: Mapping[str, str], starter: Sequence[str]) -> dict[str, int]:
    """How many processes there should be, by who says so.

    Args:
        environment: of this process.
        starter: command line of the process that has started this one.
    """
    found = {name: int(environment[name]) for name in _COUNTS if environment.get(name, "").isdigit()}
    if _BY_ACCELERATE in environment:
        found |= _accelerate_processes(starter)
    return found


def check_world(announced: Mapping[str, int], size: int) -> None:
    """Raise ParallelError unless ``size`` processes are what everyone says."""
    for source, count in announced.items():
        if count != size:
            raise ParallelError(
                f"{source} says there are {count} processes, but this one is among {size}: start them with torchrun "
                "--nproc_per_node, or accelerate launch with one of configs/accelerate"
            )


def _accelerate_processes(starter: Sequence[str]) -> dict[str, int]:
    """What ``accelerate launch`` was told: by its flag, else by its configuration file; nothing where neither says."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    names = [Path(part).name for part in starter]
    begins = next((place for place, name in enumerate(names) if name in _LAUNCH_COMMANDS), None)
    if begins is None:
        return {}
    arguments = list(starter[begins + 1 :])
    if arguments[:1] == ["launch"]:  # accelerate launch ...
        del arguments[0]
    given, _ = launch_command_parser().parse_known_args(arguments)
    if given.num_processes is not None:
        return {"accelerate's --num_processes": given.num_processes}
    path = given.config_file or default_config_file
    if not Path(path).is_file():
        return {}
    count = load_config_from_file(given.config_file).num_processes
    return {f"accelerate's {path}": count} if count > 0 else {}


def _starter() -> tuple[str, ...]:
    """The parent's command line; empty where the system does not tell."""
    try:
        content = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode(errors="replace") for part in content.split(b"\0")[:-1])
