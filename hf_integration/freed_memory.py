"""Memory that a forward gives back is kept for the next one, instead of going back to the system.

Activations of a few megabytes are allocated and freed with every layer. glibc returns such memory to the system again
and again, which then hands it out anew, page by page, each with a fault and filled with zeros: on virtual machines that
takes a tenth of the time of a token. So it is told to keep up to ``KEPT_BYTES`` of what was freed. This is a setting of
the process and outlives ``undo()``. It is left as it is where the environment says something of it, or ``SWITCH``.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

SWITCH = "MOE_OPT_KEEP_MEMORY"
"""Environment variable: ``0`` leaves the allocator alone."""

KEPT_BYTES = 256 * 2**20
_LARGEST_FROM_HEAP = 32 * 2**20
"""Larger pieces are mapped apart, and go back at once: as large as glibc itself lets this become."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SAID = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep it; False where it is another library's affair or the user's. Done once a process."""
    if platform.libc_ver()[0] != "glibc" or os.environ.get(SWITCH) == "0":
        return False
    if any(name in os.environ for name in _SAID) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
