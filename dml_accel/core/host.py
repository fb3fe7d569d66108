"""What a run asks of the C and OpenMP libraries of its machine; results do not depend on it."""

import contextlib
import ctypes
import os

# Numbers of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 * 2**20  # bytes
# A thousand looks, some ten microseconds: benchmarks/machine.md has what they cost on a quiet
# machine and save on a busy one.
SPINS = "1000"


def keep_memory() -> bool:
    """Make glibc keep the memory of a step for the next one; return whether it does.

    By default it returns large blocks to the system as soon as they are free, and the next step
    waits while the system clears them again. Nothing is changed with another C library, or where
    environment variables say what glibc should do.
    """
    given = [name for name in os.environ if name.startswith("MALLOC_")]
    if given or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mappings of their own for large blocks, and never shrink the heap: both as documented, and
    # without the upper limit that M_MMAP_THRESHOLD has in older versions.
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD))
    accepted = [mallopt(name, value) == 1 for name, value in wanted]
    return all(accepted)


def _is_glibc() -> bool:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    return False


def wait_briefly() -> None:
    """Let OpenMP threads that wait for each other sleep soon; call it before torch is imported.

    GNU OpenMP spins for some milliseconds first. On a machine with other work that time is taken
    from the very thread that the others wait for, at each of thousands of barriers in a step.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
