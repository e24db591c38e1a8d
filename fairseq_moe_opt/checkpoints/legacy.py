"""PyTorch's old non-zip files, rewritten as zip files so that every tensor has a byte range."""

from __future__ import annotations

import argparse
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from fairseq_moe_opt.checkpoints import fairseq, hf_bin
from fairseq_moe_opt.checkpoints.torch_zip import is_legacy
from fairseq_moe_opt.errors import CheckpointError


def legacy_files(path: Path) -> tuple[Path, ...]:
    """The old-format files among those that hold the weights of a ``.bin`` or fairseq checkpoint."""
    return tuple(found for found in _weight_files(path) if is_legacy(found))


def rewrite_as_zip(path: Path, folder: Path) -> Path:
    """Puts a zip copy of a checkpoint with old-format files into ``folder`` and returns the path to open.

    Only weights are rewritten (one file's tensors are in memory at a time); files that are zips already are
    linked. Raises CheckpointError when a file needs more than plain tensors and fairseq's Namespace.
    """
    for found in _weight_files(path):
        if is_legacy(found):
            torch.save(_load(found), folder / found.name)
        else:
            (folder / found.name).symlink_to(found.resolve())
    index = path / hf_bin.INDEX_NAME
    if path.is_dir() and index.is_file():
        shutil.copyfile(index, folder / index.name)
    return folder if path.is_dir() else folder / path.name


def _weight_files(path: Path) -> tuple[Path, ...]:
    if hf_bin.supports_path(path):
        return hf_bin.weight_files(path)
    if fairseq.supports_path(path):
        return fairseq.weight_files(path)
    return ()


def _load(path: Path) -> object:
    """Loads one file with torch's own restricted unpickler."""
    try:
        with _namespaces_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways; the reason's first line is enough
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(path, f"cannot be loaded: {reason}") from error


def _namespaces_allowed() -> AbstractContextManager[object]:
    """Lets torch.load build Namespaces for a while.

    torch forbids on leaving whatever it was given here, also what the process had allowed before (as the fairseq
    plugin does), so nothing is given that is allowed already.
    """
    if argparse.Namespace in torch.serialization.get_safe_globals():
        return nullcontext()
    return torch.serialization.safe_globals([argparse.Namespace])
