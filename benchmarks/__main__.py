"""Measure input, step, memory, decoding and start; write benchmarks/results.json and results.md.

    python -m benchmarks [--images FOLDER]

Ratios are of alternating blocks of one run, with 95% intervals over the blocks; absolute numbers
are those of this machine and of whatever else it was doing. ``--images`` names a folder of real
images (parquet in the hub's layout) to decode; without it, images are generated.
"""

import argparse
import io
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.first_step import seconds_to_first_step
from benchmarks.measuring import (
    BATCH,
    HERE,
    IMAGES,
    build_cohort,
    device,
    image_set,
    noise_data,
    ratio,
    surroundings,
    timed,
)
from dml_accel.core.config import Config
from dml_accel.data.catalogue import list_splits
from dml_accel.data.decode import decode
from dml_accel.data.pixels import Geometry
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.step import train_step


def input_cost(blocks: int) -> dict[str, Any]:
    """Microseconds an image on one thread: gather, crop, flip, normalise; the epoch's draws too."""
    images, threads = image_set(), torch.get_num_threads()
    torch.set_num_threads(1)
    per_epoch = IMAGES // BATCH
    seconds = [
        timed(lambda b=b: [images.batch(b * per_epoch + s, BATCH, 0, BATCH) for s in range(200)])
        for b in range(blocks)
    ]
    torch.set_num_threads(threads)
    each = [1e6 * s / (200 * BATCH) for s in seconds]
    return {"us_per_image": median(each), "min": min(each), "max": max(each), "blocks": blocks}


def step_cost(blocks: int, steps: int) -> dict[str, Any]:
    """The whole step of a ResNet-32 pair against its networks' own work on a ready batch."""
    config = Config(cohort=("resnet32*2",), batch_size=BATCH, cpu=device().type == "cpu")
    names = [spec.name for spec in parse_cohort(config.cohort)]
    placement = Placement(Processes(config.numerics, config.compute), everywhere(names, 1))
    images = noise_data()
    ours, bare = (build_cohort(config, placement, images) for _ in range(2))
    x, y = images.train.batch(0, BATCH, 0, BATCH)

    def whole() -> None:
        for step in range(steps):
            train_step(ours, step, 0.1)

    def networks_alone() -> None:
        for _ in range(steps):
            for peer in bare.peers:
                peer.optimizer.zero_grad()
            losses = [F.cross_entropy(peer.net(x), y) for peer in bare.peers]
            for loss in losses:
                loss.backward()
            for peer in bare.peers:
                peer.optimizer.step()

    whole(), networks_alone()  # warm-up
    pairs = []
    for block in tqdm(range(blocks), "step", disable=None):
        order = (whole, networks_alone) if block % 2 else (networks_alone, whole)
        took = {work: timed(work) for work in order}
        pairs.append((took[whole] / steps, took[networks_alone] / steps))
    whole_s, alone_s = zip(*pairs, strict=True)
    found = ratio(whole_s, alone_s)
    return {
        "step_ms": 1e3 * median(whole_s),
        "networks_alone_ms": 1e3 * median(alone_s),
        "ratio_median": median(a / b for a, b in pairs),
        "ratio_mean": found.mean,
        "ratio_95": [found.low, found.high],
        "blocks": blocks,
        "steps_per_block": steps,
    }


def png_folder(folder: Path, images: Path | None) -> str:
    """Write 50,000 CIFAR-size PNGs as parquet: real ones repeated, or smooth noise."""
    if images:
        train = datasets.load_dataset(str(images), split="train")
        train = datasets.concatenate_datasets([train] * -(-IMAGES // len(train)))
        train.select(range(IMAGES)).to_parquet(folder / "train.parquet")
        datasets.load_dataset(str(images), split="test").to_parquet(folder / "test.parquet")
        return "real images of --images, repeated"
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(5_000):
        small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
        contents.append({"bytes": buffer.getvalue(), "path": None})
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(100)}
    labels = [i % 100 for i in range(5_000)]
    made = datasets.Dataset.from_dict(
        {"img": contents, "label": labels}, features=datasets.Features(features)
    )
    datasets.concatenate_datasets([made] * 10).to_parquet(folder / "train.parquet")
    made.to_parquet(folder / "test.parquet")
    return "generated images"


def start_cost(images: Path | None) -> dict[str, Any]:
    """Decoding once, then the time from the command to the first step, and the peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set").mkdir()
        kind = png_folder(folder / "set", images)
        os.environ.update(DML_CACHE=str(folder / "cache"), HF_DATASETS_CACHE=str(folder / "hf"))
        dataset = datasets.load_dataset(str(folder / "set"), split="train")
        label = "fine_label" if "fine_label" in dataset.features else "label"
        data = Config(dataset=str(folder / "set"), label_column=label, image_size=32).data
        listing, rows = list_splits(data, ("train",), quiet=True).splits["train"], range(IMAGES)
        decoding_s = timed(lambda: decode(listing, rows, Geometry.of(data), quiet=True))
        flags = ["--dataset", str(folder / "set"), "--label-column", label]
        flags += ["--cpu"] if device().type == "cpu" else []
        flags += ["--cohort", "resnet32*2", "--max-steps", "4"]
        first_steps = []
        for attempt in range(4):  # the first one decodes
            run = folder / f"run-{attempt}"
            first_steps.append(seconds_to_first_step(flags, run))
            peak = json.loads((run / "results.json").read_text())["peak_memory_bytes"]
    return {
        "decoding_s": decoding_s,
        "images": IMAGES,
        "kind": kind,
        "first_step_s": median(first_steps[1:]),
        "first_step_with_decoding_s": first_steps[0],
        "peak_memory_gb": peak / 1e9,
        "runs": len(first_steps) - 1,
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    step, start, first = found["step"], found["start"], found["input"]
    low, high = (f"{100 * (value - 1):+.1f}%" for value in step["ratio_95"])
    rows = [
        [
            "input: crop, flip, normalise, one thread",
            f"{first['us_per_image']:.1f} us per image",
            "20",
            f"{first['blocks']} blocks, {first['min']:.1f} to {first['max']:.1f}",
        ],
        [
            "ResNet-32 pair, whole step over the networks' own",
            f"{100 * (step['ratio_mean'] - 1):+.1f}%",
            "3%",
            f"95% interval {low} to {high}; {step['blocks']} alternating blocks of "
            f"{step['steps_per_block']} steps; medians {step['step_ms']:.0f} and "
            f"{step['networks_alone_ms']:.0f} ms",
        ],
        [
            "the same pair's peak memory, training and evaluation",
            f"{start['peak_memory_gb']:.2f} GB",
            "2 GB",
            "resident, the whole process",
        ],
        [
            f"decoding {start['images']:,} PNGs, one thread",
            f"{start['decoding_s']:.1f} s",
            "10 s",
            start["kind"],
        ],
        [
            "from the command to the first step, decoded before",
            f"{start['first_step_s']:.1f} s",
            "10 s",
            f"median of {start['runs']} runs; {start['first_step_with_decoding_s']:.1f} s with "
            "decoding",
        ],
    ]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"""# Speed and memory

{tabulate(rows, ["what", "measured", "at most", "how"], tablefmt="github")}

{found["processor"]}, {found["cores"]} cores, {found["threads"]} threads, {found["system"]};
{where}; commit {found["commit"]}. Command: `{found["command"]}`
"""


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of real images to decode")
    parser.add_argument("--blocks", type=int, default=21, help="alternating blocks (default: 21)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder (default: benchmarks)")
    words = parser.parse_args()
    found = {
        "input": input_cost(words.blocks),
        "step": step_cost(words.blocks, steps=5),
        "start": start_cost(words.images),
        **surroundings(),
        "command": "python -m benchmarks"
        + (f" --images {words.images.name}" if words.images else ""),
    }
    (words.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (words.output / "results.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
