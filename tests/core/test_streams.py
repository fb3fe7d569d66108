"""Standard streams: missing, gone, full, or in an encoding without our letters."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from dml_accel.core.streams import choose_encodings, drain, only_displayed, open_missing

# Which standard streams are closed at the start, as a shell writes it.
CLOSED = ["2>&-", ">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"]
STARTED = """
import os, sys
sys.path[:0] = [os.getcwd()]
from dml_accel.core.streams import open_missing
open_missing()
found = open(sys.argv[1], "w")
print(found.fileno(), file=found)
found.flush()
print("shown"), print("shown", file=sys.stderr), sys.stdin.isatty()
os.write(2, b"from a library")
assert os.system("echo from a child; echo to number 2 >&2") == 0
"""


@pytest.mark.parametrize("closed", CLOSED)
def test_a_file_is_never_opened_as_a_standard_stream(closed: str, tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-c", STARTED, str(tmp_path / "found")]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], capture_output=True)
    assert done.returncode == 0
    number, *rest = (tmp_path / "found").read_text().split("\n")
    assert int(number) > 2 and rest == [""]


def test_streams_that_are_there_stay() -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    open_missing()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def full() -> TextIO:
    return open("/dev/full", "w")


def left() -> TextIO:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def hung_up() -> TextIO:
    """A terminal that was closed."""
    master, slave = os.openpty()
    os.close(master)
    return open(slave, "w")


def closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("broken", [full, left, hung_up, closed])
def test_a_display_may_vanish(
    broken: Callable[[], TextIO], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = broken()
    monkeypatch.setattr(sys, name, stream)
    with pytest.raises((OSError, ValueError)):
        print("not shown", file=stream, flush=True)
    with only_displayed(name):
        for _ in range(3):
            print("not shown " * 2000, file=getattr(sys, name), flush=True)
        assert getattr(sys, name).isatty() is False if broken is not closed else True
    assert getattr(sys, name) is stream
    if broken is not closed:
        stream.close()  # nothing is left that could fail


def test_only_the_named_stream_may_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = full()
    monkeypatch.setattr(sys, "stdout", stream)
    with only_displayed("stderr"), pytest.raises(OSError, match="No space"):
        print("a result", flush=True)
    drain(stream)
    stream.close()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "café 猫 \\udce9"),
        ("latin-1", "café \\u732b \\udce9"),
        ("ascii", "caf\\xe9 \\u732b \\udce9"),
    ],
)
def test_letters_that_an_encoding_lacks_are_shown_by_number(
    encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    choose_encodings()
    for stream in (sys.stdout, sys.stderr):
        print("café 猫 \udce9", end="", file=stream, flush=True)
        assert stream.buffer.getvalue().decode(encoding) == shown
