"""Standard streams that end no run: closed, gone, full, or in an encoding without our letters.

Results are in files; what a run prints is a display, which may vanish at any time.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

missing: set[str] = set()  # standard streams that this process was started without


def open_missing() -> None:
    """Give a process that was started without standard streams some that lead nowhere.

    Call it before anything else is opened: the system gives the next file the first free number,
    and what libraries print to number 2 would end up in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            missing.add(("stdin", "stdout", "stderr")[number])
            # The first free number is this one, because those below are in use by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def choose_encodings() -> None:
    r"""Print what an encoding lacks as ``\u732b``; read lists as the system names its files."""
    with contextlib.suppress(OSError):  # it has been read from
        if hasattr(sys.stdin, "reconfigure"):
            names = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
            sys.stdin.reconfigure(encoding=names[0], errors=names[1])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have no encoding to choose
            stream.reconfigure(errors="backslashreplace")


class _Display:
    """A text stream whose failures to write are forgotten; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # the latter if it was closed
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def only_displayed(*names: str) -> Iterator[None]:
    """Within the context, nothing ends because ``stdout`` or ``stderr`` cannot be written to.

    The terminal may be closed, the reader of a pipe may leave, the disk of a log may be full.

    Args:
        names: of the streams.
    """
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        setattr(sys, name, _Display(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
            drain(stream)


def drain(stream: Any) -> None:
    """Write what a stream still holds, or drop it: Python would make it an error at its exit."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # a stream of a test has no number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
