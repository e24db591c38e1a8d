"""Releases of Transformers: which one runs here, which ones the tests were run with, and what they are known to do."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

RELEASE = Version(version("transformers"))
CHECKED_WITH = ("5.6.0", "5.23.0", "5.24.0")
"""Releases that the tests of every family passed with; the first is the oldest that setup.py allows."""

NLLB_SEEN_WRONG = ("5.0.0", "5.5.0", "5.6.0", "5.10.1", "5.16.1", "5.22.2", "5.23.0")
"""Releases in which NLLB-MoE was seen to run experts 0 and 1 only."""

TAKES_NAMES = Version("5.7")
"""The first whose ``experts_implementation`` takes any registered name."""

SWITCH_DROPS = Version("5.18")
"""The first of the 5.x line whose Switch Transformers drop tokens beyond the capacity."""


def header() -> str:
    """What runs here, for the head of a test report."""
    known = ", ".join(CHECKED_WITH)
    return f"transformers {RELEASE} (checked with {known})"
