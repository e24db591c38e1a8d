"""Mixture-of-Experts inference for pretrained checkpoints; the folder that fairseq's --user-dir points at.

Importing this package loads neither torch nor fairseq nor transformers: public names come at first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairseq_moe_opt.errors import (
        CheckpointError,
        InputError,
        KernelError,
        MoEError,
        NoMoELayerError,
        OptionError,
    )
    from fairseq_moe_opt.options import MoEOptions

__version__ = "0.1.0"

_HOME_OF: Mapping[str, str] = {
    "CheckpointError": "fairseq_moe_opt.errors",
    "InputError": "fairseq_moe_opt.errors",
    "KernelError": "fairseq_moe_opt.errors",
    "MoEError": "fairseq_moe_opt.errors",
    "MoEOptions": "fairseq_moe_opt.options",
    "NoMoELayerError": "fairseq_moe_opt.errors",
    "OptionError": "fairseq_moe_opt.errors",
}

_FAIRSEQ_PLUGIN = ("fairseq_moe_opt.models.plugin", "fairseq_moe_opt.tasks.multilingual")

__all__ = [
    "CheckpointError",
    "InputError",
    "KernelError",
    "MoEError",
    "MoEOptions",
    "NoMoELayerError",
    "OptionError",
    "__version__",
    "register_fairseq",
]


def register_fairseq() -> None:
    """Teach the fairseq in this process Mixture-of-Experts: models, tasks, checkpoints, flags.

    A second call changes nothing. fairseq's ``--user-dir`` does the same by importing the same files. Raises MoEError
    when fairseq is not installed.
    """
    try:
        for module in _FAIRSEQ_PLUGIN:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "fairseq":
            raise
        errors = importlib.import_module("fairseq_moe_opt.errors")
        raise errors.MoEError("fairseq is not installed: see README.md on how to install fairseq-fixed") from error


def __getattr__(name: str) -> object:
    """A public name from the module it lives in; AttributeError when there is no such name."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """The names that are here, the lazy ones included."""
    return sorted({*globals(), *__all__})
