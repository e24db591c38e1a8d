"""Releases of Transformers: which one runs here, which ones the tests were run with, and what they are known to do."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

RELEASE = Version(version("transformers"))
CHECKED_WITH = ("5.6.0", "5.23.0", "5.24.0")
"""Releases that tests of every family passed with, which ones is in docs/architecture.md; first the oldest allowed."""

NLLB_SEEN_WRONG = ("5.0.0", "5.5.0", "5.6.0", "5.10.1", "5.16.1", "5.22.2", "5.23.0")
"""Releases in which NLLB-MoE was seen to run experts 0 and 1 only."""

FAMILY_SINCE = {"GraniteMoe": Version("5.13")}
"""The first release that runs a family through its ``ExpertsInterface``, where the oldest allowed one does not."""

TAKES_NAMES = Version("5.7")
"""The first whose ``experts_implementation`` takes any registered name."""

EXPERT_PARALLEL = Version("5.23")
"""The first with a registry of expert-parallel implementations, ``ep_implementation=``."""

SWITCH_DROPS = Version("5.18")
"""The first of the 5.x line whose Switch Transformers drop tokens beyond the capacity."""


def families(names: Iterable[str]) -> list[Any]:
    """``names`` as parameters of a test; those that this release has otherwise, or not at all, are skipped."""
    return [pytest.param(name, marks=_skip_before(FAMILY_SINCE.get(name))) for name in names]


def _skip_before(since: Version | None) -> list[pytest.MarkDecorator]:
    reason = f"Transformers runs it through its ExpertsInterface from {since} on"
    return [] if since is None else [pytest.mark.skipif(since > RELEASE, reason=reason)]


def header() -> str:
    """What runs here, for the head of a test report."""
    known = ", ".join(CHECKED_WITH)
    return f"transformers {RELEASE} (checked with {known})"
