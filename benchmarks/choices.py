"""What the rules of ``auto`` rest on: memory formats, compilation, threads and processes.

    python -m benchmarks.choices --blocks 5

Whole steps of one network, batch 64, 32 x 32 pixels of noise, 100 classes, of one thread where not
said. It writes choices.json and choices.md; dml_accel/distributed/rules.py has what follows. What
two processes gain, and compiling in bf16, is in speed.md.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import measure
from benchmarks.competitors import Competitor
from benchmarks.measuring import BATCH, HERE, networks, ratio, surroundings
from dml_accel.core.config import Config
from dml_accel.core.tables import table
from dml_accel.distributed.costs import count

NETWORKS = ("resnet8", "resnet32", "mobilenet")
_BASE = "channels_last"
# Each way to compute, as flags of train.py.
WAYS: dict[str, dict[str, Any]] = {
    "contiguous": {"memory_format": "contiguous"},
    _BASE: {"memory_format": "channels_last"},
    "compiled": {"memory_format": "channels_last", "compile": "on"},
}
_OF_A_BLOCK = 3


def of_network(name: str, cache: str) -> list[Competitor]:
    """Return the ways to train one network; none finds what another run has compiled."""
    found = []
    for way, flags in WAYS.items():
        variables = {
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{name}-{len(found)}",
        }
        options = {"cohort": [name], **flags}
        found.append(Competitor(way, "training", options, environment=variables))
    options = {"cohort": [name], **WAYS[_BASE]}
    return [*found, Competitor("2 threads", "training", options)]


def rows(name: str, readings: list[dict[str, Any]]) -> list[list[str]]:
    """Return a row for each way to train a network."""
    cost = count(networks(Config(cohort=[name], kl_weight=0.0))[f"{name}-0"], 32)
    base = next(one for one in readings if one["name"] == _BASE)
    lines = []
    for one in readings:
        step = median(one["seconds"]) / one["steps"]
        rate = 3 * BATCH * cost.macs / step / 1e9
        start = one["prepared_s"] + one["warm_up_s"]
        compiles = start - base["prepared_s"] - base["warm_up_s"]
        compiling = f"{compiles:.0f}" if "compiled" in one["name"] else ""
        times = "1" if one is base else str(ratio(one["seconds"], base["seconds"]))
        facts = [f"{1e3 * step:.0f}", times, f"{rate:.0f}", compiling]
        facts.append(f"{compiles / cost.operations:.2f}" if compiling else "")
        lines.append([name, str(cost.operations), one["name"], *facts])
    return lines


def report(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    heads = ["network", "operations", "way", "ms per step", f"times {_BASE}"]
    heads += ["10^9 MAC/s", "s to compile", "s an operation"]
    lines = [row for name, readings in found["networks"].items() for row in rows(name, readings)]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"""# What the rules of auto rest on

Whole steps, batch {BATCH}, 32 x 32 pixels of noise, 100 classes; one thread where not said.
{found["blocks"]} alternating blocks; ratios with 95% intervals. Operations are those that a forward
pass starts. Compilation starts from an empty cache and uses one thread.

{table(lines, heads, "github", left=3)}

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{found["command"]}`
"""


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choices", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--blocks", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="which networks")
    given = parser.parse_args()
    found: dict[str, Any] = {"networks": {}, "blocks": given.blocks}
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for name in given.networks:
            ways = of_network(name, folder)
            for readings in measure(ways, None, given.blocks, _OF_A_BLOCK, logs):
                found["networks"][name] = readings
    found |= surroundings()
    found["command"] = "python " + shlex.join(["-m", "benchmarks.choices", *sys.argv[1:]])
    (HERE / "choices.json").write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    (HERE / "choices.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
