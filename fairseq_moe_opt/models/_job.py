"""What a command line and the environment say of the processes that are to do a command's work together."""

from __future__ import annotations

import ast
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import distributed as dist

from fairseq_moe_opt.errors import OptionError, ParallelError

PLACEMENT, TIMEOUT, SAME_BATCH = "moe_placement", "moe_timeout", "moe_generation"
JOB_ARGUMENTS: Mapping[str, str] = {
    PLACEMENT: "which rank holds which expert, as moe-opt place writes it; default: in order, in equal parts",
    TIMEOUT: "seconds after which a rank that is silent is given up (600)",
    SAME_BATCH: "all ranks compute the same batches, as the nllb branch does, instead of each its own",
}
"""What flags say of the job, and their help. They travel in ``--model-overrides``, which fairseq hands on whole."""

_DEFAULT_TIMEOUT = 600.0
_COMPARED = ("generation", "dataset", "eval_lm", "task")
_COMPARED_OF_COMMON = ("fp16", "bf16", "seed", "cpu")
_FILES = ("data", "path", "user_dir", "results_path", "log_file", "tensorboard_logdir", "save_dir", "model_overrides")
_OWN_WORK = ("num_workers", "data_buffer_size", "log_format", "no_progress_bar", "local_rank", "device_id", "shard_id")
_OF_ONE_RANK = frozenset((*_FILES, *_OWN_WORK))
"""Arguments that ranks may have different values of, because they have a machine or a part of their own."""


@dataclass(frozen=True)
class Job:
    """The processes that share a command's work, and this one among them.

    Attributes:
        size: of them.
        rank: of this one; -1 where the environment knows.
        place: of this one on its machine, which is the number of its GPU.
        on_gpu: whether models are going to be on GPUs.
        way: ``alone``, ``joined`` (the process group is there), ``launched`` (it is to be joined) or ``spawns`` (the
            others are to be started).
        address: where ranks meet; None where the environment knows.
        placement: file of the placement.
        same_batch: whether all ranks compute the same batches.
        timeout: seconds.
    """

    size: int = 1
    rank: int = -1
    place: int = 0
    on_gpu: bool = False
    way: str = "alone"
    address: str | None = None
    placement: str | None = None
    same_batch: bool = False
    timeout: float = _DEFAULT_TIMEOUT

    @classmethod
    def of(cls, cfg: Any) -> Job:
        """The job of a command with fairseq's configuration ``cfg``, whose overrides lose what describes the job.

        Raises ParallelError when a launcher started another number of processes than are asked for, OptionError for
        what has no effect in one process or cannot be had.
        """
        given = take_job_arguments(cfg)
        on_gpu = torch.cuda.is_available() and not cfg.common.cpu
        found = replace(_found(cfg), on_gpu=on_gpu)
        if found.size == 1:
            for name in (PLACEMENT, TIMEOUT):
                if name in given:
                    raise OptionError(name, "has no effect in one process: give --distributed-world-size too")
            return found
        if found.way == "spawns" and on_gpu and found.size > torch.cuda.device_count():
            raise OptionError(
                "distributed_world_size",
                f"{found.size} processes want a GPU each, and there are {torch.cuda.device_count()}; give as many, or "
                "--cpu",
            )
        same_batch = bool(given.get(SAME_BATCH))
        if cfg.dataset.num_shards > 1 and not same_batch:
            raise OptionError("num_shards", "ranks deal the batches among themselves; leave it out")
        placement, timeout = given.get(PLACEMENT), float(given.get(TIMEOUT, _DEFAULT_TIMEOUT))
        return replace(found, placement=placement, same_batch=same_batch, timeout=timeout)

    def facts(self, cfg: Any) -> dict[str, str]:
        """What all ranks must have alike."""
        return {"--moe-generation": str(self.same_batch), **{f"--{name}": value for name, value in _arguments(cfg)}}


def take_job_arguments(cfg: Any) -> dict[str, Any]:
    """What the overrides in ``cfg`` say of the job; it is in there no more."""
    overrides = ast.literal_eval(cfg.common_eval.model_overrides)
    given = {name: overrides.pop(name) for name in JOB_ARGUMENTS if name in overrides}
    if given:
        cfg.common_eval.model_overrides = repr(overrides)
    return given


def launched_size() -> int | None:
    """How many processes a launcher says it has started; None where there was none."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def _found(cfg: Any) -> Job:
    """Size, ranks and way."""
    asked, section = cfg.distributed_training.distributed_world_size, cfg.distributed_training
    if dist.is_initialized() and asked > 1:
        return Job(_agreed_size(asked, dist.get_world_size()), dist.get_rank(), _local_rank(), way="joined")
    launched = launched_size()
    if launched is not None:
        return Job(_agreed_size(asked, launched), place=_local_rank(), way="launched")
    if asked > 1 and section.distributed_no_spawn and section.distributed_init_method:
        rank, address = section.distributed_rank, section.distributed_init_method
        return Job(asked, rank, section.device_id, way="launched", address=address)
    return Job(asked, 0, way="spawns" if asked > 1 else "alone")


def _agreed_size(asked: int, there: int) -> int:
    if asked not in (1, there):
        raise ParallelError(
            f"--distributed-world-size asks for {asked} processes, but {there} were started: leave the flag out, or "
            "start as many"
        )
    return there


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _arguments(cfg: Any) -> Iterator[tuple[str, str]]:
    """Names and values of the arguments that decide on a result."""
    common = cfg.common
    yield from ((name, str(getattr(common, name))) for name in _COMPARED_OF_COMMON)
    overrides = ast.literal_eval(cfg.common_eval.model_overrides)
    of_one_rank = {"moe_report", "moe_trace", *_OF_ONE_RANK}
    yield "model_overrides", str(sorted((key, value) for key, value in overrides.items() if key not in of_one_rank))
    for name in _COMPARED:
        section = getattr(cfg, name, None)
        if section is None:
            continue
        values: Any = vars(section) if isinstance(section, Namespace) else OmegaConf.to_container(section)
        for key, value in values.items():
            if key not in _OF_ONE_RANK and not str(key).startswith(("distributed_", "_")):
                yield str(key), str(value)
