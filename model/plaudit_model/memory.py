"""The C library's allocator, told what a forward on a CPU is like."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for the whole process; False where the C library is another.

    By default it takes every tensor of a forward from the system and gives it back: each page of it is faulted in and
    zeroed anew, which cost 8 to 17% of a forward of a 25M-parameter decoder. The price: the process stays as large as
    its largest batch made it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_TOP_PAD, 1 << 26))
