"""Experts stored in another dtype than the rest of a Transformers folder: int8 with scales, or bfloat16.

An int8 matrix keeps its name, and its scales are beside it: ``X.weight`` int8 (out, in) and ``X.weight_scale`` float32
(out,). The files' metadata and ``config.json`` say ``expert_dtype`` as well, which Transformers keeps and ignores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord
from fairseq_moe_opt.checkpoints.writers import Output, Part, write_json
from fairseq_moe_opt.errors import CheckpointError, OptionError

EXPERT_DTYPES = ("bf16", "int8")
"""Dtypes that experts alone can be converted to."""

NOTE = "expert_dtype"
"""The key in ``config.json`` and in the files' metadata."""

SCALE_SUFFIX = "_scale"

_EXPERT_TENSOR = re.compile(r".*\.experts\.(?:expert_)?\d+\.fc[12]\.(?P<kind>weight|bias)")


def scale_of(index: Mapping[str, TensorRecord], name: str) -> TensorRecord:
    """The scales of the int8 matrix ``name``; CheckpointError names the file where they are missing or misshapen."""
    matrix, scale = index[name], index.get(f"{name}{SCALE_SUFFIX}")
    if scale is None:
        raise CheckpointError(matrix.path, f"has int8 weights {name!r} without their scales {name + SCALE_SUFFIX!r}")
    if scale.shape != matrix.shape[:1]:
        raise CheckpointError(
            scale.path, f"tensor {scale.name!r} has shape {scale.shape}, the weights ask for {matrix.shape[:1]}"
        )
    return scale


def is_scale(index: Mapping[str, TensorRecord], name: str) -> bool:
    """Whether ``name`` holds the scales of an int8 matrix of ``index``."""
    matrix = index.get(name.removesuffix(SCALE_SUFFIX)) if name.endswith(SCALE_SUFFIX) else None
    return matrix is not None and matrix.dtype == torch.int8


def has_int8_experts(names_and_dtypes: Iterable[tuple[str, torch.dtype]]) -> bool:
    """Whether any expert's matrix (under Transformers' names) is int8."""
    return any(dtype == torch.int8 and _EXPERT_TENSOR.fullmatch(name) for name, dtype in names_and_dtypes)


def require_float_experts(index: CheckpointIndex) -> None:
    """CheckpointError for int8 experts, which fairseq's layout has no place for."""
    if has_int8_experts((name, record.dtype) for name, record in index.items()):
        raise CheckpointError(
            index.path, "its experts are int8, which fairseq cannot hold; convert the checkpoint they were made from"
        )


def with_expert_dtype(outputs: Sequence[Output], expert_dtype: str | None, index: CheckpointIndex) -> list[Output]:
    """``outputs`` with the experts' tensors stored as ``expert_dtype`` says; None changes nothing.

    int8 is of the matrices, with their scales after them; bf16 of all floats of an expert. Raises OptionError for an
    unknown name, CheckpointError for a checkpoint without experts or with int8 ones.
    """
    if expert_dtype is None:
        return list(outputs)
    if expert_dtype not in EXPERT_DTYPES:
        raise OptionError(NOTE, f"{expert_dtype!r} is not one of {', '.join(EXPERT_DTYPES)}")
    if has_int8_experts((output.name, output.dtype) for output in outputs):
        raise CheckpointError(index.path, "its experts are int8 already; convert the checkpoint they were made from")
    changed = [one for output in outputs for one in _converted(output, expert_dtype)]
    if changed == list(outputs) and not any(_EXPERT_TENSOR.fullmatch(output.name) for output in outputs):
        raise CheckpointError(index.path, f"has no experts that could become {expert_dtype}")
    return changed


def write_note(folder: Path, outputs: Sequence[Output], expert_dtype: str | None, dtype: str | None) -> dict[str, str]:
    """Note in ``folder/config.json``, if there is one, how its experts are stored; returns the files' metadata.

    A note that came with the source is dropped where ``dtype`` made all tensors alike.
    """
    if has_int8_experts((output.name, output.dtype) for output in outputs):
        expert_dtype = "int8"
    config = folder / "config.json"
    if config.is_file() and (expert_dtype is not None or dtype is not None):
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        content.pop(NOTE, None)
        write_json(config, content if expert_dtype is None else {**content, NOTE: expert_dtype})
    return {} if expert_dtype is None else {NOTE: expert_dtype}


def _converted(output: Output, expert_dtype: str) -> list[Output]:
    match = _EXPERT_TENSOR.fullmatch(output.name)
    if match is None or not output.dtype.is_floating_point:
        return [output]
    if expert_dtype == "bf16":
        return [replace(output, dtype=torch.bfloat16)]
    if match["kind"] == "bias":
        return [output]
    return [
        replace(output, dtype=torch.int8, part=Part.CODES),
        Output(f"{output.name}{SCALE_SUFFIX}", output.record, torch.float32, Part.SCALE),
    ]
