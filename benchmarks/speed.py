"""How fast we are: beside others, beside what the machine can do, and as cohorts grow.

    python -m benchmarks.speed [--images FOLDER] [--before CHECKOUT] [--parts others single]
    python -m benchmarks.speed --write    # tables, plot, docs/performance.md, from the readings

Everything of a part is measured in one run, in alternating blocks, each competitor in processes of
its own that idle while another works. The readings go to benchmarks/speed.json after each block, a
part beside those measured before. What the plain command chooses is asked of the rules that it goes
by, and measured as a mode. ``--before`` measures the default of an older checkout beside it.
pytorch-dml is measured where it is installed (``pip install pytorch-dml``).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import first_step, speed_report
from benchmarks.children import measure
from benchmarks.chosen import STEPS, chosen
from benchmarks.competitors import PARTS, Asked, Competitor
from benchmarks.measuring import HERE, networks, surroundings
from benchmarks.rivals import has_pytorch_dml
from benchmarks.workloads import MACS_OF_A_PRODUCT, configuration, read
from dml_accel.core.files import write_json
from dml_accel.distributed.costs import count

_FIRST_STEP = "first-step"  # the part that has no competitors, but commands


def arithmetic(classes: int) -> int:
    """Return the multiply-accumulates of an image's forward pass through the pair."""
    config = configuration(None, {})
    nets = networks(config, classes).values()
    return sum(count(net, config.data.image_size).macs for net in nets)


def at_hand(part: str, asked: Asked, only: Sequence[str]) -> list[Competitor]:
    """Return a part's competitors that can be measured here; say what is missing."""
    competitors = [
        one for one in PARTS[part](asked) if any(fnmatchcase(one.name, name) for name in only)
    ]
    if has_pytorch_dml():
        return competitors
    left = [one for one in competitors if one.kind != "pytorch-dml"]
    if len(left) < len(competitors):
        print(
            "pytorch-dml is not installed and is left out; to measure it: pip install pytorch-dml",
            file=sys.stderr,
        )
    return left


def description(words: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Return what is said of a part beside its readings."""
    found = surroundings()
    found.pop("threads")  # each competitor's own
    if has_pytorch_dml():
        found["versions"]["pytorch-dml"] = version("pytorch-dml")
    # A folder's name, not where it is on this machine.
    folders = {str(words.images), str(words.before)}
    given = [Path(word).name if word in folders else word for word in sys.argv[1:]]
    return {
        **found,
        "before": commit_of(words.before) if words.before else None,
        "steps_of_the_command": STEPS,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python " + shlex.join(["-m", "benchmarks.speed", *given]),
        "images": "real images" if words.images else "noise",
        "load_before": os.getloadavg()[0],
        "blocks": words.blocks,
        "macs_per_image": arithmetic(classes),
        "macs_per_product": MACS_OF_A_PRODUCT,
    }


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout."""
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def readings_of(
    part: str, asked: Asked, words: argparse.Namespace, images: str | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield all readings of a part after each block."""
    if part == _FIRST_STEP:
        checkouts = {"before": asked.before} if asked.before else {}
        yield from first_step.measure({**checkouts, "now": HERE.parent}, words.blocks)
        return
    with tempfile.TemporaryDirectory() as logs:
        competitors = at_hand(part, asked, words.only)
        yield from measure(competitors, images, words.blocks, words.steps, Path(logs))


def main() -> None:
    """Measure, or write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--images", type=Path, help="folder of real images (default: noise)")
    parser.add_argument("--before", type=Path, help="checkout whose default is measured beside")
    parts = [*PARTS, _FIRST_STEP]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="which")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="competitors of these names, * for any words"
    )
    parser.add_argument("--blocks", type=int, default=9, help="alternating blocks (default: 9)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a block (default: 8)")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--output", type=Path, default=HERE, help="folder (default: benchmarks)")
    words = parser.parse_args()
    path = words.output / "speed.json"
    words.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if words.write and not found:
        parser.error(f"there is no {path} to write from; measure first, without --write")
    if not words.write:
        images = str(words.images.resolve()) if words.images else None
        # Decoded once, so that no competitor does it.
        classes = len(read(configuration(images, {})).classes)
        before = words.before.resolve() if words.before else None
        asked = Asked(chosen(classes), chosen(classes, bf16=True), before)
        for part in words.parts:
            about = description(words, classes)
            for readings in readings_of(part, asked, words, images):
                found[part] = {**about, "readings": readings}
                write_json(path, found)
    speed_report.write(found, words.output)
    print((words.output / "speed.md").read_text())


if __name__ == "__main__":
    main()
