"""Two hosts on one machine."""

import os
import shutil

import pytest

from tests.helpers import run_program


@pytest.fixture(scope="session")
def hosts() -> None:
    """Skip if no second host can be made (see two_hosts.sh)."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 for network namespaces")
    name = f"dml-probe-{os.getpid()}"
    if run_program("ip", "netns", "add", name).returncode:
        pytest.skip("network namespaces cannot be made here")
    run_program("ip", "netns", "del", name)
