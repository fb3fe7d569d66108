"""Compare a fresh exchange with a stale one: logits of every step, weights of 10 and of 50 steps.

    python -m benchmarks.stale --output-dir DIR [flags of dml-accel compare]

DIR gets every run and the tables, as of any comparison; benchmarks/stale.md gets the differences to
the fresh exchange. A comparison that is finished is only read.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

import dml_accel
from benchmarks.measuring import HERE, surroundings
from dml_accel import cli
from dml_accel.analysis.statistics import Difference, paired_difference, summarise
from dml_accel.core.files import read_json

SEEDS = range(5)
FRESH, STALE = "mutual", {"every-10": 10, "every-50": 50}
METRICS = {"top1": ("top-1, %", 100), "nll": ("NLL, nats", 1)}


def values(folder: Path, method: str, metric: str, whole: bool) -> dict[int, float | None]:
    """Return a metric on the test split by seed: of the ensemble, or the mean of the peers."""
    found: dict[int, float | None] = {}
    for seed in SEEDS:
        results = read_json(folder / method / f"seed-{seed}" / "results.json")
        peers = [peer["test"] for peer in results["peers"]]
        of = [results["ensemble"]] if whole else peers
        found[seed] = METRICS[metric][1] * sum(one[metric] for one in of) / len(of)
    return found


def rows(folder: Path) -> list[list[str]]:
    """Return a line for each metric and method."""
    lines = []
    for metric, (title, _) in METRICS.items():
        for whole in (False, True):
            fresh = values(folder, FRESH, metric, whole)
            for method in (FRESH, *STALE):
                ours = values(folder, method, metric, whole)
                mean = f"{summarise(list(ours.values())).mean:.3f}"
                what = "ensemble" if whole else "mean of the peers"
                less = "-" if method == FRESH else _in_words(paired_difference(ours, fresh))
                lines.append([title, what, method, mean, less])
    return lines


def _in_words(found: Difference) -> str:
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}; p = {found.p:.3f})"


def main(words: list[str]) -> int:
    """Register the two methods, compare, and write the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stale", description=__doc__)
    parser.add_argument("--output-dir", required=True)
    folder = Path(parser.parse_known_args(words)[0].output_dir)
    for name, steps in STALE.items():
        text = f"peers learn from each other's weights of up to {steps} steps ago"
        dml_accel.register_method(name, text, exchange_every=steps)
    chosen = ["--cohort", "resnet8*2", "--seeds", str(len(SEEDS)), "--methods", FRESH, *STALE]
    if code := cli.main(["compare", *chosen, *words]):
        return int(code)
    _write(folder, shlex.join(["python", "-m", "benchmarks.stale", *words]))
    return 0


def _write(folder: Path, command: str) -> None:
    config: dict[str, Any] = read_json(folder / FRESH / "seed-0" / "config.json")["config"]
    found = surroundings()
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    headers = ["metric", "of", "method", "mean", "less mutual (95% interval)"]
    text = f"""# Fresh against stale exchange

A pair of ResNet-8 on {Path(config["dataset"]).name}, {len(SEEDS)} seeds, {config["epochs"]} \
epochs of batches of {config["batch_size"]}. `mutual` learns from the logits of every step, \
`every-N` from the other's weights of the last exchange, one every N steps (`--exchange-every N`). \
Differences are paired by seed.

{tabulate(rows(folder), headers, tablefmt="github", disable_numparse=True)}

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{command}`
"""
    (HERE / "stale.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
