"""Reading byte ranges of files into memory that is already there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

# Linux transfers at most 0x7ffff000 bytes in one read call; smaller pieces cost nothing.
_MAX_READ = 1 << 30


def memory_of(tensor: torch.Tensor, nbytes: int) -> memoryview:
    """The first ``nbytes`` bytes under a contiguous CPU tensor; the tensor has to outlive the view."""
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def read_range(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill ``buffers`` one after the other from byte ``offset``; returns the bytes read, fewer only at the file's end.

    A read that stops short is taken up again. Raises OSError as the system does.
    """
    left = [buffer for buffer in buffers if len(buffer)]
    done = 0
    while left:
        once = left if sum(map(len, left)) <= _MAX_READ else [left[0][:_MAX_READ]]
        got = os.preadv(descriptor, once, offset + done)
        if got == 0:
            break
        done += got
        while left and got >= len(left[0]):
            got -= len(left.pop(0))
        if got:
            left[0] = left[0][got:]
    return done


def expect_scattered_reads(descriptor: int) -> None:
    """Tell the system not to read ahead: what lies behind a range is not wanted next. A hint, nothing more."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def drop_pages(descriptor: int, offset: int, nbytes: int) -> None:
    """Tell the system that it need not keep a copy of this range. A hint; does nothing where there is no such call."""
    if hasattr(os, "posix_fadvise"):
        start = offset - offset % mmap.PAGESIZE
        length = -(-(offset + nbytes - start) // mmap.PAGESIZE) * mmap.PAGESIZE
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)
