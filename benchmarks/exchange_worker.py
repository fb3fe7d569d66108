"""The processes of ``benchmarks.exchange``: they train a cohort and measure its exchange.

    python -P benchmarks/exchange_worker.py JOB PROCESSES

JOB has the fields of exchange.Job, PROCESSES a pair for each process: its network namespace, and
its environment; both in JSON. It is started as a file, so that PYTHONPATH decides which checkout of
dml_accel is measured. All processes are forks of one that has imported everything, because the
imports take longer than the steps. Each prints one line of JSON: its rank, and what it measured.
"""

import ctypes
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import build_cohort, image_set
from dml_accel.core.config import Config
from dml_accel.core.versions import commit
from dml_accel.data.batches import Normalisation
from dml_accel.data.images import Data
from dml_accel.data.splits import Split
from dml_accel.distributed.launch import check_launch
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import Cohort, train_step

_WARM_UP = 3
_IMAGES, _LEARNING_RATE = 2_000, 0.1
_NETWORK = 0x40000000  # CLONE_NEWNET
_SECONDS_TO_SETTLE = 0.2  # until late acknowledgements have arrived


class TimedPlacement(Placement):
    """A placement that times its exchange, and separately the wait for the other processes."""

    waited = exchanged = 0.0

    def gather(self, logits: Any, count: int, dtype: Any = None) -> torch.Tensor:
        """Wait for all, then exchange logits."""
        return self._timed(super().gather, logits, count, dtype)

    def _timed(self, exchange: Callable[..., torch.Tensor], *words: Any) -> torch.Tensor:
        started = time.perf_counter()
        self.processes.barrier()
        ready = time.perf_counter()
        found = exchange(*words)
        self.waited, self.exchanged = ready - started, time.perf_counter() - ready
        return found


def cohort_of(
    job: dict[str, Any], processes: Processes, kind: type[Placement] = Placement, **flags: Any
) -> Cohort:
    """Build the part of the job's cohort that this process trains, on noise."""
    # Batch norm that does not span processes: its collectives are none of the exchange.
    config = Config(
        cohort=(job["cohort"],),
        batch_size=job["batch"],
        image_size=job["image_size"],
        placement="split",
        batch_norm="local",
        cpu=True,
        **job["flags"],
        **flags,
    )
    names = sorted(spec.name for spec in parse_cohort(config.cohort))
    placement = kind(processes, dict(zip(names, job["ranks"], strict=True)), "local")
    size = (job["image_size"],) * 2
    pixels = torch.randint(0, 256, (_IMAGES, *size, 3), dtype=torch.uint8)
    images = image_set(Split(pixels, torch.randint(0, job["classes"], (_IMAGES,))))
    classes = tuple(map(str, range(job["classes"])))
    data = Data(images, None, images, classes, Normalisation.identity())
    return build_cohort(config, placement, data)


def count_traffic(job: dict[str, Any], processes: Processes) -> dict[str, list[list[float]]]:
    """Return bytes and packets that this host receives a step, block by block, with and without KL.

    A host has one process.
    """
    cohorts = {"mutual": cohort_of(job, processes), "alone": cohort_of(job, processes, kl_weight=0)}
    processes.stop_heartbeat()  # or each second would have bytes of its own
    found: dict[str, list[list[float]]] = {name: [] for name in cohorts}
    for block in range(1 + job["blocks"]):  # the first one warms up
        for name, cohort in cohorts.items():
            before = _received(processes)
            for step in range(job["steps"]):
                train_step(cohort, block * job["steps"] + step, _LEARNING_RATE)
            after = _received(processes)
            each = [(b - a) / job["steps"] for a, b in zip(before, after, strict=True)]
            found[name].append(each)
    return {name: values[1:] for name, values in found.items()}


def _received(processes: Processes) -> list[int]:
    """Return the bytes and packets that this host has received, once nothing is on its way."""
    processes.barrier()
    time.sleep(_SECONDS_TO_SETTLE)
    # Of our namespace; /sys would show that in which the first process has started.
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    ours = os.environ["GLOO_SOCKET_IFNAME"] + ":"
    (counters,) = (line.split(":")[1].split() for line in lines if line.strip().startswith(ours))
    received = [int(counters[0]), int(counters[1])]  # bytes and packets
    processes.barrier()
    return received


def time_exchange(job: dict[str, Any], processes: Processes) -> dict[str, list[float]]:
    """Return the seconds of each step without the wait, and of the exchange in it."""
    cohort = cohort_of(job, processes, TimedPlacement)
    placement = cohort.placement
    assert isinstance(placement, TimedPlacement)
    found: dict[str, list[float]] = {"step": [], "exchange": []}
    for step in range(_WARM_UP + job["steps"]):
        started = time.perf_counter()
        train_step(cohort, step, _LEARNING_RATE)
        found["step"].append(time.perf_counter() - started - placement.waited)
        found["exchange"].append(placement.exchanged)
    return {name: values[_WARM_UP:] for name, values in found.items()}


def work(job: dict[str, Any], namespace: str, environment: dict[str, str]) -> None:
    """Measure what the job asks for, as one process on the host with this namespace."""
    os.environ.update(environment)
    with open(f"/var/run/netns/{namespace}", "rb") as file:
        if ctypes.CDLL(None).setns(file.fileno(), _NETWORK) != 0:
            raise RuntimeError(f"cannot enter the network namespace {namespace}")
    config = Config(cpu=True, batch_size=job["batch"])
    torch.manual_seed(0)
    check_launch(config.numerics, config.compute, config.optim)
    processes = Processes(config.numerics, config.compute)
    measure = {"bytes": count_traffic, "time": time_exchange}[job["kind"]]
    found = {"rank": processes.rank, **measure(job, processes), "commit": commit()}
    os.write(1, (json.dumps(found) + "\n").encode())  # at once, or lines would be mixed
    processes.close()


def main() -> int:
    """Fork a process for each that is asked for; return whether one has failed."""
    job, launched = map(json.loads, sys.argv[1:])
    torch.set_num_threads(1)
    children = []
    for namespace, environment in launched:
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                work(job, namespace, environment)
                failed = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(failed)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
