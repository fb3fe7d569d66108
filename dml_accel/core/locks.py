"""Locks on files by flock, which the system releases when a process dies; some have none."""

import enum
import errno
import fcntl
from typing import IO, Any

# What flock(2) says where another process holds the lock; EACCES is that of locks over a network.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Lock(enum.Enum):
    """What became of a lock that was asked for."""

    OURS = "ours"
    ANOTHERS = "held by another process"
    UNSUPPORTED = "not supported"  # by the file system: some of Lustre, NFS and FUSE


def lock(file: IO[Any], *, wait: bool, shared: bool = False) -> tuple[Lock, str]:
    """Lock an open file until it is closed; return what became of it, and the system's words.

    Args:
        file: opened for writing, because a file system of a network may ask for that.
        wait: until no other process holds it.
        shared: with other processes that share it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        words = error.strerror or str(error)
        # Whatever else goes wrong says nothing about other processes.
        return Lock.ANOTHERS if error.errno in _HELD else Lock.UNSUPPORTED, words
    return Lock.OURS, ""
