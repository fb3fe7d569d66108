"""What a step in eager mode saves by each thing that it does, or could save by others.

    python -m benchmarks.eager [--images FOLDER] [--blocks 9] [--steps 4]

A ResNet-32 pair in single precision in one process, as a run trains it, and in turns with it the
same with one thing changed. Writes benchmarks/eager.json and .md.
"""

import argparse
import contextlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate

from benchmarks.children import measure
from benchmarks.competitors import Competitor
from benchmarks.measuring import HERE, ratio, surroundings
from benchmarks.workloads import Steps, training
from dml_accel.core.files import write_json, write_text
from dml_accel.models import networks, optim

_RELU, _ZERO_GRAD = torch.relu, torch.optim.Optimizer.zero_grad
_OURS = {"compile": "off"}
_ALLOCATORS = ("jemalloc", "tcmalloc")


def _relu_is(function: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[Any]:
    return mock.patch.object(networks.F, "relu", lambda x, inplace=False: function(x))


def _optimizer_is(foreach: bool) -> AbstractContextManager[Any]:
    """Make optimizers that are not fused, while a cohort is built."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(optim, "has_fused", lambda name: False))
    stack.enter_context(mock.patch.object(optim, "_arguments", lambda _: {"foreach": foreach}))
    return stack


def _zeroed(optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
    _ZERO_GRAD(optimizer, set_to_none=False)


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# What is changed while a cohort is built, and while it takes steps.
BUILDING: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "optimizer: a loop instead of fused": lambda: _optimizer_is(foreach=False),
    "optimizer: foreach instead of fused": lambda: _optimizer_is(foreach=True),
}
STEPPING: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "ReLU: not in place": lambda: _relu_is(_RELU),
    "ReLU: clamp_min": lambda: _relu_is(lambda x: x.clamp_min(0)),
    "gradients: zeroed instead of dropped": lambda: mock.patch.object(
        torch.optim.SGD, "zero_grad", _zeroed
    ),
    "denormal numbers: flushed to zero": _without_denormals,
    "oneDNN: off": lambda: torch.backends.mkldnn.flags(enabled=False),
}
CHANGES = (*STEPPING, *BUILDING)


def changed(images: str | None, *, change: str) -> Steps:
    """Return the steps of our training with one thing changed, which is as before after each block.

    Args:
        images: the folder.
        change: of ``CHANGES``.
    """
    with BUILDING.get(change, contextlib.nullcontext)():
        steps = training(images, **_OURS)

    def under_change(count: int) -> None:
        with STEPPING.get(change, contextlib.nullcontext)():
            steps(count)

    return under_change


def fused_operators() -> list[str]:
    """Return the operators of torch that normalise a batch and activate it at once."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    return sorted(name for name in names if "batch_norm" in name and "relu" in name)


def allocators() -> list[str]:
    """Return the other allocators that this system has."""
    listed = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    return [name for name in _ALLOCATORS if name in listed]


def report(found: dict[str, Any]) -> str:
    """Return eager.md."""
    readings = [one for one in found["readings"] if one["seconds"]]
    rows = []
    for base, one in zip(readings[::2], readings[1::2], strict=True):
        took = [f"{1e3 * median(of['seconds']) / of['steps']:.0f} ms" for of in (base, one)]
        change = ratio(one["seconds"], base["seconds"]).as_change()
        rows.append([one["options"]["change"], *took, change])
    headers = ["changed", "as it is", "changed", "a step takes"]
    where = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    others = ", ".join(found["allocators"]) or f"neither {' nor '.join(_ALLOCATORS)}"
    return f"""# What eager mode saves

A ResNet-32 pair, batch 64, single precision, one process, as train.py trains it with `--compile
off`; in turns with it, in the same process, the same with one thing changed. Medians; the change is
a geometric mean over {found["blocks"]} alternating blocks with its 95% interval. "Nothing" says how
far two equal cohorts differ.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}

Batch norm and ReLU in one kernel: torch {found["versions"]["torch"]} has these operators for it:
{", ".join(f"`{name}`" for name in found["fused"]) or "none"}. The quantized ones are for inference
on 8-bit integers; oneDNN's own, which trains, is not among them. Other allocators on this machine:
{others}.

{found["processor"]}, {found["cores"]} cores, {found["system"]}; {where}; commit {found["commit"]}.
Command: `{found["command"]}`
"""


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.eager", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--images", type=Path, help="folder of real images (default: noise)")
    parser.add_argument("--blocks", type=int, default=9, help="alternating blocks (default: 9)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block (default: 4)")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=CHANGES, help="which")
    parser.add_argument("--output", type=Path, default=HERE, help="folder (default: benchmarks)")
    words = parser.parse_args()
    images = str(words.images.resolve()) if words.images else None
    competitors = [
        Competitor(
            f"as it is, beside {change}",
            "training",
            _OURS,
            beside=Competitor(change, "changed", {"change": change}),
        )
        for change in words.changes
    ]
    given = [words.images.name if word == str(words.images) else word for word in sys.argv[1:]]
    found = surroundings() | {
        "fused": fused_operators(),
        "allocators": allocators(),
        "command": "python " + shlex.join(["-m", "benchmarks.eager", *given]),
    }
    with tempfile.TemporaryDirectory() as logs:
        measured = measure(competitors, images, words.blocks, words.steps, Path(logs))
        # Written after each block: one that is interrupted loses no other.
        for found["blocks"], found["readings"] in enumerate(measured, 1):
            write_json(words.output / "eager.json", found)
            write_text(words.output / "eager.md", report(found))
    print(report(found))


if __name__ == "__main__":
    main()
