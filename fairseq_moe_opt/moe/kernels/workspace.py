"""Scratch space that each thread keeps between calls."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_KEPT_BYTES = 64 * 2**20
"""Largest scratch space a thread keeps between calls; a larger one is given back after use."""


class ThreadWorkspace:
    """Named scratch buffers of the calling thread.

    Kept between calls: the allocator returns large blocks to the system at once, and touching fresh pages costs more
    than a small GEMM.
    """

    def __init__(self) -> None:
        self._buffers = threading.local()

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """(``rows``, ``width``) uninitialised CPU memory, this thread's until it takes ``name`` again."""
        numel = rows * width
        kept: Tensor | None = getattr(self._buffers, name, None)
        if kept is None or kept.dtype != dtype or kept.numel() < numel:
            kept = torch.empty(numel, dtype=dtype)
            if kept.numel() * kept.element_size() <= _KEPT_BYTES:
                setattr(self._buffers, name, kept)
        return kept[:numel].view(rows, width)
