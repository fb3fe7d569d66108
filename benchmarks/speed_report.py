"""From the readings of benchmarks/speed.json to speed.md, the plot and a section of the docs."""

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measuring import BATCH, HERE
from benchmarks.speed_tables import (
    LIKE_FOR_LIKE,
    Reading,
    alike,
    beyond,
    commands,
    fastest,
    images_per_second,
    markdown,
    plain_command,
    rivals,
    seconds,
    series,
)
from dml_accel.analysis.plots import save, styles
from dml_accel.core.files import write_text

PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def section(found: dict[str, Any]) -> str:
    """Return the section of docs/performance.md: ours beside others, like for like, and the plot.

    Its links are relative to the folder docs.
    """
    text = ""
    part = found.get("others", {"readings": []})
    if plain_command(part["readings"]):
        text += f"""\
A ResNet-32 pair on 2 threads, batch 64, whole steps including their input; 95% intervals over
{part["blocks"]} alternating blocks. {LIKE_FOR_LIKE}

{alike(part["readings"])}

{commands(part["readings"])}
"""
    if "growth" in found:
        grown = series(found["growth"]).get("peers", [])
        if len(grown) > 1:
            most, few = (one["about"]["x"] for one in (grown[-1], grown[0]))
            text += (
                f"\nA step of {most} ResNet-8 takes {beyond(grown[-1], grown[0], linear=True)} "
                f"times as long as {most / few:g} steps of {few}.\n"
            )
    if text:
        text += "\n![images per second](../benchmarks/speed.png)\n\n"
        text += (
            "Every variant, memory, profiles and the limits of the machine: "
            "[benchmarks/speed.md](../benchmarks/speed.md).\n"
        )
    return text


# The names that tests/test_speed.py uses.


def with_section(text: str, section: str) -> str:
    """Return a text with what is between the two marks replaced.

    Raises:
        ValueError: it does not have each mark once, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in before + after:
        raise ValueError(f"{PAGE.name} needs {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n{section}{END}{after}"


def headline(readings: list[Reading]) -> list[Reading]:
    """Return the bars of the plot: rivals, before, what our commands choose, and our fastest."""
    older = plain_command(readings, whose="before")
    ours = [plain_command(readings, bf16) for bf16 in (False, True)]
    ours += [fastest(readings, True, count, True) for count in (1, 2)]
    chosen = [*rivals(readings), older, *ours]
    names = dict.fromkeys(one["name"] for one in chosen if one)
    return [one for one in readings if one["name"] in names]


def plot(found: dict[str, Any]) -> Figure:
    """Draw images per second beside others, and the time of a step per peer as cohorts grow."""
    measured = headline(found.get("others", {"readings": []})["readings"])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    style = styles(["ours", "pytorch-dml", "plain", "before"])
    for place, one in enumerate(measured):
        rate = images_per_second(one)
        ends = [BATCH / max(seconds(one)), BATCH / min(seconds(one))]
        reach = [[rate - ends[0]], [ends[1] - rate]]
        bars.barh(place, rate, xerr=reach, color=style[one["about"]["whose"]].colour, capsize=2)
    bars.set_yticks(range(len(measured)), [one["name"] for one in measured])
    bars.invert_yaxis()
    bars.set_xlabel("images/s of a ResNet-32 pair: median block, slowest to fastest")
    grown = {n: s for n, s in series(found.get("growth", {"readings": []})).items() if "peers" in n}
    for name, readings in grown.items():
        x = [one["about"]["x"] for one in readings]
        share = [1e3 * median(seconds(one)) / at for one, at in zip(readings, x, strict=True)]
        lines.plot(x, share, "o-", label=name)
    lines.set_xlabel("peers (ResNet-8)")
    lines.set_ylabel("ms per step and peer")
    lines.set_ylim(bottom=0)
    if grown:
        lines.legend(frameon=False)
    return figure


def write(found: dict[str, Any], folder: Path) -> None:
    """Write speed.md and speed.png; in the project's own folder, the section of the docs too."""
    write_text(folder / "speed.md", markdown(found))
    save(plot(found), folder / "speed.png")
    if folder.resolve() == HERE:
        write_text(PAGE, with_section(PAGE.read_text(), section(found)))
