"""``fairseq-generate`` and ``fairseq-eval-lm`` on several processes, started by a launcher or by themselves.

Stock ``fairseq-generate`` knows nothing of other processes, and stock ``fairseq-eval-lm`` lets each print a score of
its own. Here the process that the user has started is rank 0; it starts the others where no launcher has, and all of
them run fairseq's own command: see ``_dealing`` for who computes what.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import generate
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store

from fairseq_moe_opt.models._dealing import AllDealtError, Deal, dealt
from fairseq_moe_opt.models._job import Job
from fairseq_moe_opt.models._processes import command_main, other_processes
from fairseq_moe_opt.models._sharing import ExpertSharing, sharing_experts
from fairseq_moe_opt.parallel import Mail, ProcessGroupRanks, agree, join, one_message
from fairseq_moe_opt.placement import read_placement

_GENERATE, _EVAL_LM = "fairseq_cli.generate", "fairseq_cli.eval_lm"

Meet = Callable[[torch.device], ProcessGroupRanks]
"""Becomes a rank, whose models are on that device."""


def patch_launching() -> None:
    """Wrap fairseq's two commands; a second call changes nothing."""
    # Run as `python -m fairseq_cli.generate`, the command is the main module, not the one that is imported here.
    for module in (generate, sys.modules["__main__"]):
        main: Any = getattr(module, "main", None)
        if hasattr(module, "get_symbols_to_strip_from_output") and not hasattr(main, "__wrapped__"):
            vars(module)["main"] = wraps(main)(_wrap_generate(main))
    stock = distributed_utils.call_main
    if not hasattr(stock, "__wrapped__"):
        distributed_utils.call_main = wraps(stock)(_wrap_call_main(stock))


def _wrap_generate(stock: Callable[..., Any]) -> Callable[..., Any]:
    def main(cfg: Any) -> Any:
        """fairseq's command, on as many processes as it is asked for."""
        return _run(_GENERATE, stock, convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg)

    return main


def _wrap_call_main(stock: Callable[..., Any]) -> Callable[..., Any]:
    def call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> Any:
        """fairseq's own way, but for the command that scores language models."""
        if "eval_lm" not in getattr(main, "__globals__", {}) or cfg.common.tpu:
            return stock(cfg, main, **kwargs)
        return _run(_EVAL_LM, main, cfg)

    return call_main


def _run(command: str, main: Callable[..., Any], given: Any) -> Any:
    """``main``, as one rank of the job that the command line and the environment describe."""
    cfg = copy.deepcopy(given)
    job = Job.of(cfg)
    if job.size == 1:
        return main(cfg)
    if job.way == "joined":
        return _as_rank(main, cfg, job, lambda device: ProcessGroupRanks(device=device, timeout=job.timeout))
    if job.way == "launched":
        with _leaving():
            return _as_rank(main, cfg, job, _meeting_of(job))
    told = (command, cfg, job, os.environ.get("OMP_NUM_THREADS") is None)
    with other_processes(_other_rank, told, job.size, job.timeout) as meeting, _fewer_threads(job, told[-1]):
        return _as_rank(main, cfg, job, partial(meeting.join, 0))


def _other_rank(told: tuple[str, Any, Job, bool], rank: int, meet: Meet) -> None:
    """What a process that was started here does."""
    command, cfg, job, share_threads = told
    with _leaving(), _fewer_threads(job, share_threads):
        _as_rank(command_main(command), cfg, replace(job, rank=rank, place=rank), meet)


def _meeting_of(job: Job) -> Meet:
    size = -1 if job.address is None else job.size
    return lambda device: join(device, job.timeout, job.address, rank=job.rank, size=size)


def _as_rank(main: Callable[..., Any], cfg: Any, job: Job, meet: Meet) -> Any:
    device = torch.device("cuda", job.place) if job.on_gpu else torch.device("cpu")
    ranks = meet(device)
    with ExitStack() as contexts:
        if job.way != "joined":
            contexts.enter_context(one_message(SystemExit(1)))
        contexts.enter_context(ranks.watched())
        agree(ranks, job.facts(cfg))
        is_first = ranks.rank == 0
        _adapt(cfg, is_first, device)
        placement = None if job.placement is None else read_placement(job.placement, num_ranks=ranks.size)
        sharing = contexts.enter_context(sharing_experts(ExpertSharing(ranks, device, placement, job.same_batch)))
        if not is_first:
            contexts.enter_context(_silence())
        if not job.same_batch:
            contexts.enter_context(dealt(Deal(ranks, sharing.turns, Mail(_store())), is_first))
        result = None
        with suppress(AllDealtError):
            result = main(cfg)
        sharing.turns.finish()
    gc.collect()  # a data loader that was not read to its end has processes and semaphores
    if job.way != "joined":
        dist.destroy_process_group()
    return result


def _store() -> Store:
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("the process group has gone")
    return world.get_group_store()


def _adapt(cfg: Any, is_first: bool, device: torch.device) -> None:
    """Make ``cfg`` this rank's: all batches, which are not for fairseq to deal out, and a voice for rank 0 alone."""
    section = cfg.distributed_training
    section.device_id = device.index or 0
    section.distributed_world_size, section.distributed_rank = 1, 0
    if not is_first:
        cfg.common_eval.results_path, cfg.common_eval.quiet = None, True
        cfg.common.log_format = "none"


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output, and no log but of errors: rank 0 says it all."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _fewer_threads(job: Job, is_wanted: bool) -> Iterator[None]:
    """This process's part of the CPU threads, where processes compute on the CPU and nobody has said how many."""
    before = torch.get_num_threads()
    if is_wanted and not job.on_gpu:
        torch.set_num_threads(max(1, before // job.size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _leaving() -> Iterator[None]:
    """A process of its own that fails says why, and goes at once: a group that others have left is not waited for."""
    try:
        yield
        return
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
