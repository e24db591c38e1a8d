"""Up to how many rows an expert is the compiled kernel's, and from when on torch's GEMMs are faster: a measured table.

What ships was measured where ``docs/kernels.md`` says. ``benchmarks/kernels.py --tune`` measures this machine and
writes a file in the user's cache that goes before it, a line a shape. Nothing is measured behind the user's back:
on a busy machine that would be noise, and rounding would differ from one run to the next.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from fairseq_moe_opt.moe.kernels.extension import LEVELS

ALWAYS = 2**31
"""No number of rows was found at which torch is faster."""

_SHIPPED: Mapping[tuple[str, str], Mapping[str, int]] = {
    ("float32", "float32"): {"avx512": ALWAYS, "avx2": 4, "generic": 4},
    ("bfloat16", "bfloat16"): {"avx512_bf16": 256, "avx512": 4, "avx2": 4, "generic": 2},
    ("int8", "float32"): {"avx512_vnni": ALWAYS, "avx512": 16, "avx2": 8, "generic": 1},
    ("int8", "bfloat16"): {"avx512_vnni": 512, "avx512": 8, "avx2": 4, "generic": 1},
}
"""By dtype of the weights and of the rows: the least instruction set, and its limit."""


_TRANSPOSED: Mapping[torch.dtype, Mapping[str, int]] = {
    torch.float32: {"avx512": ALWAYS, "avx2": 4, "generic": 2},
    torch.bfloat16: {"avx512_bf16": 512, "avx512": 4, "avx2": 4, "generic": 2},
}
"""The same for matrices that lie transposed, of the rows' dtype; these are not measured again on other machines."""


def transposed_limit(weights: torch.dtype, level: int) -> int:
    """The most rows of one expert with transposed matrices that the compiled kernel takes; 0 for dtypes without any."""
    by_level = _TRANSPOSED.get(weights, {})
    return next((limit for name, limit in by_level.items() if LEVELS.index(name) <= level), 0)


@cache
def row_limit(weights: torch.dtype, rows: torch.dtype, model_width: int, ffn_width: int, level: int) -> int:
    """The most rows of one expert that the compiled kernel takes at place ``level`` of ``LEVELS``.

    Args:
        weights, rows: their dtypes.
        model_width, ffn_width: D and F.
        level: place of the instruction set in ``LEVELS``.
    """
    names = _name(weights), _name(rows)
    measured = _measured().get(shape_key(*names, model_width, ffn_width, level))
    return shipped_limit(*names, level) if measured is None else measured


def shipped_limit(weights: str, rows: str, level: int) -> int:
    """What the table that comes with the project says; 0 for dtypes it does not know."""
    by_level = _SHIPPED.get((weights, rows), {})
    return next((limit for name, limit in by_level.items() if LEVELS.index(name) <= level), 0)


def shape_key(weights: str, rows: str, model_width: int, ffn_width: int, level: int) -> str:
    """How a shape is called in the file; threads count, as they share the memory's bandwidth."""
    return f"{weights}/{rows}/{model_width}x{ffn_width}/{LEVELS[level]}/{torch.get_num_threads()} threads"


def limits_file() -> Path:
    """This machine's and this torch's own table."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "fairseq-moe-opt" / f"kernels-{platform.node()}-torch-{torch.__version__}.json"


def save_limits(limits: Mapping[str, int]) -> Path:
    """Add ``limits``, by ``shape_key``, to the file; they hold in processes that start from now on."""
    path = limits_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({**_read(path), **limits}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


@cache
def _measured() -> Mapping[str, int]:
    try:
        return _read(limits_file())
    except RuntimeError:  # no home folder
        return {}


def _read(path: Path) -> dict[str, int]:
    """What is in the file; nothing where it is not there or not what ``save_limits`` writes."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, int)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
