"""What a run asks of the C and OpenMP libraries."""

import os
import re
import sys

import pytest

from dml_accel.core import host
from tests.helpers import run_program

needs_glibc = pytest.mark.skipif(not host._is_glibc(), reason="the C library is not glibc")

# Where glibc puts a block of 64 MB: in the heap, which it keeps, or in a mapping of its own.
BLOCK = """
import ctypes, re
from dml_accel.core import host
{setting}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(ctypes.c_size_t(64 * 2**20))
for line in open("/proc/self/maps"):
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    if low <= block < high:
        print("heap" if "[heap]" in line else "mapping")
"""


@needs_glibc
@pytest.mark.parametrize(
    ("setting", "variables", "place"),
    [
        ("", {}, "mapping"),
        ("assert host.keep_memory()", {}, "heap"),
        ("assert not host.keep_memory()", {"MALLOC_TOP_PAD_": "0"}, "mapping"),
    ],
)
def test_large_blocks_stay_with_the_process(
    setting: str, variables: dict[str, str], place: str
) -> None:
    done = run_program(sys.executable, "-c", BLOCK.format(setting=setting), **variables)
    assert (done.stdout.strip(), done.stderr) == (place, "")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", confstr)
    assert not host.keep_memory()


@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, host.SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_is_told_before_torch_loads_it(variables: dict[str, str], spins: str | None) -> None:
    words = (sys.executable, "train.py", "--cohort", "no_such_network", "--cpu")
    done = run_program(*words, OMP_DISPLAY_ENV="verbose", **variables)
    assert done.returncode == 2
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch uses another OpenMP than GNU's")
    assert found[1] == spins if spins else found[1] != host.SPINS
