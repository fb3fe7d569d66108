"""What a run asks of the C and OpenMP libraries, and of Python."""

import gc
import getpass
import os
import pwd
import re
import sys
from pathlib import Path

import pytest

from dml_accel.core import host
from dml_accel.core.errors import UsageError
from tests.helpers import run_program

needs_glibc = pytest.mark.skipif(not host._is_glibc(), reason="the C library is not glibc")

# Where glibc puts a block of 64 MB: in the heap, which it keeps, or in a mapping of its own.
BLOCK = """
import ctypes, re
from dml_accel.core import host
from dml_accel.core.errors import UsageError
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


def test_what_is_imported_for_good_is_not_searched_for_garbage() -> None:
    gc.unfreeze()
    try:
        with host.importing_for_good():
            assert not gc.isenabled()
            kept = [object()]
        assert gc.isenabled()
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(one is kept for one in gc.get_objects())


def test_openmp_is_told_before_torch_loads_it() -> None:
    words = (sys.executable, "train.py", "--cohort", "no_such_network", "--cpu")
    done = run_program(*words, OMP_DISPLAY_ENV="verbose")
    assert done.returncode == 2
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch uses another OpenMP than GNU's")
    assert found[1] == host.SPINS


@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, host.SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_what_openmp_was_told_before_is_kept(
    variables: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    host.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process without HOME whose user has no entry in the password file."""

    def getpwuid(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in ("HOME", "DML_CACHE", "HF_HOME", "XDG_CACHE_HOME", *host._HUB_CACHES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DML_CACHE": "/here"}, "/here"),
        ({"DML_CACHE": "~/here", "HOME": "/me"}, "/me/here"),
        ({"DML_CACHE": "", "HOME": "/me"}, "/me/.cache/dml_accel"),
        ({"HOME": "/me"}, "/me/.cache/dml_accel"),
        ({}, None),
        ({"DML_CACHE": ""}, None),
        ({"DML_CACHE": "~/here"}, None),
    ],
)
def test_the_folder_of_decoded_images(
    homeless: pytest.MonkeyPatch, variables: dict[str, str], folder: str | None
) -> None:
    for name, value in variables.items():
        homeless.setenv(name, value)
    assert host.cache_dir() == (folder and Path(folder))


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({}, "there is no home directory"),
        ({"HF_HOME": "~/hf"}, "there is no home directory"),
        ({"HOME": "/proc/none"}, "cannot be kept in /proc/none/.cache"),
        ({"HF_HOME": "/proc/none"}, "cannot be kept in /proc/none"),
        ({"HF_HUB_CACHE": "/a"}, "there is no home directory"),
        ({"HF_HUB_CACHE": "/a", "HF_DATASETS_CACHE": "/b"}, None),
        ({"HF_HOME": "/proc"}, None),  # what is there may be read, writable or not
    ],
)
def test_files_from_the_hub_need_a_folder(
    homeless: pytest.MonkeyPatch, variables: dict[str, str], fault: str | None
) -> None:
    # As a user that may not write everywhere would see it.
    homeless.setattr(host, "can_be_made", lambda folder: not str(folder).startswith("/proc"))
    for name, value in variables.items():
        homeless.setenv(name, value)
    if fault is None:
        host.require_hub_cache()
    else:
        with pytest.raises(UsageError, match=f"{fault}.*HF_HOME.*DML_CACHE"):
            host.require_hub_cache()


def test_who_has_no_name_is_given_one(homeless: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        homeless.delenv(name, raising=False)
    homeless.setenv("LOGNAME", "somebody")
    host.name_user()
    assert getpass.getuser() == "somebody"
    homeless.delenv("LOGNAME")
    host.name_user()
    assert getpass.getuser() == f"uid_{os.getuid()}"


def test_an_empty_variable_is_none(homeless: pytest.MonkeyPatch) -> None:
    homeless.setenv("HF_HOME", "")
    homeless.setenv("XDG_CACHE_HOME", "/cache")
    host.forget_empty_variables()
    assert ("HF_HOME" in os.environ, os.environ["XDG_CACHE_HOME"]) == (False, "/cache")


def test_a_home_that_is_not_there_is_named(homeless: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="~/runs: there is no such home directory"):
        host.expanded("~/runs")
