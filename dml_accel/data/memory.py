"""Memory that images may use: what there is, what is left of it, and what is refused."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from dml_accel.core.errors import UsageError

_BYTES_PER_PIXEL = 7  # 3 decoded, 4 as batches are cut from them
# What a control group may use, uses, and uses for what, in both versions of them.
_GROUPS = (
    tuple(f"/sys/fs/cgroup/memory.{name}" for name in ("max", "current", "stat")),
    tuple(
        f"/sys/fs/cgroup/memory/memory.{name}"
        for name in ("limit_in_bytes", "usage_in_bytes", "stat")
    ),
)


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of this control group if it may use less.

    That is what there is in all, whatever of it is free, divided by the training processes here.
    """
    most = [psutil.virtual_memory().total]
    for limit, _, _ in _GROUPS:
        try:
            most.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return min(most) // processes_here()


def require_memory(images: int, size: int) -> None:
    """Refuse images that do not fit into the memory that is left.

    Args:
        images: of all splits of a run.
        size: pixels per side.

    Raises:
        UsageError: the text says how much they need, and what needs less.
    """
    if bytes_needed(images, size) > _memory_left():
        raise UsageError(memory_text(images, size))


def require_bytes(needed: float, what: str) -> None:
    """Refuse what needs more memory than is left.

    Args:
        needed: bytes.
        what: needs them.

    Raises:
        UsageError: the text says how much is needed and left.
    """
    left = max(0, _memory_left())
    if needed > left:
        raise UsageError(
            f"{what} need about {needed / 2**30:.1f} GiB of memory, and {left / 2**30:.1f} GiB are "
            "left: use --feed loader, which reads each when it is needed"
        )


def memory_text(images: int, size: int) -> str:
    """Return that images do not fit into memory, what they need, and what needs less."""
    needed, left = bytes_needed(images, size), max(0, _memory_left())
    return (
        f"{images:,} images of {size} x {size} pixels need {needed / 2**30:.1f} GiB of memory, and "
        f"{left / 2**30:.1f} GiB are left: use --feed loader, which reads each when "
        "it is needed, a smaller --image-size or a --train-limit"
    )


def bytes_needed(images: int, size: int) -> int:
    """Return the bytes that ``images`` squares of ``size`` pixels need."""
    return images * size * size * _BYTES_PER_PIXEL


def _memory_left() -> int:
    """Return the bytes that this process may still use, by the system, its group and its limit."""
    left = [psutil.virtual_memory().available]
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            left.append(limit - psutil.Process().memory_info().vms)
    except (ImportError, OSError):  # not on every system
        pass
    left += [size for size in map(_left_in_group, _GROUPS) if size is not None]
    return min(left) // processes_here()


def _left_in_group(files: Sequence[str]) -> int | None:
    """Return the bytes left to this process's control group; None if there is none or no limit."""
    try:
        most, used, listed = (Path(name).read_text(encoding="ascii") for name in files)
        entries = dict(line.split() for line in listed.splitlines())
        # Pages of files count as used, but are given up when memory is short.
        freed = int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
        return int(most) - int(used) + freed
    except (OSError, ValueError):
        return None


def processes_here() -> int:
    """Return the training processes of this machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(here) if here.isdecimal() and int(here) else 1
