"""Several processes of one script, forked from one that has imported the package.

    python tests/forked.py NUMBER SCRIPT [WORDS]

A process that a launcher starts takes five seconds of a core to import torch and timm, more than
what most of our tests then compute. Here one process imports them for all. Each has what a launcher
would tell it (``RANK`` and so on); what launchers do is tested with them. As soon as one fails, the
others are killed. The exit code is that of the one that failed, or 0.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import dml_accel.training.train  # noqa: F401
from tests.helpers import free_port


def main(number: int) -> int | None:
    """Start the processes and wait for them; return None in each of them, which is to go on."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    running = []
    for rank in range(number):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return None
        running.append(child)
    failed = 0
    while running:
        ended, status = os.wait()
        running.remove(ended)
        if status and not failed:
            failed = abs(os.waitstatus_to_exitcode(status))
            for other in running:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    if code is not None:
        sys.exit(code)
    del sys.argv[:2]
    sys.path[:2] = [str(Path(sys.argv[0]).parent)]  # as if Python had started it
    runpy.run_path(sys.argv[0], run_name="__main__")
