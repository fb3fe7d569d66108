"""How fast we are: beside others, beside what the machine can do, and as cohorts grow.

    python -m benchmarks.speed [--images FOLDER] [--parts others limits growth]
    python -m benchmarks.speed --write    # tables, plot, docs/performance.md, from the readings

Everything of a part is measured in one run, in alternating blocks, each competitor in processes of
its own that idle while another works. The readings go to benchmarks/speed.json after each block, a
part beside those measured before. pytorch-dml is measured where it is installed
(``pip install pytorch-dml``).
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import speed_report
from benchmarks.children import measure
from benchmarks.competitors import PARTS, Competitor
from benchmarks.measuring import HERE, networks, surroundings
from benchmarks.rivals import has_pytorch_dml
from benchmarks.workloads import MACS_OF_A_PRODUCT, configuration, read
from dml_accel.core.files import write_json
from dml_accel.distributed.costs import count


def arithmetic(classes: int) -> int:
    """Return the multiply-accumulates of an image's forward pass through the pair."""
    config = configuration(None, {})
    nets = networks(config, classes).values()
    return sum(count(net, config.data.image_size).macs for net in nets)


def at_hand(part: str, only: str) -> list[Competitor]:
    """Return a part's competitors that can be measured here; say what is missing."""
    competitors = [one for one in PARTS[part]() if only in one.name]
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
    given = [Path(w).name if w == str(words.images) else w for w in sys.argv[1:]]
    return {
        **found,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python " + shlex.join(["-m", "benchmarks.speed", *given]),
        "images": "real images" if words.images else "noise",
        "load_before": os.getloadavg()[0],
        "blocks": words.blocks,
        "macs_per_image": arithmetic(classes),
        "macs_per_product": MACS_OF_A_PRODUCT,
    }


def main() -> None:
    """Measure, or write what was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--images", type=Path, help="folder of real images (default: noise)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which")
    parser.add_argument("--only", default="", help="competitors with this in their name")
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
        for part in words.parts:
            about = description(words, classes)
            with tempfile.TemporaryDirectory() as logs:
                competitors = at_hand(part, words.only)
                for readings in measure(competitors, images, words.blocks, words.steps, Path(logs)):
                    found[part] = {**about, "readings": readings}
                    write_json(path, found)
    speed_report.write(found, words.output)
    print((words.output / "speed.md").read_text())


if __name__ == "__main__":
    main()
