"""Seconds from a command to the first step of its run, by commands that alternate."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measuring import HERE

# Digits come with a package: nothing is downloaded, and decoding takes no time.
DIGITS = ("--cohort", "resnet8*2", "--dataset", "digits", "--batch-size", "16", "--max-steps", "1")


def seconds_to_first_step(flags: Sequence[str], run: Path, checkout: Path = HERE.parent) -> float:
    """Run ``python train.py`` to its end; return the seconds until its first step was taken.

    Args:
        flags: of train.py; the run must take steps.
        run: a folder for it, which does not exist.
        checkout: the folder of the code.

    Raises:
        CalledProcessError: the command failed.
    """
    started = time.time()
    subprocess.run(
        [sys.executable, "train.py", *flags, "--output-dir", str(run)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        check=True,
        capture_output=True,
    )
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    first = next(record for record in records if record["event"] == "step")
    return float(first["time"]) - started


def measure(
    checkouts: Mapping[str, Path], blocks: int, flags: Sequence[str] = DIGITS
) -> Iterator[list[dict[str, Any]]]:
    """Yield all readings after each block: one run of each checkout, every other block in reverse.

    Args:
        checkouts: folders of code, by what the report calls them.
        blocks: how many.
        flags: of train.py.
    """
    readings = [{"name": name, "flags": list(flags), "seconds": []} for name in checkouts]
    with tempfile.TemporaryDirectory() as folder:
        for reading in readings:  # files that only the first start reads from the disk, or compiles
            seconds_to_first_step(
                flags, Path(folder, "warm", reading["name"]), checkouts[reading["name"]]
            )
        for block in tqdm(range(blocks), "first steps", disable=None):
            for reading in readings[:: -1 if block % 2 else 1]:
                run = Path(folder, str(block), reading["name"])
                reading["seconds"].append(
                    seconds_to_first_step(flags, run, checkouts[reading["name"]])
                )
            yield readings
