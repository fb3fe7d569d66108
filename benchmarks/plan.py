"""What ``dml-accel plan`` predicts, against what processes take: memory and the time of a step.

    python -m benchmarks.plan [--steps 4]

A ResNet-20 pair with 256 images of noise in a step, on 1 to 8 gloo processes of one thread each;
and other cohorts in one process. Memory is the peak of a process above what it held just before its
cohort was built; a small network was trained before, so that libraries are not counted, and the
memory that this left free was given back. The plan times the networks on this machine
(``--measure``) in this process, alone. Writes benchmarks/plan.json and .md.
"""

import argparse
import dataclasses
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.measuring import (
    HERE,
    build_cohort,
    image_set,
    networks,
    noise,
    surroundings,
)
from benchmarks.worker import resident, return_memory
from dml_accel.core.config import Config
from dml_accel.core.host import keep_memory
from dml_accel.data.batches import Normalisation
from dml_accel.data.images import Data
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.launch import check_launch
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import (
    Prediction,
    Ranks,
    StepLoad,
    allocate,
    cpus,
    everywhere,
    predict,
)
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import train_step
from dml_accel.training.progress import forget_peak_memory, peak_memory
from dml_accel.training.setup import count_all, with_times

# name: processes, flags
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "every network in the process": (1, {}),
    "a network in each": (2, {"placement": "split"}),
    "every network in both": (2, {"placement": "replicate"}),
    "every network in both, batch statistics apart": (
        2,
        {"placement": "replicate", "batch_norm": "local"},
    ),
    "a network in two": (4, {"placement": "split"}),
    "a network in four": (8, {"placement": "split"}),
    "every network in all eight": (8, {"placement": "replicate"}),
}
for _cohort, _images, _flags in (
    ("resnet20*2", 64, {}),
    ("resnet20*2", 128, {"low_memory": True}),
    ("resnet20", 256, {}),
    ("resnet32*4", 64, {}),
    ("resnet8*2", 256, {}),
    ("wrn_16_2*2", 64, {}),
    ("mobilenet*2", 64, {}),
    ("timm:densenet121*2", 16, {}),
    ("timm:mobilenetv3_small_050*2", 64, {}),
):
    _name = f"{_cohort}, {_images} images" + ", low memory" * ("low_memory" in _flags)
    CASES[_name] = (1, {"cohort": (_cohort,), "batch_size": _images} | _flags)
_WARM_UP = 1
_CORES = 2  # more processes than cores are not timed


def configuration(flags: dict[str, Any]) -> Config:
    """Return the run of one case."""
    return Config(**{"cohort": ("resnet20*2",), "batch_size": 256, "cpu": True} | flags)


def placed(config: Config, world_size: int) -> Ranks:
    """Return which processes train which peer."""
    names = [spec.name for spec in parse_cohort(config.cohort)]
    if config.compute.placement == "split":
        return allocate(dict.fromkeys(names, 1.0), world_size)
    return everywhere(names, world_size)


# ---------------------------------------------------------------- what is measured


def work(case: str, steps: int, folder: Path) -> None:
    """Train in this process of a launch, and write what it took."""
    _, flags = CASES[case]
    config, classes = configuration(flags), tuple(map(str, range(100)))
    images = image_set(noise(1024))
    data = Data(images, None, images, classes, Normalisation.identity())
    check_launch(config.numerics, config.compute, config.optim)
    keep_memory()
    processes = Processes(config.numerics, config.compute)
    names = [spec.name for spec in parse_cohort(("resnet8*2",))]
    first = Placement(processes, everywhere(names, processes.world_size))
    train_step(build_cohort(Config(cohort=("resnet8*2",), cpu=True), first, data), 0, 0.1)
    processes.barrier()
    gc.collect()
    return_memory()
    before = resident()
    forget_peak_memory(torch.device("cpu"))
    placement = Placement(
        processes, placed(config, processes.world_size), config.numerics.batch_norm
    )
    cohort, seconds = build_cohort(config, placement, data), []
    for step in range(_WARM_UP + steps):
        started = time.perf_counter()
        train_step(cohort, step, 0.1)
        seconds.append(time.perf_counter() - started)
    found = {
        "memory": peak_memory(torch.device("cpu")) - before,
        "seconds": seconds[_WARM_UP:],
    }
    (folder / f"{processes.rank}.json").write_text(json.dumps(found))
    processes.close()


def measured(case: str, steps: int) -> list[dict[str, Any]]:
    """Launch the processes of a case; return what each took, by rank."""
    processes, _ = CASES[case]
    words = ["-m", "benchmarks.plan", "--steps", str(steps), "--case", case]
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable]
        if processes > 1:
            start = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node"]
            start.append(str(processes))
        subprocess.run(
            [*start, *words, "--to", folder],
            cwd=HERE.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        paths = [Path(folder) / f"{rank}.json" for rank in range(processes)]
        return [json.loads(path.read_text()) for path in paths]


# ---------------------------------------------------------------- what is predicted


def timed_costs(config: Config) -> dict[str, Cost]:
    """Return what each network costs, timed on this machine with one thread."""
    torch.set_num_threads(1)
    specs, modules = parse_cohort(config.cohort), networks(config)
    costs = count_all(config, modules)
    return with_times(costs, specs, modules, config, torch.device("cpu"), 1)


def predicted(case: str, costs: dict[str, Cost]) -> Prediction:
    """Return what the plan says of a case."""
    processes, flags = CASES[case]
    config = configuration(flags)
    return predict(placed(config, processes), costs, StepLoad.of(config, 100), cpus())


# ---------------------------------------------------------------- the table


def row(case: str, costs: dict[str, Cost], found: list[dict[str, Any]]) -> list[str]:
    """Return a row: memory and step of the process that has most, and the plan's."""
    processes, plan = CASES[case][0], predicted(case, costs)
    memory, said = max(one["memory"] for one in found), max(plan.memory)
    cells = [case, str(processes), f"{memory / 1e6:.0f}", f"{said / 1e6:.0f}"]
    cells.append(f"{memory / said:.2f}")
    if processes > _CORES:
        return [*cells, "", "", ""]
    seconds = max(median(one["seconds"]) for one in found)
    cells += [f"{1e3 * seconds:.0f}", f"{1e3 * plan.step_seconds:.0f}"]
    return [*cells, f"{seconds / plan.step_seconds:.2f}"]


def main() -> None:
    """Measure every case and write the table; or be a process of one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="timed steps (default: 4)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        work(asked.case, asked.steps, asked.to)
        return
    measurements, costs = {}, {}
    with tempfile.TemporaryDirectory() as kept:
        # The networks are timed now: times that an earlier command has kept are not used.
        os.environ["DML_CACHE"] = kept
        for case, (processes, _) in CASES.items():
            costs[case] = timed_costs(configuration(CASES[case][1]))
            measurements[case] = measured(case, asked.steps if processes <= _CORES else 1)
            print(row(case, costs[case], measurements[case]), flush=True)
    found = {
        "measured": measurements,
        "costs": {
            case: {name: dataclasses.asdict(cost) for name, cost in one.items()}
            for case, one in costs.items()
        },
        **surroundings(),
        "command": shlex.join(["python", "-m", "benchmarks.plan", *sys.argv[1:]]),
    }
    headers = ["run", "processes", "MB, measured", "MB, plan", "ratio"]
    headers += ["ms a step, measured", "ms, plan", "ratio"]
    rows = [row(case, costs[case], one) for case, one in measurements.items()]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"""# What plan predicts, and what processes take

Where no cohort is named, a ResNet-20 pair with 256 images a step; 32 pixels, 100 classes, gloo, one
thread in each process. Memory: peak of the process that has most, above what it held before its
cohort was built. Step: median of {asked.steps}, of the slowest process; more processes than the
{_CORES} cores are not timed. The plan timed the networks alone on this machine and assumed \
{cpus().bandwidth / 1e9:g} GB/s and {1e6 * cpus().latency:g} us per message.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{found["command"]}`
"""
    (HERE / "plan.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "plan.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
