"""The runtime's flags on all of fairseq's command lines.

``fairseq-*`` call ``options.parse_args_and_arch`` by attribute after ``--user-dir`` was imported, so wrapping that
function reaches them all. On commands that load a checkpoint, what the flags say goes into ``--model-overrides``, which
fairseq carries to wherever the model is built, other processes included.
"""

from __future__ import annotations

import ast
import functools
import logging
import os
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from fairseq import options

from fairseq_moe_opt.errors import MoEError, OptionError
from fairseq_moe_opt.models._arguments import (
    CAPACITY_ARGUMENTS,
    PRESET_ARGUMENT,
    RUNTIME_ARGUMENTS,
    argument_choices,
    expand_preset,
    options_from,
)
from fairseq_moe_opt.models._job import JOB_ARGUMENTS, PLACEMENT, SAME_BATCH, TIMEOUT, launched_size
from fairseq_moe_opt.options import field_help
from fairseq_moe_opt.presets import PRESET_HELP
from fairseq_moe_opt.sizes import ALL

_logger = logging.getLogger(__name__)

_WITHOUT_EFFECT: Mapping[str, str] = {
    "moe_local_drop": "it keeps tokens from leaving their process, and one process has all experts",
    "moe_cmr_xgpu": "the gates' share is counted over this process's tokens, and there is no other process",
    "moe_expert_ffn_dim": "experts are as wide as --encoder-ffn-embed-dim and --decoder-ffn-embed-dim say",
    "enable_m2m_validation": "validation covers the language pairs given",
}
"""Training flags of the branches that are accepted and change nothing in one process, and why."""


def patch_command_lines() -> None:
    """Wrap fairseq's parsing function; a second call changes nothing."""
    stock = options.parse_args_and_arch
    if not hasattr(stock, "__wrapped__"):
        options.parse_args_and_arch = functools.wraps(stock)(_wrap(stock))


def _wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args_and_arch(parser: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        """fairseq's function on a parser that has the runtime's flags too."""
        flags = parser._option_string_actions
        loads, parts = "--model-overrides" in flags, _works_in_parts(flags)
        _add_flags(parser, loads, parts)
        _show_errors_in_one_line()
        result = stock(parser, *args, **kwargs)
        parsed = result[0] if isinstance(result, tuple) else result
        _allow_bf16_on_cpu(parsed)
        try:
            if loads:
                _settle(parsed, parts)
            else:
                _settle_training(parsed)
        except OptionError as error:
            parser.error(str(error))
        return result

    return parse_args_and_arch


def _works_in_parts(flags: Collection[str]) -> bool:
    """Whether a command with these flags is fairseq-generate or fairseq-eval-lm, which several processes may share."""
    return "--context-window" in flags or ("--beam" in flags and "--buffer-size" not in flags)


def _add_flags(parser: ArgumentParser, loads: bool, parts: bool) -> None:
    """The flags; some only make sense where a checkpoint ``loads``, or where several processes take ``parts``."""
    if "--moe-gating" in parser._option_string_actions:
        return
    if parser.get_default("task") is None:
        # fairseq-validate has no default and fails on None; the task itself comes from the checkpoint.
        parser.set_defaults(task="translation")
    group = parser.add_argument_group("Mixture-of-Experts runtime")
    group.add_argument("--moe-preset", metavar="NAME|FILE", default=None, help=PRESET_HELP)
    for argument, option in RUNTIME_ARGUMENTS.items():
        flag, text = "--" + argument.replace("_", "-"), field_help()[option].replace("%", "%%")
        if option == "profile":
            group.add_argument(flag, nargs="?", const=True, default=None, metavar="DIR", help=text)
        else:
            group.add_argument(flag, choices=argument_choices(argument), default=None, help=text)
    if loads:
        group.add_argument("--moe-eval-capacity-token-fraction", type=float, default=None, help=SUPPRESS)
        group.add_argument("--moe-eval-capacity-max-seqlen", action="store_true", default=None, help=SUPPRESS)
        group.add_argument("--replication-count", type=int, default=None, help="copies of each expert in rank files")
        group.add_argument("--is-moe", action="store_true", help="as in the branches' command lines")
        group.add_argument("--moe-generation", action="store_true", default=None, help=JOB_ARGUMENTS[SAME_BATCH])
    if parts:
        group.add_argument("--moe-placement", metavar="FILE", default=None, help=JOB_ARGUMENTS[PLACEMENT])
        group.add_argument("--moe-timeout", type=_seconds, metavar="SECONDS", default=None, help=JOB_ARGUMENTS[TIMEOUT])


def _seconds(text: str) -> float:
    value = float(text)
    if value < 1:
        raise ValueError
    return value


def _allow_bf16_on_cpu(args: Namespace) -> None:
    """fairseq takes ``--bf16`` for ``--tpu``, whose library is not there; with ``--cpu`` it means what it says."""
    if getattr(args, "cpu", False) and getattr(args, "bf16", False):
        args.tpu = False


def _check(values: Mapping[str, Any]) -> None:
    """OptionError for runtime options with wrong values or that contradict each other."""
    given = {option: values.get(argument) for argument, option in RUNTIME_ARGUMENTS.items()}
    options_from({option: value for option, value in given.items() if value is not None})


def _settle(args: Namespace, parts: bool) -> None:
    """Move the flags into the overrides, and see to a number of processes that was that of another machine."""
    if parts and getattr(args, "is_moe", False) and not hasattr(args, "context_window"):
        args.moe_generation = True  # the branches' fairseq-generate
    names = (PRESET_ARGUMENT, *RUNTIME_ARGUMENTS, *CAPACITY_ARGUMENTS, *JOB_ARGUMENTS, "replication_count")
    given = {name: vars(args).pop(name) for name in names if name in vars(args)}
    given = {name: value for name, value in given.items() if value is not None}
    written = _overrides(args)
    overrides = expand_preset({**written, **given})
    _check(overrides)
    if overrides != written:
        args.model_overrides = repr(overrides)
    if not getattr(args, "is_moe", False):
        return
    asked, places = getattr(args, "distributed_world_size", 1), _places(args) if parts else 1
    if launched_size() is None and asked > places:
        _logger.info("%d process(es) do the work of %d: that is what this machine has room for", places, asked)
        args.distributed_world_size, args.distributed_port = places, -1
    if hasattr(args, "pad_to_fixed_length") and hasattr(args, "context_window"):
        # The branches' eval_lm does so; under a capacity that binds it decides what is dropped.
        args.pad_to_fixed_length = True


def _places(args: Namespace) -> int:
    """How many processes this machine is made for: one a GPU, or one a core where the work is on the CPU."""
    if torch.cuda.is_available() and not getattr(args, "cpu", False):
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settle_training(args: Namespace) -> None:
    """Put a preset's values where no flag says more, and say which flags change nothing here."""
    vars(args).update(expand_preset(vars(args)))
    vars(args).pop(PRESET_ARGUMENT, None)
    _check(vars(args))
    memory = getattr(args, "moe_expert_memory", None)
    if memory not in (None, ALL):
        raise OptionError("moe_expert_memory", f"{memory!r}: training needs all experts in memory; leave it out")
    for name, reason in _WITHOUT_EFFECT.items():
        if getattr(args, name, None):
            _logger.warning("--%s has no effect: %s", name.replace("_", "-"), reason)


def _overrides(args: Namespace) -> dict[str, Any]:
    """What ``--model-overrides`` holds; OptionError when that is no dictionary."""
    text = getattr(args, "model_overrides", None) or "{}"
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict):
        raise OptionError("model_overrides", f"{text!r} is not a dictionary such as {{'moe_capacity': 'checkpoint'}}")
    return found


def _show_errors_in_one_line() -> None:
    """On a command line, an error of this project is one line on stderr, not a traceback."""
    before = sys.excepthook
    if getattr(before, "for_moe_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, MoEError):
            sys.stderr.write(f"{sys.argv[0].rsplit('/', 1)[-1]}: error: {error}\n")
        else:
            before(kind, error, traceback)

    hook.for_moe_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
