"""What the process does with memory that it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes

# Of glibc's malloc.h: give memory back to the system when more than so many bytes at the end of
# the heap are free, and ask the system for each allocation above so many.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MUCH = 2**30  # bytes


def keep_freed_memory() -> None:
    """From now on, let the process keep up to a gigabyte of memory that it has freed.

    A training step allocates the same memory as the one before. Given back in between, each page
    of it is a new one, which the system fills with zeros first: up to a quarter of a step. Does
    nothing where the C library is not glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, MUCH)
        mallopt(M_MMAP_THRESHOLD, MUCH)
