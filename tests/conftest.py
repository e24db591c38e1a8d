"""What every test shares: the device option, the seeds, the number of threads, hypothesis' profile."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers import releases

# The tests need no network: a name that is not on disk fails at once instead of asking the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# One thread: tests often run beside other work, where tiny operations on several threads wait for each other.
NUM_THREADS = 1
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))  # for the tests' subprocesses
SEED = 20240

settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device``: where tests that take the ``device`` fixture put their tensors; ``--docs-long``: more commands."""
    parser.addoption("--device", default="cpu", help="where tests put tensors: cpu (default) or cuda[:N]")
    parser.addoption("--docs-long", action="store_true", help="run the pages' commands that are marked long, too")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there, and keep torch from taking every core."""
    device = config.getoption("--device")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    torch.set_num_threads(NUM_THREADS)


def pytest_report_header() -> list[str]:
    """The releases that this run is of, and those that the tests were checked with."""
    return [releases.header()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this run cannot do."""
    on_gpu = str(config.getoption("--device")).startswith("cuda")
    for item in items:
        if item.get_closest_marker("docs_long") and not config.getoption("--docs-long"):
            item.add_marker(pytest.mark.skip(reason="a long command of a page: run with --docs-long"))
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run with --device cuda"))
        if item.get_closest_marker("dist") and not torch.distributed.is_available():
            item.add_marker(pytest.mark.skip(reason="this torch is built without torch.distributed"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch with two threads for one test: what spreads work over cores does so."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen with ``--device``."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for every test, whichever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
