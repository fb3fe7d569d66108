"""What the loss of each method costs, beside a step of its networks; writes benchmarks/lessons.md.

    python -m benchmarks.lessons [--blocks 15]

Targets and losses, forward and backward, of 8 peers on ready logits of 64 images and 100 classes,
against a step of 8 ResNet-8 alone (forward, backward, update), in alternating blocks.
The cross-entropy is part of the loss, and of the step.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring import BATCH, HERE, build_cohort, noise_data, ratio, surroundings, timed
from benchmarks.workloads import Steps, configuration, losses_alone
from dml_accel.analysis.methods import METHODS
from dml_accel.core.config import Config
from dml_accel.core.files import write_json, write_text
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.mutual.targets import Lesson

PEERS, CLASSES, REPEATS = 8, 100, 5


def methods() -> dict[str, dict[str, Any]]:
    """Return the flags of the methods that have a loss of their own, by name."""
    axes = {"target", "divergence", "gate", "standardize"}
    flags = {name: one.flags(200) for name, one in METHODS.items() if one.changes.keys() & axes}
    return {"mutual": {}} | {n: one for n, one in flags.items() if one.get("links") != "frozen"}


def networks() -> Steps:
    """Forward, cross-entropy, backward and update of the networks, each alone."""
    config = configuration(None, {"cohort": [f"resnet8*{PEERS}"]})
    names = [f"resnet8-{place}" for place in range(PEERS)]
    placement = Placement(Processes(config.numerics, config.compute), everywhere(names, 1))
    images = noise_data()
    peers = build_cohort(config, placement, images).peers
    x, y = images.train.batch(0, BATCH, 0, BATCH)

    def steps(count: int) -> None:
        for _ in range(count):
            for peer in peers:
                peer.optimizer.zero_grad()
                F.cross_entropy(peer.net(x), y).backward()
                peer.optimizer.step()

    return steps


def measure(blocks: int) -> dict[str, Any]:
    """Time the loss of every method and a step of the networks, in turns."""
    step = networks()
    losses = {
        name: losses_alone(None, peers=PEERS, classes=CLASSES, flags=flags)
        for name, flags in methods().items()
    }
    step(1)
    for loss in losses.values():
        loss(REPEATS)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *losses)}
    for block in tqdm(range(blocks), "blocks", disable=None):
        turns = list(losses.items())
        for name, loss in turns if block % 2 else reversed(turns):
            seconds[name].append(timed(lambda loss=loss: loss(REPEATS)) / REPEATS)
        seconds["step"].append(timed(lambda: step(1)))
    return {
        "blocks": blocks,
        "step_ms": 1e3 * sorted(seconds["step"])[blocks // 2],
        "methods": {
            name: {
                "ms": 1e3 * sorted(seconds[name])[blocks // 2],
                "share": dataclasses.asdict(ratio(seconds[name], seconds["step"])),
                "pairs": Lesson.of(Config(**flags).method).by_pairs,
            }
            for name, flags in methods().items()
        },
    }


def report(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows = [
        [
            f"`{name}`",
            "each with each" if one["pairs"] else "O(K)",
            f"{one['ms']:.2f}",
            "{:.2f}% ({:.2f} to {:.2f})".format(
                *(100 * one["share"][end] for end in ("mean", "low", "high"))
            ),
        ]
        for name, one in found["methods"].items()
    ]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return (
        "# What the loss of a method costs\n\n"
        f"{PEERS} peers, {BATCH} images, {CLASSES} classes; a step of {PEERS} ResNet-8 alone takes "
        f"{found['step_ms']:.0f} ms.\n\n"
        + tabulate(rows, ["method", "needs", "ms", "of the step"], tablefmt="github")
        + f"\n\nMedians, and the mean share over {found['blocks']} blocks with its 95% interval. "
        f"{found['processor']}, {found['cores']} cores, {found['threads']} thread(s), "
        f"{found['system']}; {where}; commit {found['commit']}. Command: `{found['command']}`\n"
    )


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lessons", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--blocks", type=int, default=15, help="default: 15")
    parser.add_argument("--out", type=Path, default=HERE, help="folder (default: benchmarks)")
    words = parser.parse_args()
    found = measure(words.blocks) | surroundings()
    found["command"] = "python " + shlex.join(["-m", "benchmarks.lessons", *sys.argv[1:]])
    write_json(words.out / "lessons.json", found)
    write_text(words.out / "lessons.md", report(found))
    print(report(found))


if __name__ == "__main__":
    main()
