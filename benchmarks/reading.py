"""Measure how long class folders take to read; write benchmarks/reading.json and .md.

    python -m benchmarks.reading [--files 50000] [--blocks 3] [--against CHECKOUT]

Small PNG files, four fifths for training, are made in a temporary folder. In each block every
checkout reads them twice in new processes: first with empty caches, then again. The digest is
timed on the same files and images: the sha256 of every file, of the images and of the labels.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring import HERE, surroundings, timed
from dml_accel.data.splits import sha256

_CLASSES, _SIDE = 100, 32
_READ = """
import sys, time
from dml_accel.core.config import Config
from dml_accel.data import sources
import datasets
datasets.disable_progress_bars()
start = time.perf_counter()
sources.read(Config(dataset=sys.argv[1]).data, quiet=True)
print(time.perf_counter() - start)
"""


def make(root: Path, files: int) -> None:
    """Write small images of random blocks into class folders."""
    draw = np.random.default_rng(0)
    for number in tqdm(range(files), "writing", disable=None, unit=" files"):
        split = "test" if number % 5 == 0 else "train"
        folder = root / split / f"class-{number // 5 % _CLASSES:03}"
        folder.mkdir(parents=True, exist_ok=True)
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small.repeat(4, 0).repeat(4, 1)).save(folder / f"{number}.png")


def seconds_to_read(checkout: Path, images: Path, caches: Path) -> float:
    """Return the seconds that a checkout needs, in a process of its own, without its imports."""
    variables = {"DML_CACHE": caches / "images", "HF_HOME": caches / "hub", "PYTHONPATH": checkout}
    done = subprocess.run(
        [sys.executable, "-c", _READ, images],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=True,
        cwd=checkout,
    )
    return float(done.stdout.split()[-1])


def seconds_of_digest(images: Path, files: int) -> tuple[float, float]:
    """Return the seconds of the sha256 of all files, and of decoded images and labels."""
    contents = [path.read_bytes() for path in images.rglob("*.png")]
    decoded = torch.zeros(files, _SIDE, _SIDE, 3, dtype=torch.uint8).random_()
    labels = torch.zeros(files, dtype=torch.int64)
    per_file = timed(lambda: [hashlib.sha256(content).digest() for content in contents])
    return per_file, timed(lambda: (sha256(decoded), sha256(labels)))


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reading", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--files", type=int, default=50_000, help="how many (default: 50000)")
    parser.add_argument("--blocks", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--against", type=Path, help="another checkout, read in turns with this")
    given = parser.parse_args()
    checkouts = {"here": HERE.parent} | ({"other": given.against} if given.against else {})
    found: dict[str, Any] = {name: {"first": [], "again": []} for name in checkouts}
    digests = []
    with tempfile.TemporaryDirectory() as name:
        images = Path(name) / "images"
        make(images, given.files)
        for _ in tqdm(range(given.blocks), "blocks", disable=None):
            for which, checkout in checkouts.items():
                with tempfile.TemporaryDirectory() as caches:
                    for time in ("first", "again"):
                        seconds = seconds_to_read(checkout.resolve(), images, Path(caches))
                        found[which][time].append(seconds)
            digests.append(seconds_of_digest(images, given.files))
    found |= {"files": given.files, "digest": digests, **surroundings()}
    found["command"] = "python " + shlex.join(["-m", "benchmarks.reading", *sys.argv[1:]])
    (HERE / "reading.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = report(found)
    (HERE / "reading.md").write_text(text, encoding="utf-8")
    print(text)


def report(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    first = median(found["here"]["first"])
    per_file, of_images = (median(column) for column in zip(*found["digest"], strict=True))
    rows = [
        ["first read", *_seconds(found, "first")],
        ["read again, from the cache", *_seconds(found, "again")],
        ["digest of a first read", f"{per_file + of_images:.2f} s", ""],
        ["digest, of a first read", f"{100 * (per_file + of_images) / first:.1f}%", ""],
        ["digest of a read from the cache", f"{of_images:.2f} s", ""],
    ]
    other = "the other checkout" if "other" in found else ""
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    headers = ["what", "measured", other]
    if not other:
        rows, headers = [row[:2] for row in rows], headers[:2]
    return f"""# What reading class folders costs

{found["files"]:,} PNG files of {_SIDE} x {_SIDE} pixels in {_CLASSES} classes and two splits, one
process; medians of {len(found["here"]["first"])} blocks.

{tabulate(rows, headers, tablefmt="github")}

{found["processor"]}, {found["cores"]} cores, {found["threads"]} thread(s), {found["system"]};
{where}; commit {found["commit"]}. Command: `{found["command"]}`
"""


def _seconds(found: dict[str, Any], time: str) -> list[str]:
    return [f"{median(found[n][time]):.1f} s" if n in found else "" for n in ("here", "other")]


if __name__ == "__main__":
    main()
