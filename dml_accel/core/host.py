"""The surroundings of a process: folders for caches, and its C and OpenMP libraries.

Results do not depend on any of it.
"""

import contextlib
import ctypes
import gc
import getpass
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from dml_accel.core.errors import UsageError
from dml_accel.core.files import can_be_made

# Numbers of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 * 2**20  # bytes
# A thousand looks, some ten microseconds: benchmarks/machine.md has what they cost on a quiet
# machine and save on a busy one.
SPINS = "1000"
_HUB_CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
HUB_PREFIX = "hf-hub:"


def expanded(path: str | Path) -> Path:
    """Return a path with the home directory in place of ``~``.

    Raises:
        UsageError: that home directory cannot be found.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: there is no such home directory; write the path out") from error


def is_on_hub(text: str) -> bool:
    """Whether a text names a model of the hub, ``hf-hub:owner/name[@revision]``, and not a path."""
    return text.startswith(HUB_PREFIX)


def cache_dir() -> Path | None:
    """Return the folder of decoded images: ``$DML_CACHE``, else ``~/.cache/dml_accel``.

    An empty ``DML_CACHE`` is as good as none. Without a home directory there is no such folder:
    None, never one that is called ``~``.
    """
    try:
        return expanded(os.environ.get("DML_CACHE") or "~/.cache/dml_accel")
    except UsageError:
        return None


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forget_empty_variables() -> None:
    """Unset what is set to nothing; call it before the hub's libraries are imported.

    They would take an empty name for the current folder.
    """
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", *_HUB_CACHES):
        if os.environ.get(name) == "":
            del os.environ[name]


def name_user() -> None:
    """Give a user without an entry in the password file a name; call it before torch is imported.

    Older versions of torch name a folder of compiled code after the user, and end without a name.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid_{os.getuid()}"


def require_hub_cache() -> None:
    """Make sure that the hub's libraries have a folder to keep files in.

    Raises:
        UsageError: they would make a folder that is called ``~``, or cannot make theirs.
    """
    if all(os.environ.get(name) for name in _HUB_CACHES):
        return
    remedy = "set HF_HOME to a folder for them, and DML_CACHE to one for decoded images"
    try:
        folder = expanded(
            os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        )
    except UsageError as error:
        raise UsageError(f"there is no home directory for files from the hub: {remedy}") from error
    if not folder.exists() and not can_be_made(folder):
        raise UsageError(f"files from the hub cannot be kept in {folder}: {remedy}")


@contextlib.contextmanager
def ignoring_hangup() -> Iterator[None]:
    """Within the context, closing the terminal does not end this process, as with ``nohup``."""
    if threading.current_thread() is not threading.main_thread():  # only it can handle signals
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


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


@contextlib.contextmanager
def importing_for_good() -> Iterator[None]:
    """Within the context, nothing is searched for garbage, and what it leaves behind never is.

    Libraries leave a million objects that stay until the process ends. To search them again and
    again takes a tenth of a command's start, and a quarter of a second each time after that.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
