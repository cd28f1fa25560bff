"""Where the C library takes memory from."""

import ctypes
import os
import sys

M_ARENA_MAX = -8  # of glibc's malloc.h
CORES_PER_ARENA = 8


def share_memory() -> None:
    """Lets eight cores share one of glibc's arenas, from which threads take memory and to which they give it back.

    Else every core has eight. What the threads of one save gave back is then not there for those of the next, which
    have other arenas, and a process that saves grows without a leak (glibc 2.36, two cores: by 3% from step 500 to
    2,000 of a tiny run, and with one arena by 0.7%). It must be said before there are many threads. MALLOC_ARENA_MAX
    and GLIBC_TUNABLES come first; other C libraries have no arenas.
    """
    told = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not told and sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_ARENA_MAX, max(1, (os.cpu_count() or 1) // CORES_PER_ARENA))
