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
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import stats
from tabulate import tabulate

from benchmarks.measuring import HERE, build_cohort, noise_data, surroundings
from dml_accel.core.config import Config
from dml_accel.distributed.launch import check_launch
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import train_step

_WARM_UP = 5


class TimedPlacement(Placement):
    """A placement that times its exchange, and separately the wait for the other processes."""

    waited = exchanged = 0.0

    def gather(
        self, logits: torch.Tensor, count: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Wait for all, then exchange logits."""
        return self._timed(super().gather, logits, count, dtype)

    def sum_over_peers(self, ours: torch.Tensor, count: int) -> torch.Tensor:
        """Wait for all, then exchange sums."""
        return self._timed(super().sum_over_peers, ours, count)

    def _timed(self, exchange: Callable[..., torch.Tensor], *words: Any) -> torch.Tensor:
        started = time.perf_counter()
        self.processes.barrier()
        ready = time.perf_counter()
        found = exchange(*words)
        self.waited, self.exchanged = ready - started, time.perf_counter() - ready
        return found


def measure(exchange: str, steps: int, processes: Processes) -> list[float]:
    """Return the exchange's share of each step, without the wait."""
    config = Config(cohort=("resnet32*2",), placement="split", exchange=exchange, cpu=True)
    specs = parse_cohort(config.cohort)
    placement = TimedPlacement(processes, {spec.name: [i] for i, spec in enumerate(specs)})
    cohort, shares = build_cohort(config, placement, noise_data()), []
    for step in range(_WARM_UP + steps):
        started = time.perf_counter()
        train_step(cohort, step, 0.1)
        whole = time.perf_counter() - started - placement.waited
        shares.append(placement.exchanged / whole)
    return shares[_WARM_UP:]


def main() -> None:
    """Measure both exchanges; the first process writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of each (default: 60)")
    steps = parser.parse_args().steps
    config = Config(cpu=True)
    check_launch(config.numerics, config.compute, config.optim)
    processes = Processes(config.numerics, config.compute)
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
