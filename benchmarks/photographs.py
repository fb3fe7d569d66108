"""How fast photographs are read, and in how much memory; writes photographs.json and .md.

    python -m benchmarks.photographs [loader] [memory] [waiting] [--rounds 7] [--files 2048]

loader: images a second of our loader feed and of timm's create_loader, on the same JPEG files with
the same crops, workers and output, in alternating rounds of one process. memory: peak of train.py
and its workers on few and on many images. waiting: the share of a step for which a network that is
slower than its worker waits for images. Each part keeps what the others have found.

The files are cut from three photographs that come with scikit-learn and matplotlib.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.measuring import BATCH, HERE, Ratio, ratio, surroundings
from dml_accel.core.config import Config
from dml_accel.core.files import read_json, write_json, write_text
from dml_accel.core.host import keep_memory
from dml_accel.data.batches import Normalisation
from dml_accel.data.catalogue import list_splits
from dml_accel.data.loader import LoaderSet
from dml_accel.data.pictures import Pictures
from dml_accel.data.pixels import Geometry
from dml_accel.data.splits import Split

_CLASSES, _SIZE, _WARM_UP = 10, 224, 4
_MEAN, _STD = (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)
_SECONDS_BETWEEN = 0.1  # samples of memory
_DISTINCT, _TESTED = 256, 64  # images of the part about memory
_WORKERS = 2

Batches = Iterator[tuple[Tensor, Tensor]]


def make(root: Path, files: int) -> None:
    """Write JPEG files of about 400 x 300 pixels into class folders."""
    import matplotlib
    import sklearn.datasets

    samples = Path(sklearn.datasets.__file__).parent / "images"
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    paths = (samples / "china.jpg", samples / "flower.jpg", hopper)
    photographs = [Image.open(path).convert("RGB") for path in paths]
    draw = np.random.default_rng(0)
    for number in tqdm(range(files), "writing", disable=None, unit=" files"):
        folder = root / f"class-{number % _CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        source, width = photographs[number % len(photographs)], int(draw.integers(340, 461))
        height = width * 3 // 4
        zoom = min(1.2, source.width / width, source.height / height) * draw.uniform(0.6, 1)
        wide, high = int(width * zoom), int(height * zoom)
        x, y = (
            int(draw.integers(0, a - b + 1)) for a, b in zip(source.size, (wide, high), strict=True)
        )
        cut = source.resize((width, height), Image.Resampling.LANCZOS, (x, y, x + wide, y + high))
        cut.save(folder / f"{number:05}.jpg", quality=int(draw.integers(85, 96)))


# ---------------------------------------------------------------- loader


def our_batches(root: Path, workers: int) -> Batches:
    """Yield training batches of our loader feed, without end."""
    words = ("random-resized-crop", "flip")
    data = Config(dataset=str(root), augment=words, image_size=_SIZE).data
    listing = list_splits(data, ("train",), quiet=True).splits["train"]
    rows = torch.arange(len(listing.labels))
    images = LoaderSet(
        Split(Pictures(listing, rows, Geometry.of(data)), listing.labels),
        Normalisation(_MEAN, _STD),
        augment=data.augmentation,
        workers=workers,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    images.begin(BATCH, ((step, 0, BATCH) for step in itertools.count()))
    try:
        for step in itertools.count():
            yield images.batch(step, BATCH, 0, BATCH)
    finally:
        images.close()


def timms_batches(root: Path, workers: int, persistent: bool) -> Batches:
    """Yield training batches of timm's loader, without end."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(root), split="train"),
        (3, _SIZE, _SIZE),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        mean=_MEAN,
        std=_STD,
        num_workers=workers,
        persistent_workers=persistent,
        pin_memory=False,
    )
    while True:
        yield from loader


def images_per_second(batches: Batches, count: int) -> float:
    """Return the rate over ``count`` batches, after some that fill the queues."""
    for _ in range(_WARM_UP):
        next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        images, _ = next(batches)
    seconds = time.perf_counter() - begun
    batches.close()  # type: ignore[attr-defined]  # the workers end
    assert images.shape == (BATCH, 3, _SIZE, _SIZE) and images.dtype == torch.float32
    return count * BATCH / seconds


def loader(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both loaders in turns; a round is one pass over the files."""
    make(folder / "train", words.files)
    rivals: dict[str, Callable[[], Batches]] = {
        "ours": lambda: our_batches(folder, words.workers),
        "timm": lambda: timms_batches(folder, words.workers, persistent=False),
        "timm, persistent workers": lambda: timms_batches(folder, words.workers, persistent=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in tqdm(range(words.rounds), "rounds", disable=None):
        for name in rivals if turn % 2 else reversed(rivals):
            rates[name].append(images_per_second(rivals[name](), words.files // BATCH))
    ratios = {name: vars(ratio(rates["ours"], rates[name])) for name in rivals if name != "ours"}
    return {"rates": rates, "ratios": ratios, "files": words.files, "workers": words.workers}


# ---------------------------------------------------------------- runs of train.py


def train(folder: Path, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Start a run on a folder with the loader feed."""
    command = [sys.executable, "train.py", "--cpu", "--dataset", str(folder), "--feed", "loader"]
    command += ["--augment", "random-resized-crop", "flip"]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*command, *flags, "--output-dir", str(out)],
            cwd=HERE.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"DML_CACHE": str(out.with_suffix(".cache"))},
        )


def ended(run: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for a run.

    Raises:
        RuntimeError: it failed.
    """
    if run.wait():
        raise RuntimeError(out.with_suffix(".log").read_text(errors="replace")[-2000:])


def peaks(run: subprocess.Popen[bytes]) -> dict[str, int]:
    """Return the largest sums over a process and its workers while it runs, in bytes.

    ``RssAnon`` counts a page that workers share with the training process once for each of them;
    ``Pss_Anon`` counts it once.
    """
    most = {"RssAnon": 0, "Pss_Anon": 0}
    while run.poll() is None:
        sums = dict.fromkeys(most, 0)
        try:
            family = [run.pid, *(c.pid for c in psutil.Process(run.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        for pid in family:
            for name, file in (("RssAnon", "status"), ("Pss_Anon", "smaps_rollup")):
                try:
                    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
                except OSError:  # it has ended
                    continue
                sums[name] += sum(
                    1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")
                )
        most = {name: max(most[name], sums[name]) for name in most}
        time.sleep(_SECONDS_BETWEEN)
    return most


def memory(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure a few steps on sets of several sizes, made of links to the same images."""
    make(folder / "images", _DISTINCT)
    images = sorted((folder / "images").rglob("*.jpg"))
    found: dict[str, Any] = {"sets": list(words.sets), "peaks": [], "workers": words.workers}
    for count in words.sets:
        for split, many in (("train", count), ("test", _TESTED)):
            for number in range(many):
                target = folder / str(count) / split / f"class-{number % _CLASSES}"
                target.mkdir(parents=True, exist_ok=True)
                os.link(images[number % len(images)], target / f"{number:06}.jpg")
        out = folder / f"run-{count}"
        flags = "--cohort resnet8*2 --image-size 96 --batch-size 32 --max-steps 8 --epochs 8"
        run = train(folder / str(count), out, *flags.split(), "--workers", str(words.workers))
        found["peaks"].append(peaks(run))
        ended(run, out)
    return found


def waiting(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure how long the steps of a ResNet-18 at 128 pixels wait for one worker."""
    make(folder / "images" / "train", words.few)
    make(folder / "images" / "test", _TESTED)
    out = folder / "run"
    flags = f"--cohort timm:resnet18 --image-size 128 --batch-size 32 --max-steps {words.steps}"
    ended(train(folder / "images", out, *flags.split(), "--epochs", "50", "--workers", "1"), out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    return {"shares": [step["waiting"] for step in steps], "steps": [s["step"] for s in steps]}


# ---------------------------------------------------------------- the report


def report(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = ["# Photographs: how fast they are read, and in how much memory"]
    if part := found.get("loader"):
        rows = [
            [name, f"{median(rates):.0f}", f"{min(rates):.0f} to {max(rates):.0f}"]
            + [str(Ratio(**part["ratios"][name])) if name != "ours" else ""]
            for name, rates in part["rates"].items()
        ]
        parts.append(
            f"{part['files']:,} JPEG files of about 400 x 300 pixels, cut from three photographs; "
            f"random-resized-crop to {_SIZE} and flip, batches of {BATCH} as normalised floats on "
            f"the CPU, {part['workers']} workers and one thread; {len(part['rates']['ours'])} "
            "rounds of one pass each in turns, after "
            f"{_WARM_UP} batches. timm is `create_loader` without its prefetcher; its workers "
            "start anew after each pass unless they persist. Both keep memory as train.py does.\n\n"
            + tabulate(
                rows,
                ["loader", "images/s, median", "range", "ours, times this (95% interval)"],
                tablefmt="github",
                disable_numparse=True,
            )
            + f"\n\n{place(part)}"
        )
    if part := found.get("memory"):
        rows = [
            [f"{count:,}", *(f"{one[name] / 2**20:.0f} MiB" for name in one)]
            for count, one in zip(part["sets"], part["peaks"], strict=True)
        ]
        first, last = part["peaks"][0], part["peaks"][-1]
        rows.append(["last over first", *(f"{last[n] / first[n]:.3f}" for n in first)])
        parts.append(
            f"Peak anonymous memory of `train.py --feed loader` with {part['workers']} workers, "
            "all processes together: two ResNet-8 at 96 pixels, batch 32, 8 steps and an "
            "evaluation, statistics and listing included. The images are links to "
            f"{_DISTINCT} files. RssAnon counts pages that workers share with the training process "
            "once for each, Pss_Anon once.\n\n"
            + tabulate(rows, ["training images", "RssAnon", "Pss_Anon"], tablefmt="github")
            + f"\n\n{place(part)}"
        )
    if part := found.get("waiting"):
        rest = [100 * share for share in part["shares"][1:]]
        parts.append(
            f"A ResNet-18 at 128 pixels, batch 32, one worker, {len(rest) + 1} steps: the first "
            f"waited for images for {100 * part['shares'][0]:.1f}% of its time, the others for "
            f"{median(rest):.2f}% (median; at most {max(rest):.2f}%).\n\n{place(part)}"
        )
    return "\n\n".join(parts) + "\n"


def place(part: dict[str, Any]) -> str:
    """Return where and by which command a part was measured."""
    where = ", ".join(f"{name} {version}" for name, version in part["versions"].items() if version)
    return (
        f"{part['processor']}, {part['cores']} cores, {part['system']}; {where}; commit "
        f"{part['commit']}. Command: `{part['command']}`"
    )


_PARTS = {"loader": loader, "memory": memory, "waiting": waiting}


def main() -> None:
    """Measure the parts and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("parts", nargs="*", help=f"{', '.join(_PARTS)} (default: all)")
    parser.add_argument("--files", type=int, default=2048, help="of loader (default: 2048)")
    parser.add_argument("--rounds", type=int, default=7, help="of loader (default: 7)")
    parser.add_argument("--workers", type=int, default=_WORKERS, help=f"(default: {_WORKERS})")
    parser.add_argument("--sets", type=int, nargs="+", default=[2000, 50_000], help="of memory")
    parser.add_argument("--few", type=int, default=320, help="images of waiting (default: 320)")
    parser.add_argument("--steps", type=int, default=16, help="of waiting (default: 16)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder (default: benchmarks)")
    words = parser.parse_args()
    if unknown := [name for name in words.parts if name not in _PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(_PARTS)}")
    torch.set_num_threads(1)
    keep_memory()
    path = words.out / "photographs.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    for name in words.parts or _PARTS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            measured = _PARTS[name](words, Path(folder))
        command = "python " + shlex.join(["-m", "benchmarks.photographs", *sys.argv[1:]])
        found[name] = measured | surroundings() | {"command": command}
        write_json(path, found)  # a part that fails leaves the others
        write_text(path.with_suffix(".md"), report(found))
    print(report(found))


if __name__ == "__main__":
    main()
