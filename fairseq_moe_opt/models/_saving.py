"""fairseq's checkpoint writer, taught the branches' layout: ``x-shared.pt`` and ``x-rank-0.pt`` instead of ``x.pt``.

What one process trains goes into one rank file with all experts, so nothing is lost. (The branches' own trainer gives
both files the same name when it is not distributed, and the second overwrites the experts.) To fairseq the two files
are ``x.pt``: it sees, copies and removes them under that name. Dense models are written as ever.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, trainer
from fairseq.file_io import PathManager

from fairseq_moe_opt.checkpoints.fairseq import is_expert

_SHARED = "-shared.pt"
_PARTS = (_SHARED, "-rank-0.pt")


def patch_saving() -> None:
    """Wrap fairseq's writer and the file functions its trainer uses; a second call changes nothing."""
    stock = checkpoint_utils.torch_persistent_save
    if not hasattr(stock, "__wrapped__"):
        checkpoint_utils.torch_persistent_save = functools.wraps(stock)(_wrap_save(stock))
        checkpoint_utils.PathManager = SplitPathManager
        trainer.PathManager = SplitPathManager


def _wrap_save(stock: Callable[..., Any]) -> Callable[..., Any]:
    def save(obj: Any, filename: Any, async_write: bool = False) -> Any:
        """Write ``obj``, in two files if it is the state of a training run with experts."""
        if not isinstance(filename, (str, os.PathLike)) or not _has_experts(obj):
            return stock(obj, filename, async_write)
        write_split(obj, Path(filename))
        return None

    return save


def write_split(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` as the shared and the rank file of ``path`` (``x.pt``).

    Both are complete under temporary names before either gets its own, and the optimizer's state is in the shared one
    alone. A single ``x.pt`` of an earlier run, which would be read in their place, is removed last.
    """
    model = state["model"]
    shared = {**state, "model": {name: tensor for name, tensor in model.items() if not is_expert(name)}}
    experts = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    experts["model"] = {name: tensor for name, tensor in model.items() if is_expert(name)}
    partial = [(part, part.with_name(f".{part.name}.{os.getpid()}.partial")) for part in parts_of(path)]
    try:
        for content, (_, temporary) in zip((shared, experts), partial, strict=True):
            torch.save(content, temporary)
        for part, temporary in reversed(partial):
            temporary.replace(part)
    finally:
        for _, temporary in partial:
            temporary.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def parts_of(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that stand for ``x.pt``: the shared one first."""
    given = Path(path)
    return tuple(given.with_name(given.name.removesuffix(".pt") + ending) for ending in _PARTS)


def is_split(path: str | os.PathLike[str]) -> bool:
    """Whether ``x.pt`` is not there, but a shared file of it is."""
    given = Path(path)
    return given.suffix == ".pt" and not given.exists() and parts_of(given)[0].is_file()


def _has_experts(state: Any) -> bool:
    model = state.get("model") if isinstance(state, Mapping) else None
    return isinstance(model, Mapping) and any(is_expert(str(name)) for name in model)


class SplitPathManager(PathManager):
    """fairseq's file functions, for which the two files of a split ``x.pt`` are ``x.pt``."""

    @staticmethod
    def exists(path: str) -> bool:
        """Whether there is such a file or folder."""
        return bool(PathManager.exists(path)) or is_split(path)

    @staticmethod
    def isfile(path: str) -> bool:
        """Whether there is such a file."""
        return bool(PathManager.isfile(path)) or is_split(path)

    @staticmethod
    def ls(path: str) -> list[str]:
        """Names in a folder; a split checkpoint's one besides those of its parts."""
        names = list(PathManager.ls(path))
        shared = [name.removesuffix(_SHARED) + ".pt" for name in names if name.endswith(_SHARED)]
        return names + [name for name in shared if name not in names]

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Copy a file, or both parts of a split one; False when the target is there and may not be overwritten."""
        if not is_split(src_path):
            return bool(PathManager.copy(src_path, dst_path, overwrite=overwrite))
        if SplitPathManager.exists(dst_path) and not overwrite:
            return False
        pairs = list(zip(parts_of(src_path), parts_of(dst_path), strict=True))
        partial = [part.with_name(f".{part.name}.{os.getpid()}.partial") for _, part in pairs]
        try:
            for (source, _), temporary in zip(pairs, partial, strict=True):
                shutil.copyfile(source, temporary)
            for (_, part), temporary in reversed(list(zip(pairs, partial, strict=True))):
                temporary.replace(part)
        finally:
            for temporary in partial:
                temporary.unlink(missing_ok=True)
        Path(dst_path).unlink(missing_ok=True)
        return True

    @staticmethod
    def rm(path: str) -> None:
        """Remove a file, or both parts of a split one."""
        if not is_split(path):
            PathManager.rm(path)
            return
        for part in parts_of(path):
            part.unlink(missing_ok=True)
