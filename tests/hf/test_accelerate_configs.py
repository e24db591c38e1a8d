"""The files for ``accelerate launch``, read by accelerate's own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
# Processes, nodes, type, on a CPU.
EXPECTED = {
    "cpu2": (2, 1, "MULTI_GPU", True),
    "gpu1": (1, 1, "NO", False),
    "gpu2": (2, 1, "MULTI_GPU", False),
    "gpu4": (4, 1, "MULTI_GPU", False),
    "gpu8": (8, 1, "MULTI_GPU", False),
    "nodes2": (16, 2, "MULTI_GPU", False),
}


def test_there_are_no_others() -> None:
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_what_the_name_says(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    assert (config.num_processes, config.num_machines, str(kind), config.use_cpu) == EXPECTED[name]
