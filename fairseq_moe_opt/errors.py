"""The errors a user of this project can meet: each message names the option or file and what would be right."""

from __future__ import annotations

from os import PathLike, fspath


class MoEError(Exception):
    """Base of every error raised on purpose by this project; ``str(error)`` is one line fit for a terminal."""


class OptionError(MoEError, ValueError):
    """An option that does not exist, has a value out of its set, or contradicts another option or the model."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"option {option!r}: {message}")
        self.option = option


class CheckpointError(MoEError):
    """A checkpoint that is missing, truncated, foreign, or does not fit what it is asked for."""

    def __init__(self, path: str | PathLike[str], message: str) -> None:
        super().__init__(f"{fspath(path)}: {message}")
        self.path = fspath(path)


class InputError(MoEError, ValueError):
    """User text or a language code that cannot be used."""


class NoMoELayerError(MoEError):
    """A model in which none of the known Mixture-of-Experts layers was found."""


class KernelError(MoEError, RuntimeError):
    """A kernel that cannot run here, or not on these tensors."""


class PlacementError(MoEError, ValueError):
    """A placement, or a file of one, that is not valid or was made for another model or another number of ranks."""


class ParallelError(MoEError, RuntimeError):
    """Ranks that do not work together: one is gone, hangs, or was started with something else."""
