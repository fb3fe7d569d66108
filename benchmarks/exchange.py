"""What the exchange of logits costs a step: a ResNet-32 pair, each network in a process of its own.

    torchrun --nproc_per_node 2 -m benchmarks.exchange [--steps 60]

Each step waits for the slower process before the exchange, so that only the exchange itself is
timed; its share is that of the step without the wait. Writes benchmarks/exchange.json and .md.
"""

import argparse
import json
import shlex
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

from benchmarks.measuring import HERE, build_peers, image_set, surroundings
from dml_accel.core.config import Config
from dml_accel.distributed.launch import check_launch
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models import spec as cohort
from dml_accel.mutual.losses import Targets
from dml_accel.mutual.step import Step, train_step
from dml_accel.mutual.teaching import Teaching

_WARM_UP = 5


class TimedPlacement(Placement):
    """A placement that times its exchange, and apart from it the wait for the others."""

    waited = exchanged = 0.0

    def targets(
        self,
        logits: torch.Tensor,
        count: int,
        teaching: Teaching,
        frozen: torch.Tensor | None = None,
    ) -> Targets:
        """Wait for all, then exchange."""
        started = time.perf_counter()
        self.processes.wait()
        ready = time.perf_counter()
        found = super().targets(logits, count, teaching, frozen)
        self.waited, self.exchanged = ready - started, time.perf_counter() - ready
        return found


def measure(exchange: str, steps: int, processes: Processes) -> list[float]:
    """Return the exchange's share of each step, the wait left out."""
    config = Config(cohort=("resnet32*2",), placement="split", exchange=exchange, cpu=True)
    specs = cohort.parse(config.cohort)
    placement = TimedPlacement(config, processes, {spec.name: [i] for i, spec in enumerate(specs)})
    images, shares = image_set(), []
    teaching = Teaching(config, [spec.name for spec in specs])
    peers = build_peers(config, placement)
    for step in range(_WARM_UP + steps):
        started = time.perf_counter()
        train_step(Step(peers, (), images, step, 0.1, config, placement, teaching))
        whole = time.perf_counter() - started - placement.waited
        shares.append(placement.exchanged / whole)
    return shares[_WARM_UP:]


def main() -> None:
    """Measure both exchanges; the first process writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of each (default: 60)")
    steps = parser.parse_args().steps
    config = Config(cpu=True)
    check_launch(config)
    processes = Processes(config)
    found: dict[str, Any] = {"shares": {}}
    for exchange in ("logits", "sum"):
        found["shares"][exchange] = measure(exchange, steps, processes)
    if processes.rank == 0:
        rows = []
        for exchange, shares in found["shares"].items():
            low, high = stats.t.interval(
                0.95, len(shares) - 1, loc=np.mean(shares), scale=stats.sem(shares)
            )
            rows.append(
                [
                    exchange,
                    f"{100 * median(shares):.2f}%",
                    f"{100 * np.mean(shares):.2f}% ({100 * low:.2f} to {100 * high:.2f})",
                ]
            )
        found |= {
            **surroundings(),
            "processes": processes.world_size,
            "command": "torchrun --nproc_per_node 2 "
            + shlex.join(["-m", "benchmarks.exchange", *sys.argv[1:]]),
        }
        where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        headers = ["exchange", "share of a step, median", "mean (95% interval)"]
        text = f"""# The exchange's share of a step

ResNet-32 pair, one network in each of {processes.world_size} processes of {found["threads"]} \
thread(s), batch 64, 100 classes, {steps} steps; the wait for the slower process is left out.

{tabulate(rows, headers, tablefmt="github")}

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{found["command"]}`
"""
        (HERE / "exchange.json").write_text(json.dumps(found, indent=2) + "\n")
        (HERE / "exchange.md").write_text(text)
        print(text)
    processes.close()


if __name__ == "__main__":
    main()
