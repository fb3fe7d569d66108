"""Locks: who holds them, and file systems that have none."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from dml_accel.core.locks import Lock, lock


def test_a_lock_has_one_holder_or_several_that_share_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "a+") as first, open(path, "a+") as second:
        assert lock(first, wait=False) == (Lock.OURS, "")
        assert lock(second, wait=False)[0] is Lock.ANOTHERS
        assert lock(second, wait=False, shared=True)[0] is Lock.ANOTHERS
        first.close()
        assert lock(second, wait=False, shared=True) == (Lock.OURS, "")
        with open(path) as third:
            assert lock(third, wait=False, shared=True) == (Lock.OURS, "")


@pytest.mark.parametrize(
    ("code", "became"),
    [
        *((code, Lock.ANOTHERS) for code in ("EWOULDBLOCK", "EAGAIN", "EACCES")),
        *((code, Lock.UNSUPPORTED) for code in ("ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK")),
        *((code, Lock.UNSUPPORTED) for code in ("EINVAL", "EIO", "EBADF", "ESTALE", "EPERM")),
    ],
)
def test_only_some_errors_mean_another_process(
    code: str, became: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    number = getattr(errno, code)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "a+") as file:
        assert lock(file, wait=True) == (became, os.strerror(number))
