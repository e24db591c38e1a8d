"""The one way in: asks each reader in turn whether a path is its own."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from fairseq_moe_opt.checkpoints import fairseq, hf_bin, safetensors
from fairseq_moe_opt.checkpoints.records import CheckpointIndex
from fairseq_moe_opt.errors import CheckpointError


class CheckpointReader(Protocol):
    """What a format has to offer: one file of this folder each."""

    def supports_path(self, path: Path) -> bool:
        """Whether ``path`` looks like this format, by names only."""

    def read_index(self, path: Path) -> CheckpointIndex:
        """Every tensor's byte range, from headers only; raises CheckpointError naming what is wrong."""


def _readers(*modules: ModuleType) -> tuple[CheckpointReader, ...]:
    return tuple(cast(CheckpointReader, module) for module in modules)


# In this order: where a folder holds both kinds of Hugging Face weights, safetensors win, as they do there.
READERS = _readers(safetensors, hf_bin, fairseq)


def find_reader(path: Path) -> CheckpointReader:
    """The reader of a path; raises CheckpointError when there is none, saying what a path may be."""
    for reader in READERS:
        if reader.supports_path(path):
            return reader
    if not path.exists():
        raise CheckpointError(path, "no such file or folder")
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(path, "is empty (0 bytes)")
    raise CheckpointError(
        path,
        "is no checkpoint: expected model.safetensors, pytorch_model.bin (or their index.json) in a folder, "
        "or a fairseq checkpoint (x.pt, or x-shared.pt with x-rank-N.pt)",
    )


def open_index(path: str | PathLike[str]) -> CheckpointIndex:
    """Indexes a checkpoint from headers alone: no tensor is read, whatever its size.

    ``path`` may be a safetensors file, a Hugging Face folder (safetensors or ``pytorch_model*.bin``), a
    ``.bin`` file, or a fairseq checkpoint (``x.pt``, ``x-shared.pt`` or the folder). Raises CheckpointError
    with one clear line for a missing, empty, truncated or foreign one.
    """
    given = Path(path)
    return find_reader(given).read_index(given)
