"""How glibc treats large blocks on the host; worth more on a CPU than most kernels."""

from __future__ import annotations

import ctypes
import sys

KEEP_BLOCKS_BELOW = 2**31 - 1  # bytes; the largest that mallopt takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = -1


def keep_large_blocks() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel after every operator.

    By default each activation above 32 MiB is mapped and page-faulted anew. Nor does the heap shrink: beyond any threshold whoever
    frees its last block pays for all that was free below it, 0.1 s per GiB, and the next to need that memory for its pages again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, KEEP_BLOCKS_BELOW)
        mallopt(_TRIM_THRESHOLD, _NEVER)
