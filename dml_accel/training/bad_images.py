"""Images that a run cannot read: known to some of its processes, and listed by the first."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import write_text
from dml_accel.core.tables import printable
from dml_accel.data.pictures import Damage
from dml_accel.data.sources import Source
from dml_accel.distributed.processes import Processes
from dml_accel.training.run_folder import BAD_IMAGES, SavedRun
from dml_accel.training.setup import Prepared

_NAMED = 3


def agreed(processes: Processes, damage: Sequence[Damage]) -> list[str]:
    """Return a line for each image that any process cannot read, the same in all.

    It has the name, the reason, and the bytes that the image had when the run was started.
    """
    ours = "\n".join(f"{one.place}\t{one.reason}\t{one.size}" for one in damage)
    found: dict[str, None] = {}
    for rank in range(processes.world_size):
        found |= dict.fromkeys(filter(None, processes.broadcast_text(ours, rank).split("\n")))
    return sorted(found)


def listed(folder: Path) -> list[str]:
    """Return the lines of a run's list; empty if there is none."""
    try:
        return (folder / BAD_IMAGES).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []


def sizes_before(folder: Path) -> dict[str, int]:
    """Return the bytes that the images of a run's list had when it was started, by name."""
    parts = [line.split("\t") for line in listed(folder)]
    return {
        part[0]: int(part[2])
        for part in parts
        if len(part) == 3 and part[2].lstrip("-").isdecimal()
    }


def measured_before(source: Source, folder: Path) -> Source:
    """Return images that are normalised as the run in a folder has begun to do it."""
    try:
        found = SavedRun(folder).description["normalisation"]
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
    except (UsageError, KeyError, TypeError, ValueError):  # it has not begun
        return source
    return dataclasses.replace(source, measured=(mean, std))


def list_met(ready: Prepared, leads: bool) -> list[str]:
    """Add the images that could not be read to the list in the run folder.

    Args:
        ready: the run.
        leads: whether this process writes.

    Returns:
        Lines of those that this attempt of the run has met, the same in all processes.
    """
    met = agreed(ready.placement.processes, [*ready.checked.source.damage, *ready.images.damage])
    if met and leads:
        try:
            # What was said of an image first stays: how large it was before it broke.
            lines = {line.split("\t")[0]: line for line in [*met, *listed(ready.path)]}
            text = "".join(line + "\n" for line in sorted(lines.values()))
            write_text(ready.path / BAD_IMAGES, text)
        except OSError as error:
            print(f"warning: {BAD_IMAGES} cannot be written: {one_line(error)}", file=sys.stderr)
    return met


def what_was_skipped(ready: Prepared, met: Sequence[str]) -> str:
    """Return in one line how many images a run has done without; empty if it read all.

    Args:
        ready: the run.
        met: what ``list_met`` returned.
    """
    count = len(met)
    if not count:
        return ""
    return (
        f"{count:,} image{'s' * (count > 1)} could not be read: in training the next of its class "
        "stood in for each, and evaluations left it out; listed in "
        f"{printable(str(ready.path / BAD_IMAGES))}"
    )


def refusal(ready: Prepared, met: Sequence[str], step: int, resumes: str) -> UsageError:
    """Return the error of a run that has stopped because images cannot be read.

    Args:
        ready: the run.
        met: what ``list_met`` returned.
        step: of its checkpoint.
        resumes: flags that resume the run.
    """
    some = "; ".join(" cannot be read: ".join(line.split("\t")[:2]) for line in met[:_NAMED])
    more = f"{len(met):,} images cannot be read: " if len(met) > _NAMED else ""
    file = printable(str(ready.path / BAD_IMAGES))
    fix = (
        f"resume from the checkpoint of step {step:,} with {resumes} --bad-images skip, or put the "
        f"files back as they were and use {resumes}"
    )
    if ready.config.data.bad_images == "skip":  # nothing can stand in for them
        fix = "no image of their class can be read: put the files back as they were"
    return UsageError(f"{more}{some}{'; ...' * bool(more)}; listed in {file}: {fix}")
