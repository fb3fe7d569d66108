"""One process of a launch in which several runs follow each other.

    torchrun --nproc_per_node 2 tests/in_turn.py RUNS.json FOLDER

``RUNS.json`` maps a run's name to the words of its command. What this process says in a run is in
FOLDER/NAME.RANK.err; FOLDER/RANK.json lists for each run its exit code, its seconds and the bytes
sent from GLOO_SOCKET_IFNAME, without the headers of Ethernet, IP and TCP: the number of packets
depends on how busy the machine is. The exit code is that of the last run.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from dml_accel import cli

_HEADERS = 14 + 20 + 32  # bytes; TCP's are with time stamps


def sent() -> int:
    """The bytes that this host has sent; 0 if no interface is named."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if not interface:
        return 0
    statistics = Path(f"/sys/class/net/{interface}/statistics")
    total, packets = (int((statistics / f"tx_{of}").read_text()) for of in ("bytes", "packets"))
    return total - packets * _HEADERS


def run(words: list[str], said: Path) -> dict[str, Any]:
    """Run a command; return how it went."""
    whole, started, before = os.dup(2), time.monotonic(), sent()
    with said.open("w") as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            code = cli.main(words)
        finally:
            sys.stderr.flush()
            os.dup2(whole, 2)
    return {"code": code, "seconds": time.monotonic() - started, "sent": sent() - before}


def main(runs: str, folder: str) -> int:
    """Run every command in turn."""
    rank, found = os.environ["RANK"], {}
    for name, words in json.loads(Path(runs).read_text()).items():
        found[name] = run(words, Path(folder) / f"{name}.{rank}.err")
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    return found[name]["code"]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
