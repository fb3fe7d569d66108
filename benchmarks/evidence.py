"""What the methods gain on real images; writes benchmarks/evidence/ and benchmarks/evidence.md.

    python -m benchmarks.evidence --images FOLDER --part a [--part b ...] [--runs runs/evidence]
    python -m benchmarks.evidence --images FOLDER --list

Every part is some comparisons of ``dml-accel compare``, each in a folder of its own below --runs.
The same command goes on where it was interrupted, on a GPU too. Images are made 16 x 16 pixels, so
that a part is a matter of hours on two cores. Records without weights are copied into
benchmarks/evidence after each comparison; evidence.md has all tables, and what is missing.

    a  a cohort of four, every method: eight of them first, then all; then three times the epochs
    b  independent against mutual training in cohorts of 2, 4 and 8
    c  a wide and a narrow network together: what protects the strong one from the weak one
    d  few images for many epochs: as many steps as with all images in a
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import HERE
from dml_accel.analysis.tables import comparison_table, cost_table
from dml_accel.core.errors import UsageError
from dml_accel.core.files import read_json, write_text

PAIR = ("independent", "mutual")
EIGHT = (
    *("mutual", "jeffreys", "renyi", "dkd", "standardized", "kdcl-naive", "correct-gate"),
    "ensemble-distill",
)
# mean-prob has the gradient of mutual, switokd is for two networks.
REST = (
    *("sequential", "official", "mean-logit", "mean-logit-all", "reverse-kl", "jsd"),
    *("kdcl-minlogit", "nkd", "ttm", "wttm", "okddip-leader"),
)
KEPT = ("config.json", "metrics.jsonl", "results.json")
TABLES = ("results.json", "results.csv", "results.md", "differences.png")


@dataclass(frozen=True)
class Comparison:
    """One comparison: its part, its folder, its methods, and all other flags.

    A folder that has two is trained by the first, and then grows by the second.
    """

    part: str
    folder: str
    methods: tuple[str, ...]
    cohort: str
    epochs: int
    seeds: int
    flags: str = ""

    @property
    def words(self) -> list[str]:
        """The command behind ``dml-accel``, without images and folder."""
        text = (
            f"compare --methods {' '.join(self.methods)} --cohort {self.cohort} "
            f"--epochs {self.epochs} --seeds {self.seeds} {self.flags} --image-size 16 "
            f"--lr-schedule cosine --eval-every {self.epochs}ep"
        )
        return text.split()

    def missing(self, record: dict[str, Any]) -> list[str]:
        """Return the methods, with their seeds, that a results.json does not have yet."""
        done = {(run["method"], run["seed"]) for run in record["runs"]}
        lacking = {
            method: [seed for seed in range(self.seeds) if (method, seed) not in done]
            for method in self.methods
        }
        return [
            f"{method} (seeds {' '.join(map(str, seeds))})"
            for method, seeds in lacking.items()
            if seeds
        ]


COMPARISONS = (
    Comparison("a", "k4", ("independent", *EIGHT), "resnet8*4", 5, 3),
    Comparison("a", "k4", ("independent", *EIGHT, *REST), "resnet8*4", 5, 3),
    Comparison("a", "k4-15-epochs", ("independent", *EIGHT, *REST), "resnet8*4", 15, 3),
    *(Comparison("b", f"k{k}-5-seeds", PAIR, f"resnet8*{k}", 5, 5) for k in (2, 4, 8)),
    Comparison(
        "c", "weak", (*PAIR, "correct-gate", "kdcl-naive", "switokd"), "wrn_16_2 resnet8", 5, 3
    ),
    Comparison("c", "weak-learns-only", PAIR, "wrn_16_2 resnet8", 5, 3, "--links leader"),
    Comparison("d", "few-images", PAIR, "resnet8*4", 20, 3, "--train-limit 2500"),
)


def train(one: Comparison, images: Path, folder: Path, threads: int) -> None:
    """Train what is not finished; ends this program if a run fails."""
    words = [*one.words, "--dataset", images, "--threads", threads, "--output-dir", folder]
    command = [sys.executable, "-m", "dml_accel", *map(str, words)]
    print(f"part {one.part}: {shlex.join(command)}", file=sys.stderr)
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
    done = subprocess.run(command, cwd=HERE.parent, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def keep_records(folder: Path, kept: Path, images: Path) -> None:
    """Copy tables and the records of every run, without weights, checkpoints and local paths.

    Args:
        folder: of the comparison.
        kept: where they are kept.
        images: the folder of images, which they call by its name.
    """
    finished = [results.parent for results in folder.rglob("seed-*/results.json")]
    files = [folder / name for name in TABLES]
    files += [run / name for run in finished for name in KEPT]
    for file in filter(Path.exists, files):
        to = kept / file.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            shutil.copy(file, to)
            continue
        text = file.read_text(encoding="utf-8").replace(str(images), images.name)
        write_text(to, text.replace(str(folder.parent), "runs/evidence"))


def page(images: str) -> str:
    """Return evidence.md: the tables of every comparison, and what is missing."""
    parts = [
        "# What the methods gain",
        f"Real images, {images}, at 16 x 16 pixels. Each comparison has its runs and tables in a "
        "folder of [evidence](evidence), and goes on by `python -m benchmarks.evidence`. Seconds "
        "are those of a machine that did other work; passes are not.",
    ]
    folders: dict[str, Comparison] = {one.folder: one for one in COMPARISONS}
    for folder, one in folders.items():
        command = f"dml-accel {shlex.join(one.words)} --threads 1 --dataset {images}"
        parts += [f"## {folder}, of part {one.part}", f"    {command}"]
        path = HERE / "evidence" / folder / "results.json"
        if not path.exists():
            parts.append("Missing: nothing of it was trained.")
            continue
        record: dict[str, Any] = read_json(path)
        lacking = one.missing(record)
        parts += [comparison_table(record, "github"), cost_table(record, "github")]
        parts.append(f"Missing: {', '.join(lacking)}." if lacking else "Nothing is missing.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Train parts, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--part", action="append", choices=sorted({c.part for c in COMPARISONS}))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--list", action="store_true", help="only write the page, train nothing")
    words = parser.parse_args()
    images, runs = words.images.resolve(), words.runs.resolve()
    try:
        for one in COMPARISONS:
            if one.part in (words.part or ()) and not words.list:
                train(one, images, runs / one.folder, words.threads)
            keep_records(runs / one.folder, HERE / "evidence" / one.folder, images)
        write_text(HERE / "evidence.md", page(images.name))
    except UsageError as error:
        parser.error(str(error))
    print(HERE / "evidence.md")


if __name__ == "__main__":
    main()
