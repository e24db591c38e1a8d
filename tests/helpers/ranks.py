"""Starting ranks as processes on gloo, and collecting what each of them returned or raised."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from fairseq_moe_opt.errors import MoEError


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        value: what it returned.
        error: what it raised, or None.
        trace: the error's traceback.
        exit_code: of its process; None when it had to be killed.
        seconds: from the start of its work to its end, or to when it was killed.
    """

    value: Any = None
    error: Exception | None = None
    trace: str = ""
    exit_code: int | None = None
    seconds: float = 0.0


def start_ranks(
    size: int,
    body: Callable[..., Any],
    *arguments: object,
    timeout: float = 20.0,
    deadline: float = 60.0,
    grace: float = 10.0,
) -> list[Outcome]:
    """Run ``body(*arguments)`` on ``size`` ranks of a gloo world with that collective ``timeout``.

    ``body`` must be a function of a module. Processes that are still there after ``deadline`` seconds, or ``grace``
    seconds after the first one that ended, are killed.
    """
    context = multiprocessing.get_context("forkserver")
    # Loading torch, Transformers and fairseq (if it is there) once is most of the speed of these tests.
    context.set_forkserver_preload(
        ["torch.distributed", "fairseq_moe_opt.parallel", "hf_integration.translate", "fairseq_cli.eval_lm"]
    )
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(folder, rank, size, timeout, body, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        killed = _wait(processes, deadline, grace)
        return [
            _outcome(folder / f"{rank}.pickle", None if rank in killed else process.exitcode)
            for rank, process in enumerate(processes)
        ]


def values_of(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; fails with the traceback of the first one that raised."""
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None or outcome.exit_code != 0:
            raise AssertionError(f"rank {rank} ended with code {outcome.exit_code}\n{outcome.trace}")
    return [outcome.value for outcome in outcomes]


def _wait(processes: list[Any], deadline: float, grace: float) -> set[int]:
    """Wait for all, kill what is left; which ranks were killed."""
    start = time.monotonic()
    first_end: float | None = None
    while any(process.is_alive() for process in processes) and time.monotonic() < start + deadline:
        if first_end is None and not all(process.is_alive() for process in processes):
            first_end = time.monotonic()
        if first_end is not None and time.monotonic() > first_end + grace:
            break
        time.sleep(0.02)
    killed = {rank for rank, process in enumerate(processes) if process.is_alive()}
    for rank in killed:
        processes[rank].kill()
    for process in processes:
        process.join()
    return killed


def _outcome(path: Path, exit_code: int | None) -> Outcome:
    if not path.exists():
        return Outcome(exit_code=exit_code)
    value, error, trace, seconds = pickle.loads(path.read_bytes())
    return Outcome(value, error, trace, exit_code, seconds)


def _rank(
    folder: Path, rank: int, size: int, timeout: float, body: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    value, error, trace, start = None, None, "", time.monotonic()
    try:
        with torch.no_grad():
            value = body(*arguments)
    except Exception as caught:
        # Its message is what is looked at; what an exception holds besides may not travel.
        error, trace = without_content(caught), traceback.format_exc()
    seconds = time.monotonic() - start
    partial = folder / f"{rank}.partial"
    partial.write_bytes(pickle.dumps((value, error, trace, seconds)))
    partial.replace(folder / f"{rank}.pickle")
    if error is None:
        dist.destroy_process_group()
    os._exit(0)  # a group that failed is not waited for


def without_content(error: Exception) -> Exception:
    """One of the same class and message, or of MoEError where the class asks for more than that."""
    try:
        return type(error)(str(error))
    except TypeError:
        return MoEError(str(error))
