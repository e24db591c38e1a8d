"""Finds and loads the compiled part of the ``fused`` kernel, which an installation without a compiler does not have."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

SWITCH = "MOE_OPT_FUSED"
"""Environment variable: ``0`` leaves the compiled kernel alone, as if it had not been built."""

LEVELS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
"""Instruction sets the kernel is compiled for, each with all before it."""

_ALLOWED: Mapping[str, str] = {"DEFAULT": "generic", "AVX2": "avx2"}
"""What torch limits itself to (``ATEN_CPU_CAPABILITY``) limits this kernel too; it takes all otherwise."""

_NAME = "_fused"
_VERSION = 3
"""Least ``moe_fused_version()`` of ``native/fused.cpp`` that this code can call."""


class FusedCall(ctypes.Structure):
    """``struct MoeFusedCall`` of ``native/fused.cpp``, field by field."""

    _fields_ = (
        ("rows", c_void_p),
        ("out", c_void_p),
        ("experts", c_void_p),
        ("num_experts", c_int64),
        ("model_width", c_int64),
        ("ffn_width", c_int64),
        ("rows_dtype", c_int64),
        ("weights_dtype", c_int64),
        ("activation", c_int64),
        ("level", c_int64),
        ("threads", c_int64),
        ("alpha", c_double),
        ("limit", c_double),
        ("offset", c_double),
    )


class Extension:
    """The loaded library.

    Attributes:
        level: place in ``LEVELS`` of the best instruction set that this machine has and torch may use.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "moe_fused_version") or library.moe_fused_version() < _VERSION:
            raise OSError("it was built from older sources; install the project again")
        self._run = library.moe_fused_run
        self._run.argtypes, self._run.restype = (ctypes.POINTER(FusedCall), c_void_p), c_int64
        library.moe_fused_use_openmp.argtypes = (c_void_p,)
        library.moe_fused_use_openmp(_openmp())
        allowed = _ALLOWED.get(torch.backends.cpu.get_cpu_capability(), LEVELS[-1])
        self.level: int = min(library.moe_fused_level(), LEVELS.index(allowed))

    def scratch_bytes(self, call: FusedCall) -> int:
        """Scratch space that ``run`` needs for this call."""
        return self._checked(self._run(ctypes.byref(call), None))

    def run(self, call: FusedCall, scratch: int) -> None:
        """Compute, with scratch space at that address."""
        self._checked(self._run(ctypes.byref(call), scratch))

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise MemoryError("the fused kernel could not allocate memory")
        return result


def _openmp() -> int | None:
    """Address of ``GOMP_parallel`` of the OpenMP runtime that torch brought, so that both share their threads."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError, TypeError):  # another runtime, or a system where names are not found so
        return None


@cache
def load() -> Extension | str:
    """The extension, or why there is none; decided once a process."""
    if os.environ.get(SWITCH) == "0":
        return f"it is switched off by {SWITCH}=0"
    folder = Path(__file__).parent
    found = [folder / f"{_NAME}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        return "its extension was not built; with a C++ compiler, install the project again to have it"
    try:
        return Extension(path)
    except OSError as error:
        return f"its extension cannot be loaded ({error})"
