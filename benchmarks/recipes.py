"""What recipes gain, and what they cost; writes benchmarks/recipes.json and recipes.md.

    python -m benchmarks.recipes speed [--blocks 15]
    python -m benchmarks.recipes accuracy --images FOLDER [--epochs 20] [--seeds 3] [--at-once 1]

speed: whole steps of a ResNet-32 pair over its networks' own work with torch's fused optimizer, in
alternating blocks of one process; and the microseconds an image that each augmentation takes on one
thread. accuracy: a resnet20 pair by the paper's recipe and by others, as many runs at once as asked
for; differences to the paper's are paired by seed. Each part keeps what the other has found.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring import (
    BATCH,
    HERE,
    build_cohort,
    device,
    noise,
    noise_data,
    ratio,
    surroundings,
    timed,
)
from dml_accel.core.config import Config
from dml_accel.core.files import read_json, write_json, write_text
from dml_accel.data.batches import ImageFormat
from dml_accel.data.images import prepare
from dml_accel.data.sources import Source
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import train_step

# ---------------------------------------------------------------- speed

_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(
        weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    ),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3, weight_decay=5e-4, fused=True),
}
_WORDS = (
    *("none", "crop-flip", "erasing", "random-resized-crop", "randaugment", "trivialaugment"),
    "color-jitter",
)
_STEPS, _BATCHES = 5, 10


def step_cost(optimizer: str, blocks: int) -> dict[str, Any]:
    """Whole steps with their input against forward, backward and torch's optimizer alone."""
    on_cpu = device().type == "cpu"
    config = Config(cohort=("resnet32*2",), batch_size=BATCH, cpu=on_cpu, optimizer=optimizer)
    names = [spec.name for spec in parse_cohort(config.cohort)]
    placement = Placement(Processes(config.numerics, config.compute), everywhere(names, 1))
    images = noise_data()
    ours, bare = (build_cohort(config, placement, images) for _ in range(2))
    optimizers = [_OPTIMIZERS[optimizer](peer.module.parameters()) for peer in bare.peers]
    x, y = images.train.batch(0, BATCH, 0, BATCH)

    def whole() -> None:
        for step in range(_STEPS):
            train_step(ours, step, config.optim.highest_lr)

    def networks_alone() -> None:
        for _ in range(_STEPS):
            for one in optimizers:
                one.zero_grad()
            losses = [F.cross_entropy(peer.net(x), y) for peer in bare.peers]
            for loss in losses:
                loss.backward()
            for one in optimizers:
                one.step()

    whole(), networks_alone()  # warm-up
    readings: dict[str, list[float]] = {"whole": [], "alone": []}
    for block in tqdm(range(blocks), optimizer, disable=None):
        turns = [("whole", whole), ("alone", networks_alone)]
        for name, work in turns if block % 2 else reversed(turns):
            readings[name].append(timed(work) / _STEPS)
    return {
        "ratio": dataclasses.asdict(ratio(readings["whole"], readings["alone"])),
        "whole_ms": 1e3 * median(readings["whole"]),
        "alone_ms": 1e3 * median(readings["alone"]),
        "blocks": blocks,
        "steps_per_block": _STEPS,
    }


def augmentation_cost(word: str, blocks: int) -> float:
    """Microseconds an image of a whole batch on one thread; the median of the blocks."""
    split = noise(1000)
    source = Source(split, split, tuple(map(str, range(100))))
    images = ImageFormat(32, torch.float32, torch.contiguous_format, torch.device("cpu"))
    data = prepare(source, Config(augment=(word,)).data, 0, images).train
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data.batch(0, BATCH, 0, BATCH)
    seconds = [
        timed(lambda b=b: [data.batch(b * _BATCHES + s, BATCH, 0, BATCH) for s in range(_BATCHES)])
        for b in range(blocks)
    ]
    torch.set_num_threads(threads)
    return 1e6 * median(seconds) / (_BATCHES * BATCH)


def speed(words: argparse.Namespace) -> dict[str, Any]:
    """Measure steps and augmentation."""
    return {
        "steps": {name: step_cost(name, words.blocks) for name in _OPTIMIZERS},
        "us_per_image": {word: augmentation_cost(word, words.blocks) for word in _WORDS},
    }


# ---------------------------------------------------------------- accuracy

BASELINE = "paper"


def recipes(epochs: int) -> dict[str, str]:
    """Return the flags of each recipe; the paper's drops come after 0.3, 0.6 and 0.9 of a run."""
    cosine = f"--lr-schedule cosine --warmup {max(1, epochs // 20)}"
    mixed = "--augment crop-flip randaugment --mixup 0.2 --label-smoothing 0.1"
    return {
        BASELINE: f"--lr-step {round(0.3 * epochs)}",
        "cosine": cosine,
        "cosine, RandAugment": f"{cosine} --augment crop-flip randaugment",
        "cosine, RandAugment, mixup, smoothing": f"{cosine} {mixed} --ema 0.999",
        "the same with AdamW": f"{cosine} {mixed} --ema 0.999 --optimizer adamw --lr 0.002 "
        "--weight-decay 0.05 --wd-exclude-norm-bias",
    }


def accuracy(words: argparse.Namespace) -> dict[str, Any]:
    """Train every recipe with every seed."""
    todo = [(r, seed) for seed in range(words.seeds) for r in recipes(words.epochs)]
    found: dict[str, Any] = {"epochs": words.epochs, "flags": recipes(words.epochs), "runs": []}
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        bar = stack.enter_context(tqdm(total=len(todo), disable=None))
        working: list[tuple[str, int, Path, subprocess.Popen[bytes]]] = []
        stack.callback(lambda: [one[3].kill() for one in working])  # if one of them fails
        while todo or working:
            while todo and len(working) < words.at_once:
                recipe, seed = todo.pop(0)
                folder = Path(name) / f"{seed}-{recipe.replace(' ', '-').replace(',', '')}"
                working.append((recipe, seed, folder, start(recipe, seed, folder, words)))
            time.sleep(0.2)
            for one in [one for one in working if one[3].poll() is not None]:
                working.remove(one)
                found["runs"].append(read_run(*one))
                bar.update()
    return found


def start(recipe: str, seed: int, folder: Path, words: argparse.Namespace) -> Any:
    """Start the run of a recipe with a seed."""
    command = [sys.executable, "-m", "dml_accel", "train", "--cohort", "resnet20*2"]
    command += ["--dataset", str(words.images), "--epochs", str(words.epochs), "--seed", str(seed)]
    command += ["--eval-every", f"{words.epochs}ep", "--save-every", f"{words.epochs}ep"]
    command += ["--cpu"] if device().type == "cpu" else []
    command += [*recipes(words.epochs)[recipe].split(), "--output-dir", str(folder)]
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=HERE.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1"} | dict(os.environ),
        )


def read_run(recipe: str, seed: int, folder: Path, child: Any) -> dict[str, Any]:
    """Return the final accuracies of a run, fractions in [0, 1]."""
    if child.returncode:
        log = folder.with_suffix(".log").read_text(errors="replace")
        raise RuntimeError(f"{recipe}, seed {seed} ended with {child.returncode}: {log[-2000:]}")
    results = read_json(folder / "results.json")
    peers = results["peers"]
    run = {
        "recipe": recipe,
        "seed": seed,
        "top1": sum(peer["test"]["top1"] for peer in peers) / len(peers),
        "nll": sum(peer["test"]["nll"] for peer in peers) / len(peers),
        "ensemble": results["ensemble"]["top1"],
        "seconds_per_step": results["throughput"]["step_seconds_median"],
        "n": peers[0]["test"]["n"],
    }
    if "ema" in peers[0]:
        run["averages"] = sum(peer["ema"]["test"]["top1"] for peer in peers) / len(peers)
    return run


# ---------------------------------------------------------------- the report


def accuracy_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a row for each recipe: means over seeds, and the paired difference to the paper's."""
    from dml_accel.analysis.statistics import paired_difference, summarise

    def values(recipe: str, name: str) -> dict[int, float | None]:
        runs = [run for run in found["runs"] if run["recipe"] == recipe and name in run]
        return {run["seed"]: 100 * run[name] for run in runs}

    def mean(recipe: str, name: str) -> str:
        one = summarise(list(values(recipe, name).values()))
        if one.mean is None:
            return ""
        return f"{one.mean:.2f}" + (f" ± {one.mean - one.low:.2f}" if one.low is not None else "")

    rows = []
    for recipe in found["flags"]:
        change = "" if recipe == BASELINE else "not defined"
        pair = paired_difference(values(recipe, "top1"), values(BASELINE, "top1"))
        if recipe != BASELINE and pair.low is not None and pair.high is not None:
            change = f"{pair.mean:+.2f} ({pair.low:+.2f} to {pair.high:+.2f})"
        columns = [mean(recipe, name) for name in ("top1", "averages", "ensemble")]
        rows.append([recipe, *columns, change, found["flags"][recipe]])
    return rows


def report(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = ["# Recipes: what they gain and what they cost"]
    if part := found.get("accuracy"):
        seeds = len({run["seed"] for run in part["runs"]})
        heads = ["recipe", "mean peer, top-1 %", "averages", "ensemble", "to the paper's", "flags"]
        parts.append(
            f"A resnet20 pair, mutual learning, {part['epochs']} epochs, {part['images']}, batch "
            f"64, n = {seeds} seeds, {part['runs'][0]['n']:,} test images; 95% t-intervals over "
            "seeds, differences paired by seed.\n\n"
            + tabulate(accuracy_rows(part), heads, tablefmt="github", disable_numparse=True)
            + "\n\n"
            + place(part)
        )
    for part in (found[name] for name in ("speed", "speed on cuda") if name in found):
        rows = [
            [
                f"step of a ResNet-32 pair with {name}, over its networks' own with torch's fused "
                f"{name}",
                "{:+.1f}% ({:+.1f}% to {:+.1f}%)".format(
                    *(100 * (one["ratio"][end] - 1) for end in ("mean", "low", "high"))
                ),
                f"{one['blocks']} blocks of {one['steps_per_block']} steps in turns, medians "
                f"{one['whole_ms']:.0f} and {one['alone_ms']:.0f} ms",
            ]
            for name, one in part["steps"].items()
        ]
        costs = [[f"--augment {w}", f"{us:.0f}"] for w, us in part["us_per_image"].items()]
        parts.append(
            tabulate(rows, ["what", "measured", "how"], tablefmt="github")
            + "\n\nMicroseconds an image of 32 x 32 pixels, one CPU thread, normalisation "
            "included:\n\n"
            + tabulate(costs, ["augmentation", "us"], tablefmt="github")
            + "\n\n"
            + place(part)
        )
    return "\n\n".join(parts) + "\n"


def place(part: dict[str, Any]) -> str:
    """Return where and by which command a part was measured."""
    where = ", ".join(f"{n} {v}" for n, v in part["versions"].items() if v)
    return (
        f"{part['processor']}, {part['cores']} cores, {part['threads']} thread(s), "
        f"{part['system']}; {where}; commit {part['commit']}. Command: `{part['command']}`"
    )


def main() -> None:
    """Measure one part and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("part", choices=("speed", "accuracy"))
    parser.add_argument("--blocks", type=int, default=15, help="of speed (default: 15)")
    parser.add_argument("--images", type=Path, help="folder of images, for accuracy")
    parser.add_argument("--epochs", type=int, default=20, help="of accuracy (default: 20)")
    parser.add_argument("--seeds", type=int, default=3, help="of accuracy (default: 3)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder (default: benchmarks)")
    words = parser.parse_args()
    if words.part == "accuracy" and words.images is None:
        parser.error("accuracy needs --images, a folder of images")
    path = words.out / "recipes.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    shown = [Path(w).name if w == str(words.images) else w for w in sys.argv[1:]]
    part = (speed if words.part == "speed" else accuracy)(words)
    on_gpu = words.part == "speed" and device().type != "cpu"
    found[f"{words.part} on {device().type}" if on_gpu else words.part] = part | {
        "images": words.images.name if words.images else "noise",
        **surroundings(),
        "command": "python " + shlex.join(["-m", "benchmarks.recipes", *shown]),
    }
    write_json(path, found)
    write_text(path.with_suffix(".md"), report(found))
    print(report(found))


if __name__ == "__main__":
    main()
