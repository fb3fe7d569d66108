"""What a step costs on a quiet and on a busy machine, by what a run asks of its C libraries.

    python -m benchmarks.machine [--blocks 4]

Steps of a ResNet-8 pair on noise, with batches of 64 and of 1024; with nothing else to do, and
beside as many busy processes as there are cores. Each variant has a process of its own, and all
take turns. Writes benchmarks/machine.json and .md.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import measure
from benchmarks.competitors import Competitor
from benchmarks.measuring import HERE, ratio, surroundings
from dml_accel.core.host import SPINS
from dml_accel.core.tables import table

_LIBRARIES = "as the libraries do"
_GNU_SPINS = "300000"  # before a waiting thread sleeps, unless the environment says otherwise
# name: spins, and whether the memory of a step is returned.
VARIANTS = {
    _LIBRARIES: (_GNU_SPINS, True),
    "threads sleep soon": (SPINS, True),
    "memory is kept": (_GNU_SPINS, False),
    "both: the default": (SPINS, False),
}
# Batch: steps in a block.
BATCHES = {64: 12, 1024: 1}


def variants(batch: int) -> list[Competitor]:
    """Return what is measured with batches of one size."""
    return [
        Competitor(
            name,
            "training",
            {"cohort": ["resnet8*2"], "batch_size": batch, "return_memory": returned},
            environment={"GOMP_SPINCOUNT": spins},
        )
        for name, (spins, returned) in VARIANTS.items()
    ]


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep other processes busy within the context."""
    words = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(words) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def read(batch: int, others: int, blocks: int) -> list[dict[str, Any]]:
    """Return the readings of all variants, beside some busy processes."""
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        turns = measure(variants(batch), None, blocks + 1, BATCHES[batch], Path(logs))
        readings = next(turns)
        for record in readings:
            record["seconds"].clear()  # nothing else was busy in the first block
        stack.enter_context(busy(others))
        return list(turns)[-1]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the table: milliseconds of a step, times the libraries' own, and memory."""
    lines = []
    for part in found["parts"]:
        base = part["readings"][0]["seconds"]
        for one in part["readings"]:
            step = 1e3 * median(one["seconds"]) / one["steps"]
            times = "1" if one["name"] == _LIBRARIES else str(ratio(one["seconds"], base))
            memory = f"{one['memory_bytes'] / 2**30:.2f}"
            machine = f"{part['busy']} busy processes" if part["busy"] else "quiet"
            lines.append([str(part["batch"]), machine, one["name"], f"{step:.0f}", times, memory])
    return lines


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--blocks", type=int, default=4, help="how many (default: 4)")
    given = parser.parse_args()
    cores = os.cpu_count() or 1
    parts = [
        {"batch": batch, "busy": others, "readings": read(batch, others, given.blocks)}
        for batch in BATCHES
        for others in (0, cores)
    ]
    found = surroundings() | {
        "parts": parts,
        "command": "python " + shlex.join(["-m", "benchmarks.machine", *sys.argv[1:]]),
    }
    heads = ["batch", "machine", "variant", "ms per step", "times the libraries' own", "GiB"]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"""# What a run asks of its machine

ResNet-8 pair in single precision, 32 pixels, 2 threads; {given.blocks} blocks in which all variants
take turns. Medians; ratios are geometric means with 95% intervals; memory is the peak of the
process above its imports.

{table(rows(found), heads, "github", left=3)}

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{found["command"]}`
"""
    (HERE / "machine.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "machine.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
