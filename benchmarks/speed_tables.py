"""From the readings of benchmarks/speed.json to the tables of speed.md."""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from tabulate import tabulate

from benchmarks.measuring import BATCH, MEMORY_KEPT, Ratio, ratio

Reading = dict[str, Any]
_VARIABLES = " ".join(f"`{name}={value}`" for name, value in MEMORY_KEPT.items())
# What grows in each series of cohorts of ResNet-8, and whether a step should grow with it.
_SERIES = {
    "peers": ("More peers, 1 process of 2 threads", True),
    "peers in 2 processes": ("More peers, 2 processes of 1 thread", True),
    "classes": ("More classes, 4 peers", False),
    "batch": ("Larger batches, 2 peers", True),
    "batch, memory kept": ("Larger batches, 2 peers, memory kept", True),
}


def seconds(reading: Reading) -> list[float]:
    """Return the seconds of a step, block by block."""
    return [block / reading["steps"] for block in reading["seconds"]]


def images_per_second(reading: Reading) -> float:
    """Return the median block's rate; an image counts once however many peers see it."""
    images = reading["options"].get("batch_size", BATCH)
    return float(images / median(seconds(reading)))


def faster(one: Reading, other: Reading | None) -> str:
    """Return how many times as fast as another one is, with its interval."""
    if other is None or not one["seconds"]:
        return ""
    return "1" if one is other else str(ratio(seconds(other), seconds(one)))


def rivals(readings: Sequence[Reading]) -> list[Reading | None]:
    """Return pytorch-dml as its README uses it, the fastest that it can be made, the plain loop."""
    measured = [one for one in readings if one["seconds"]]

    def of(whose: str, tuned: bool) -> list[Reading]:
        about = [(one, one["about"]) for one in measured]
        return [o for o, a in about if a["whose"] == whose and a.get("tuned", False) == tuned]

    # All are compared with the one that was the fastest of all in this very run: to its favour.
    return [
        next(iter(of("pytorch-dml", False)), None),
        min(of("pytorch-dml", True), key=_mean_log, default=None),
        next(iter(of("plain", False)), None),
    ]


def fastest(
    readings: Sequence[Reading], ours: bool, processes: int, tuned: bool, bf16: bool | None = None
) -> Reading | None:
    """Return the fastest of some readings; None if there is none of them.

    Args:
        readings: of a part.
        ours: ours, or those of all others.
        processes: of which they are.
        tuned: all that was measured, or what takes no flag: of others what their documentation
            shows, of ours the plain command, with as many processes as are asked for.
        bf16: in half precision, or in single; None for either.
    """
    chosen = plain_command(readings)
    found = []
    for one in readings:
        about = one["about"]
        is_ours = about["whose"] == "ours"
        if not one["seconds"] or one["processes"] != processes or is_ours != ours:
            continue
        if about["whose"] == "before" or bf16 not in (None, about.get("bf16", False)):
            continue
        is_plain = not about.get("tuned", False)
        if ours:
            is_plain = chosen is not None and one["options"] == chosen["options"]
        if tuned or is_plain:
            found.append(one)
    return min(found, key=_mean_log, default=None)


def plain_command(
    readings: Sequence[Reading], bf16: bool = False, whose: str = "ours"
) -> Reading | None:
    """Return the reading of what the plain command does, or with ``--mixed-precision bf16``."""
    command = "--mixed-precision bf16" if bf16 else "plain command"
    abouts = [(one, one["about"]) for one in readings if one["seconds"]]
    found = (o for o, a in abouts if a["whose"] == whose and a.get("command") == command)
    return next(found, None)


def _mean_log(one: Reading) -> float:
    return fmean(map(math.log, seconds(one)))


def alike(readings: Sequence[Reading]) -> str:
    """Return the table of ours beside others, like for like; empty without a plain command."""
    if plain_command(readings) is None:
        return ""
    rows = []
    ways = (
        ("plain", False, False),
        ("tuned, single precision", True, False),
        ("tuned, any precision", True, None),
    )
    for way, tuned, bf16 in ways:
        for processes in (1, 2):
            pair = [fastest(readings, ours, processes, tuned, bf16) for ours in (False, True)]
            theirs, ours = pair
            if theirs and ours:
                rates = [f"{_short(one)}: {images_per_second(one):.0f}" for one in (theirs, ours)]
                rows.append([way, processes, *rates, faster(ours, theirs)])
    headers = ["", "processes", "fastest of the others: images/s", "ours: images/s"]
    return tabulate(rows, [*headers, "times as fast"], tablefmt="github", disable_numparse=True)


def _short(one: Reading) -> str:
    """Return a name without what the table says anyway."""
    name = one["name"].removeprefix("ours, ")
    return name.replace(", 2 processes (DDP)", "").replace(", 2 processes", "")


def commands(readings: Sequence[Reading]) -> str:
    """Return the table of what our commands do by themselves beside before, others and our best."""
    readme, tuned, _ = rivals(readings)
    rows = []

    def add(one: Reading | None, others: dict[str, Reading | None]) -> None:
        for name, other in others.items():
            if one and other:
                rows.append([one["name"].removeprefix("ours, "), name, faster(one, other)])

    for bf16 in (False, True):
        best = _best(readings, bf16)
        precision = "bf16" if bf16 else "single precision"
        beside = {
            "before": plain_command(readings, bf16, whose="before"),
            "pytorch-dml, as its README": readme,
            f"our fastest in {precision}": best,
        }
        add(plain_command(readings, bf16), beside)
    rivals_ = {"pytorch-dml, as its README": readme, "the fastest pytorch-dml": tuned}
    add(_best(readings, None), rivals_)
    headers = ["ours", "beside", "times as fast"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _best(readings: Sequence[Reading], bf16: bool | None) -> Reading | None:
    both = [fastest(readings, True, count, True, bf16) for count in (1, 2)]
    return min((one for one in both if one), key=_mean_log, default=None)


def _gigabytes(reading: Reading) -> str:
    return f"{reading['memory_bytes'] / 1e9:.2f}"


def _others(part: dict[str, Any]) -> str:
    bases, rows = rivals(part["readings"]), []
    for one in part["readings"]:
        if not one["seconds"]:
            rows.append([one["name"], "", f"failed: {one.get('failed', 'no block is complete')}"])
            continue
        rows.append(
            [
                one["name"],
                f"{one['processes']} x {one['threads']}",
                f"{images_per_second(one):.0f}",
                *(faster(one, base) for base in bases),
                _gigabytes(one),
                f"{one['prepared_s'] + one['warm_up_s']:.0f}",
            ]
        )
    headers = ["what", "processes x threads", "images/s", "times pytorch-dml", "times its fastest"]
    headers += ["times the plain loop", "memory, GB", "start, s"]
    text = f"""## Beside others

A ResNet-32 pair, 100 classes, batch 64, 32 x 32, random crop and flip; whole steps with their
input, {part["images"]}. Times as fast as others: geometric mean over the blocks, with its 95%
interval. pytorch-dml's fastest is the fastest "tuned" row. Memory is the peak above what the
imports take, of the first process; start is from the imports to the fourth step, compilation with
it. What is tuned of others keeps memory as we do, with {_VARIABLES}.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}
"""
    if plain_command(part["readings"]):
        text += f"""
### Like for like

{LIKE_FOR_LIKE}

{alike(part["readings"])}

### What the commands do by themselves

{_what_is_chosen(part)}

{commands(part["readings"])}
"""
    return text


LIKE_FOR_LIKE = """\
Plain: others as their documentation shows, and ours without a flag (in one process: with
`--processes 1`). Tuned: the fastest that was measured of each side."""


def _what_is_chosen(part: dict[str, Any]) -> str:
    """Return in words what the commands choose, and what is older."""
    found = (plain_command(part["readings"], bf16) for bf16 in (False, True))
    names = "; ".join(one["name"].removeprefix("ours, ") for one in found if one)
    text = f"For {part['steps_of_the_command']:,} steps the commands choose by themselves: {names}."
    if part["before"]:
        text += f" Before is commit {part['before'][:7]}, run from its own checkout."
    return text


def _single(part: dict[str, Any]) -> str:
    by_name = {one["name"]: one for one in part["readings"] if one["seconds"]}
    rows = []
    for one in by_name.values():
        theirs = by_name.get(one["about"].get("beside"))
        if theirs:
            took = [f"{1e3 * median(seconds(of)):.1f} ms" for of in (one, theirs)]
            rows.append(
                [one["about"]["way"], *took, ratio(seconds(one), seconds(theirs)).as_change()]
            )
    headers = ["", "our step", "timm's", "ours takes"]
    return f"""## One network, beside timm

A cohort of one ResNet-32, and the step of timm's train.py with its optimizer and loss, in turns in
one process of {part["readings"][0]["threads"]} threads. A ready batch is the same one in every
step; own input is our batches in memory, and timm's loader with 2 workers.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}
"""


def _first_step(part: dict[str, Any]) -> str:
    rows = []
    for one in part["readings"]:
        took = one["seconds"]
        spread = f"{min(took):.1f} to {max(took):.1f}"
        rows.append([one["name"], f"{median(took):.1f} s", spread, len(took)])
    flags = " ".join(part["readings"][0]["flags"])
    return f"""## From the command to the first step

`python train.py {flags}`, until the first step is
taken; commands that alternate, after one of each that is not counted.

{tabulate(rows, ["", "median", "range, s", "runs"], tablefmt="github", disable_numparse=True)}
"""


def _limits(part: dict[str, Any]) -> str:
    measured = [one for one in part["readings"] if one["seconds"]]
    by_name = {one["name"]: one for one in measured}
    products = {one["about"]["bf16"]: one for one in measured if one["kind"] == "products"}
    step_flop = 6.0 * part["macs_per_image"] * BATCH  # a backward pass is two forward passes
    product_flop = 2.0 * part["macs_per_product"]
    rows = []
    for one in measured:
        flop = product_flop if one["kind"] == "products" else step_flop
        limit, product = by_name.get(one["about"].get("limit")), products.get(one["about"]["bf16"])
        share = ""
        if product and one is not product:
            share = _percent(ratio(seconds(product), seconds(one)).times(flop / product_flop))
        rows.append(
            [
                one["name"],
                f"{1e3 * median(seconds(one)):.0f} ms",
                ratio(seconds(one), seconds(limit)).as_change() if limit else "",
                f"{flop / median(seconds(one)) / 1e9:.0f}",
                share,
            ]
        )
    headers = ["what", "step", "above its networks alone", "GFLOP/s", "of torch.mm's rate"]
    return f"""## Beside what the machine can do

The same pair: our whole steps; in the same process, in turns with them, its networks' own forward,
cross-entropy, backward and optimizer steps on a ready batch; and products of 2048 x 2048 matrices
in the same precision. The networks' arithmetic is three times that of a forward pass,
{part["macs_per_image"] / 1e6:.0f} million multiply-accumulates an image for the pair.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}
"""


def _percent(share: Ratio) -> str:
    mean, *ends = (None if v is None else f"{100 * v:.1f}" for v in (share.mean, *_ends(share)))
    return f"{mean}% ({ends[0]} to {ends[1]})" if all(ends) else f"{mean}%"


def _ends(found: Ratio) -> tuple[float | None, float | None]:
    return found.low, found.high


def beyond(one: Reading, first: Reading, linear: bool) -> Ratio:
    """Return a step over the series' first, times what grew between them where that is linear."""
    factor = first["about"]["x"] / one["about"]["x"] if linear else 1.0
    return ratio(seconds(one), seconds(first)).times(factor)


def series(part: dict[str, Any]) -> dict[str, list[Reading]]:
    """Return the readings of each series, in order."""
    found: dict[str, list[Reading]] = {}
    for one in part["readings"]:
        if one["seconds"] and "series" in one["about"]:
            found.setdefault(one["about"]["series"], []).append(one)
    return found


def losses_share(part: dict[str, Any]) -> tuple[Reading, Ratio] | None:
    """Return the losses alone, and their share of the step that they belong to."""
    by_name = {one["name"]: one for one in part["readings"] if one["seconds"]}
    for one in by_name.values():
        whole = by_name.get(one["about"].get("of"))
        if whole:
            return one, ratio(seconds(one), seconds(whole))
    return None


def _growth(part: dict[str, Any]) -> str:
    text = "## As cohorts grow\n\nCohorts of ResNet-8, batch 64, 100 classes where not said.\n"
    for name, found in series(part).items():
        title, linear = _SERIES.get(name, (name.capitalize(), True))
        rows = []
        for one in found:
            grown = "" if one is found[0] else beyond(one, found[0], linear).as_change()
            x, step = one["about"]["x"], 1e3 * median(seconds(one))
            row = [x, f"{step:.1f} ms", *([f"{step / x:.2f} ms"] if linear else []), grown]
            rows.append([*row, _gigabytes(one)])
        unit = name.split()[0].rstrip(",")
        each = {"peers": "a peer's share", "batch": "an image's share"}.get(unit, "share")
        headers = [unit, "step", *([each] if linear else [])]
        headers += ["above linear" if linear else "above the first row", "memory, GB"]
        text += f"\n### {title}\n\n"
        text += tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"
    share = losses_share(part)
    if share:
        one, of_step = share
        text += (
            f"\nTargets and {one['name']}, forward and backward: "
            f"{1e3 * median(seconds(one)):.2f} ms, {_percent(of_step)} of their step.\n"
        )
    return text


# Which of torch's operations are which work, by parts of their names; the first that fits.
_WORK = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "mkldnn::"),
    "compiled kernels (batch norm, ReLU, sums, casts)": ("graph_",),
    "batch norm": ("native_batch_norm",),
    "ReLU and sums": ("threshold", "clamp_min", "relu", "aten::add", "aten::sum"),
    "optimizer": ("SGD", "sgd"),
    "waiting for images": ("DataLoader",),
}
_REST = "everything else in torch, loss and input among it"


def work(operations: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each kind of work; all of them together are those of all operations."""
    found = dict.fromkeys((*_WORK, _REST), 0.0)
    for name, spent in operations.items():
        kinds = (kind for kind, parts in _WORK.items() if any(part in name for part in parts))
        found[next(kinds, _REST)] += spent
    return found


def _profile(part: dict[str, Any]) -> str:
    measured = [one for one in part["readings"] if one.get("operations")]
    spent = [work(one["operations"]) for one in measured]
    rows: list[list[str]] = []
    for kind in (*_WORK, _REST):
        cells = [
            f"{1e3 * of[kind] / one['steps']:.1f} ({100 * of[kind] / sum(of.values()):.0f}%)"
            for one, of in zip(measured, spent, strict=True)
        ]
        rows.append([kind, *cells])
    whole = [
        f"{1e3 * sum(of.values()) / one['steps']:.0f}"
        for one, of in zip(measured, spent, strict=True)
    ]
    rows.append(["in all", *whole])
    headers = ["ms of a step (share)", *(one["name"] for one in measured)]
    return f"""## Where the time goes

The same pair in one process of {measured[0]["threads"]} threads, profiled by torch in steps of the
last block, which slows them down a little. Convolutions are oneDNN's in every column.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}
"""


def _where(part: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return (
        f"{part['processor']}, {part['cores']} cores, {part['system']}; {versions}; commit "
        f"{part['commit']}; {part['date']}; {part['blocks']} alternating blocks. Command: "
        f"`{part['command']}`\n"
    )


def markdown(found: dict[str, Any]) -> str:
    """Return speed.md."""
    sections = {
        "others": _others,
        "single": _single,
        "first-step": _first_step,
        "limits": _limits,
        "growth": _growth,
        "profile": _profile,
    }
    parts = [
        f"{write(found[p])}\n{_where(found[p])}" for p, write in sections.items() if p in found
    ]
    title = "# How fast\n\nMedians of blocks; ratios are of the same block. Plot: speed.png.\n"
    return "\n".join([title, *parts])
