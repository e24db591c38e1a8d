"""Checks of the Python environment that a user would otherwise meet as a long trace of somebody else's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys

from fairseq_moe_opt.errors import MoEError

TORCHAUDIO = "torchaudio"


def check_torchaudio() -> None:
    """Raise MoEError when torchaudio is installed but cannot be imported here; return quietly otherwise.

    The registry's torchaudio is built against one exact CUDA torch. Beside another torch its library does not
    load, and every model import of Transformers fails with it, because Transformers imports torchaudio where
    there is one. Nothing in this project needs it. Where it is absent this costs one look at ``sys.path``.
    """
    if TORCHAUDIO in sys.modules or importlib.util.find_spec(TORCHAUDIO) is None:
        return
    try:
        importlib.import_module(TORCHAUDIO)
    except Exception as error:  # OSError, RuntimeError or ImportError: whichever way the two differ
        raise MoEError(_advice(error)) from error


def check_transformers() -> None:
    """Raise MoEError for Transformers 4, which lacks names that are imported here; return quietly otherwise.

    Where it is not installed at all, its own import says so better.
    """
    try:
        release = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return
    if release.startswith("4."):
        raise MoEError(
            f"Transformers {release} is installed, and 5.6 or newer is needed: pip install 'transformers>=5.6,<6'"
        )


def _advice(error: Exception) -> str:
    """One line: what is wrong, the first line of the loader's own words, and the command that mends it."""
    words = str(error).strip().splitlines()
    reason = words[0] if words else type(error).__name__
    return (
        f"torchaudio is installed but cannot be loaded beside this torch ({reason}), which breaks the model "
        f"imports of Transformers; nothing here needs it, so remove it: pip uninstall torchaudio"
    )
