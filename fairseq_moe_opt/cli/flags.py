"""``--moe-NAME`` flags, made from the fields of MoEOptions: one source for names, choices, defaults and help."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from fairseq_moe_opt.options import MoEOptions, field_choices, field_help
from fairseq_moe_opt.presets import PRESET, PRESET_HELP, with_preset

T = TypeVar("T")

PREFIX = "moe_"
PANEL = "Mixture-of-Experts runtime"
PARAMETER = "moe_options"
_METAVARS: Mapping[str, str] = {
    "report": "FILE",
    "trace": "FILE",
    "warm_start": "FILE",
    "expert_memory": "SIZE",
    "host_memory": "SIZE",
    PRESET: "NAME|FILE",
}


_PROFILE_HELP = "time routing, dispatch, experts and combine of every layer; moe-opt profile shows much more"


class Dtype(str, enum.Enum):
    """Dtypes that weights can have in memory or be stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ExpertDtype(str, enum.Enum):
    """Dtypes that experts alone can be stored in."""

    BF16 = "bf16"
    INT8 = "int8"


def with_moe_flags(*names: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command a flag for each of the options ``names`` (none: all of them, and ``--moe-preset``).

    The command takes what the user gave as one mapping, its parameter ``moe_options``, fit for
    ``MoEOptions.from_kwargs``; a preset's values are in it where no flag says more.
    """
    wanted = names or (PRESET, *(field.name for field in fields(MoEOptions)))

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(command)
        def run(**values: Any) -> T:
            given = {name: _plain(values.pop(PREFIX + name)) for name in wanted}
            options = with_preset({name: value for name, value in given.items() if value is not None})
            return command(**values, **{PARAMETER: options})

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [one for one in own if one.name != PARAMETER] + [_flag(name) for name in wanted]
        _declare(run, parameters)
        return run

    return decorate


def taking(make: Callable[..., T]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of ``make``: it takes what that makes of them first, then flags of its own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = list(inspect.signature(make, eval_str=True).parameters.values())
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            kept = {one.name: values.pop(one.name) for one in own}
            command(make(**values), **kept)

        _declare(run, [*shared, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)])
        return run

    return decorate


def _declare(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> None:
    """Set what typer reads: the signature for order and defaults, the annotations for types."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in parameters}


def flag_name(option: str) -> str:
    """``expert_dtype`` is ``--moe-expert-dtype``."""
    return "--" + (PREFIX + option).replace("_", "-")


def _flag(name: str) -> inspect.Parameter:
    """None where the user says nothing, so that a preset can; the help shows the option's default all the same."""
    defaults = {field.name: field.default for field in fields(MoEOptions)}
    kind: Any = get_type_hints(MoEOptions).get(name, str)
    choices = field_choices().get(name)
    if name == "profile":
        kind = bool  # moe-opt has a command of its own that writes to a folder
    if choices is not None:
        kind = enum.Enum(name, {choice: choice for choice in choices}, type=str)  # type: ignore[misc, no-redef]
    flag = typer.Option(
        flag_name(name),
        help={**field_help(), PRESET: PRESET_HELP, "profile": _PROFILE_HELP}[name],
        metavar=_METAVARS.get(name),
        show_default=str(defaults[name]) if defaults.get(name) else False,
        rich_help_panel=PANEL,
    )
    annotation = Annotated[kind | None, flag]
    return inspect.Parameter(PREFIX + name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else value
