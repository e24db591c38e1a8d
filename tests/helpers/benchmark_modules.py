"""The benchmarks' modules, which are scripts beside each other rather than a package."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import typer
from click.testing import Result
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def benchmark_modules(*names: str) -> Iterator[tuple[ModuleType, ...]]:
    """The modules of those names, importable for as long as the ``with`` block lasts."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield tuple(importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(folder)


def run_benchmark(name: str, *arguments: str) -> Result:
    """Run a benchmark's command in this process: one of its own spends seconds on loading torch and Transformers."""
    with benchmark_modules(name) as (module,):
        application = typer.Typer(add_completion=False)
        application.command()(module.main)
        # Processes that it starts compute with this tree's packages, too.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        wide_enough = {"COLUMNS": "200"}  # no path in a message is cut
        return CliRunner().invoke(application, list(arguments), env={"PYTHONPATH": path, **wide_enough})
