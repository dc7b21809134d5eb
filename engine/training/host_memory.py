"""How glibc treats large blocks on the host; worth more on a CPU than most kernels."""

from __future__ import annotations

import ctypes
import sys

KEEP_BLOCKS_BELOW = 1 << 30  # bytes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_large_blocks() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel after every operator.

    By default each activation above 32 MiB is mapped and page-faulted anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, KEEP_BLOCKS_BELOW)
        mallopt(_TRIM_THRESHOLD, KEEP_BLOCKS_BELOW)
