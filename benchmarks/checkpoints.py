"""Measure what writing a checkpoint costs; write benchmarks/checkpoints.json and .md.

    python -m benchmarks.checkpoints [--blocks 15] [--folder FOLDER]

A ResNet-32 pair, CIFAR-100's 781 steps an epoch: in each block some steps are timed, then one
checkpoint, which waits until it is on the disk that holds ``--folder``.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring import (
    BATCH,
    HERE,
    IMAGES,
    build_cohort,
    device,
    noise_data,
    surroundings,
    timed,
)
from dml_accel.core.config import Config
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import train_step
from dml_accel.training.checkpoint import write_together

_STEPS = 5  # of a block


def measure(blocks: int, root: Path) -> list[tuple[float, float]]:
    """Return the seconds of a step and of a checkpoint, block by block."""
    config = Config(cohort=("resnet32*2",), batch_size=BATCH, cpu=device().type == "cpu")
    names = [spec.name for spec in parse_cohort(config.cohort)]
    placement = Placement(Processes(config.numerics, config.compute), everywhere(names, 1))
    cohort = build_cohort(config, placement, noise_data())

    def steps() -> None:
        for step in range(_STEPS):
            train_step(cohort, step, 0.1)

    def write(step: int) -> None:
        state = {"lost": dict.fromkeys(names, 0)}
        write_together(root, step, cohort.peers, state, config.run.keep_checkpoints, placement)

    steps(), write(1)  # warm-up
    return [
        (timed(steps) / _STEPS, timed(lambda b=block: write(b + 2)))
        for block in tqdm(range(blocks), "blocks", disable=None)
    ]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--blocks", type=int, default=15, help="how many (default: 15)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        pairs = measure(given.blocks, Path(root) / "checkpoints")
    per_epoch = IMAGES // BATCH
    shares = [100 * write / (per_epoch * step) for step, write in pairs]
    low, high = stats.t.interval(
        0.95, len(shares) - 1, loc=np.mean(shares), scale=stats.sem(shares)
    )
    found = {
        "seconds": [{"step": step, "checkpoint": write} for step, write in pairs],
        "steps_per_epoch": per_epoch,
        "share_percent": {"mean": float(np.mean(shares)), "low": float(low), "high": float(high)},
        **surroundings(),
        "command": "python " + shlex.join(["-m", "benchmarks.checkpoints", *sys.argv[1:]]),
    }
    rows = [
        ["a step", f"{1e3 * median(step for step, _ in pairs):.0f} ms"],
        ["a checkpoint, on the disk", f"{1e3 * median(write for _, write in pairs):.0f} ms"],
        [
            f"a checkpoint an epoch of {per_epoch} steps",
            f"{np.mean(shares):.3f}% ({low:.3f} to {high:.3f})",
        ],
    ]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"""# What a checkpoint costs

ResNet-32 pair, batch {BATCH}, 100 classes; {len(pairs)} blocks; medians, and the mean share with
its 95% interval.

{tabulate(rows, ["what", "measured"], tablefmt="github")}

{found["processor"]}, {found["cores"]} cores, {found["threads"]} thread(s), {found["system"]};
{where}; commit {found["commit"]}. Command: `{found["command"]}`
"""
    (HERE / "checkpoints.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "checkpoints.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
