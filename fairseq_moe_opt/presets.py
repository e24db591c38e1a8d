"""Presets: YAML files that give several options at once, by the name of one that comes with the project or by path.

A preset's keys are the fields of :class:`~fairseq_moe_opt.options.MoEOptions`. What a user gives beside it wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.options import MoEOptions

PRESET = "preset"
"""Keyword argument that names a preset; ``--moe-preset`` and ``moe_preset`` elsewhere."""

PRESET_HELP = "several options at once: the name of a preset that comes with the project, or a YAML file of options"

_SUFFIXES = (".yaml", ".yml")


def configs_folder() -> Path:
    """The project's YAML files: inside the package when installed, in ``configs`` beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def presets_folder() -> Path:
    """Where the presets are."""
    return configs_folder() / "presets"


def preset_names() -> tuple[str, ...]:
    """The presets that come with the project."""
    return tuple(sorted(path.stem for path in presets_folder().glob("*.yaml")))


def read_preset(name: str | Path) -> dict[str, Any]:
    """The options in a preset; OptionError naming the file and the key for what is no option or a wrong value."""
    path = _find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(PRESET, f"{path} cannot be read: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise OptionError(PRESET, f"{path} holds a {type(content).__name__}, not lines such as 'gating: dynamic'")
    values = {str(key): value for key, value in content.items()}
    try:
        MoEOptions.from_kwargs(**values)
    except OptionError as error:
        message = str(error).split(": ", 1)[1]
        raise OptionError(PRESET, f"{path}: key {error.option!r}: {message}") from None
    return values


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` (options by name) without their ``preset``, whose options stand in where they say nothing."""
    given = dict(values)
    preset = given.pop(PRESET, None)
    return given if preset is None else {**read_preset(preset), **given}


def _find(name: str | Path) -> Path:
    known = preset_names()
    if str(name) in known:
        return presets_folder() / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in _SUFFIXES or path.name != str(name):
        raise OptionError(PRESET, f"{name}: no such file")
    raise OptionError(PRESET, f"{str(name)!r} is neither a file nor one of {', '.join(known)}")
