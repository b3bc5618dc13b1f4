"""Memory that is freed and soon needed again.

A training step makes tensors of the same sizes as the step before. glibc gives what is freed at the
end of its heap back to the system, and tensors above a size that it moves come from the system each
time; the next step then gets its memory page by page, each filled with zeros first. On a CPU that
was a seventh of a small network's step in bf16.
"""

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT = 2**30  # bytes free at the heap's end before any go back: more than a step's tensors
LARGEST = 2**25  # 32 MiB, the most that glibc takes: what is larger comes from the system each time
# Variables by which users decide that for themselves (mallopt(3), and glibc's manual under "Memory
# Allocation Tunables").
DECIDED_BY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Has this process keep what it frees, where its C library is glibc and the user has not
    decided. Returns whether it does."""
    if sys.platform != "linux" or any(name in os.environ for name in DECIDED_BY):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl, say, has other ways
        return False
    # Both, since setting one ends glibc's own choice of the other. mallopt returns 1 where it did.
    settings = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: KEPT}
    return all(library.mallopt(key, value) for key, value in settings.items())
