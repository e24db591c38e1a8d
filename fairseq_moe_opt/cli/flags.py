"""``--moe-NAME`` flags, made from the fields of MoEOptions: one source for names, choices, defaults and help."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from fairseq_moe_opt.options import MoEOptions, field_choices, field_help
from fairseq_moe_opt.presets import PRESET, PRESET_HELP, with_preset

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


class Dtype(str, enum.Enum):
    """Dtypes that weights can have in memory or be stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ExpertDtype(str, enum.Enum):
    """Dtypes that experts alone can be stored in."""

    BF16 = "bf16"
    INT8 = "int8"


def with_moe_flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each of the options ``names`` (none: all of them, and ``--moe-preset``).

    The command takes what the user gave as one mapping, its parameter ``moe_options``, fit for
    ``MoEOptions.from_kwargs``; a preset's values are in it where no flag says more.
    """
    wanted = names or (PRESET, *(field.name for field in fields(MoEOptions)))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: _plain(values.pop(PREFIX + name)) for name in wanted}
            options = with_preset({name: value for name, value in given.items() if value is not None})
            command(**values, **{PARAMETER: options})

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [one for one in own if one.name != PARAMETER] + [_flag(name) for name in wanted]
        # What typer reads: the signature for order and defaults, the annotations for types.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def flag_name(option: str) -> str:
    """``expert_dtype`` is ``--moe-expert-dtype``."""
    return "--" + (PREFIX + option).replace("_", "-")


def _flag(name: str) -> inspect.Parameter:
    """None where the user says nothing, so that a preset can; the help shows the option's default all the same."""
    defaults = {field.name: field.default for field in fields(MoEOptions)}
    kind: Any = get_type_hints(MoEOptions).get(name, str)
    choices = field_choices().get(name)
    if choices is not None:
        kind = enum.Enum(name, {choice: choice for choice in choices}, type=str)  # type: ignore[misc, no-redef]
    flag = typer.Option(
        flag_name(name),
        help={**field_help(), PRESET: PRESET_HELP}[name],
        metavar=_METAVARS.get(name),
        show_default=str(defaults[name]) if defaults.get(name) else False,
        rich_help_panel=PANEL,
    )
    annotation = Annotated[kind | None, flag]
    return inspect.Parameter(PREFIX + name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else value
