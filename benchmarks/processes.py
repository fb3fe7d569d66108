"""Two processes of one thread each against one process of two threads, and what decides it.

    python -m benchmarks.processes [--rounds 5]

Whole runs of train.py (a ResNet-32 pair, batch 64) that differ in one thing each, in turn, several
rounds; the ratios are of runs of the same round. Writes benchmarks/processes.json and .md.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring import HERE, MEMORY_KEPT, processor, ratio
from dml_accel.core.versions import commit, versions

BIN = Path(sys.executable).parent
TOGETHER = ["--placement", "replicate"]
# name: processes, threads of each, environment, flags
VARIANTS: dict[str, tuple[int, int, dict[str, str], list[str]]] = {
    "1 process, 2 threads": (1, 2, {}, []),
    "2 processes, every network in both": (2, 1, {}, TOGETHER),
    "2 processes, a network in each": (2, 1, {}, ["--placement", "split"]),
    "1 process, 1 thread": (1, 1, {}, []),
    "2 processes, every network in both, batch statistics apart": (
        2,
        1,
        {},
        [*TOGETHER, "--batch-norm", "local"],
    ),
    "1 process, 2 threads, memory kept": (1, 2, MEMORY_KEPT, []),
    "2 processes, a network in each, memory kept": (2, 1, MEMORY_KEPT, ["--placement", "split"]),
}
BASE = next(iter(VARIANTS))
FLAGS = "--cohort resnet32*2 --dataset digits --batch-size 64 --max-steps 16 --cpu".split()


def step_seconds(name: str, folder: Path) -> float:
    """Run one variant; return its median step, warm-up left out."""
    processes, threads, variables, flags = VARIANTS[name]
    start = [sys.executable]
    if processes > 1:
        start = [BIN / "torchrun", "--nproc_per_node", processes]
    command = [*start, "train.py", *FLAGS, *flags, "--output-dir", folder]
    subprocess.run(
        [str(word) for word in command],
        cwd=HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | variables,
        check=True,
        capture_output=True,
    )
    found = json.loads((folder / "results.json").read_text())
    assert found["world_size"] == processes
    return float(found["throughput"]["step_seconds_median"])


def summary(seconds: dict[str, list[float]]) -> list[list[str]]:
    """Return a table row per variant: median step, ratio to the base with its 95% interval."""
    rows = []
    for name, values in seconds.items():
        times = "1" if name == BASE else str(ratio(values, seconds[BASE]))
        rows.append([name, f"{1e3 * median(values):.0f} ms", f"{64 / median(values):.0f}", times])
    return rows


def main() -> None:
    """Run every variant in every round and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(rounds), "rounds", disable=None):
            # Every other round runs backwards, so that drift favours nobody.
            for name in list(VARIANTS)[:: -1 if turn % 2 else 1]:
                where = Path(folder) / f"{turn}-{list(VARIANTS).index(name)}"
                seconds[name].append(step_seconds(name, where))
    found: dict[str, Any] = {
        "step_seconds": seconds,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.processes", *sys.argv[1:]]),
    }
    headers = ["run", "step, median", "images/s", "step / first row's (95% interval)"]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"""# Processes and threads on one machine

ResNet-32 pair, batch 64, {rounds} runs each in alternating order; ratios within a round.

{tabulate(summary(seconds), headers, tablefmt="github")}

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{found["command"]}`
"""
    (HERE / "processes.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "processes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
