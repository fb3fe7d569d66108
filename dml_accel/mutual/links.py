"""Who learns from whom: the weights of ``--links``, by name, so that order does not matter.

A matrix is a CSV file: teachers' names in its first line after an empty cell, then a line for each
learner with its name and the weight of every teacher:

    ,resnet32-0,wrn_28_10-0,frozen-0
    resnet32-0,0,1,0.5
    wrn_28_10-0,1,0,0.5
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import read_at_most, text_of

LinkWeights = Mapping[str, Mapping[str, float]]
_LARGEST_FILE = 2**20  # bytes


def read_links(links: str, learners: Sequence[str], frozen: Sequence[str]) -> LinkWeights | None:
    """Return the weight of every teacher for every learner; None if all teach all alike.

    Args:
        links: ``--links``.
        learners: names of the peers that are trained, in the order of the command line.
        frozen: names of the frozen peers.

    Raises:
        UsageError: a peer is unknown, the file is not such a matrix, or all weights are 0.
    """
    if links == "full":
        return None
    if links == "ring":
        _refuse_few(links, learners)
        _refuse_frozen(links, frozen)
        return {name: {learners[i - 1]: 1.0} for i, name in enumerate(learners)}
    if links == "leader":
        _refuse_few(links, learners)
        _refuse_frozen(links, frozen)
        *others, _ = learners
        return {name: {one: 1.0 for one in others if one != name} for name in learners}
    if links == "frozen":
        return {name: dict.fromkeys(frozen, 1.0) for name in learners}
    if links.startswith("star:"):
        centre = links.removeprefix("star:")
        _refuse_few(links, learners)
        _refuse_frozen(links, frozen)
        if centre not in learners:
            raise UsageError(
                f"--links {links}: there is no peer {centre!r}; the peers are {', '.join(learners)}"
            )
        others = [name for name in learners if name != centre]
        return {centre: dict.fromkeys(others, 1.0)} | {name: {centre: 1.0} for name in others}
    return _matrix(Path(links), learners, [*learners, *frozen])


def _refuse_few(links: str, learners: Sequence[str]) -> None:
    if len(learners) < 2:
        raise UsageError(f"--links {links} needs at least two peers in --cohort")


def _refuse_frozen(links: str, frozen: Sequence[str]) -> None:
    if frozen:
        raise UsageError(
            f"--links {links} gives --frozen-peers nobody to teach: write a matrix, or --links full"
        )


def _matrix(path: Path, learners: Sequence[str], teachers: Sequence[str]) -> LinkWeights:
    where = f"--links {path}"
    try:
        content = text_of(path, read_at_most(path, _LARGEST_FILE))
        lines = [[c.strip() for c in row] for row in csv.reader(io.StringIO(content)) if row]
    except (ValueError, csv.Error) as error:
        unread = isinstance(error, UnreadableError)
        wrong = str(error) if unread else f"{path} is not a CSV file: {error}"
        known = "full, ring, star:PEER, leader, frozen or the path of a CSV file"
        raise UsageError(f"--links {wrong}; write {known}") from error
    if not lines:
        raise UsageError(f"{where} is empty")
    head, rows = lines[0][1:], {line[0]: line[1:] for line in lines[1:]}
    _refuse_names(f"{where}, first line", head, teachers)
    _refuse_names(f"{where}, first column", [line[0] for line in lines[1:]], learners)
    weights = {name: _row(f"{where}, line of {name}", name, head, rows[name]) for name in learners}
    if not any(weight for row in weights.values() for weight in row.values()):
        raise UsageError(f"{where}: all weights are 0; for independent training use --kl-weight 0")
    return weights


def _refuse_names(where: str, found: Sequence[str], known: Sequence[str]) -> None:
    if sorted(found) != sorted(known):
        hint = "" if found else "; separate cells with commas"
        if any(name.startswith("frozen-") for name in set(found) - set(known)):
            hint = "; frozen-0, frozen-1, ... are the --frozen-peers"
        raise UsageError(
            f"{where} names {', '.join(found) or 'nobody'}, not {', '.join(known)}{hint}"
        )


def _row(where: str, name: str, head: Sequence[str], cells: Sequence[str]) -> dict[str, float]:
    if len(cells) != len(head):
        raise UsageError(f"{where} has {len(cells)} weights, not {len(head)}")
    weights = {}
    for teacher, cell in zip(head, cells, strict=True):
        try:
            weight = float(cell or 0)
        except ValueError:
            weight = math.nan
        if not (0 <= weight < math.inf):
            raise UsageError(f"{where} has {cell!r} for {teacher}; a weight must be at least 0")
        if weight and teacher == name:
            raise UsageError(f"{where} makes {name} learn from itself; write 0 there")
        weights[teacher] = weight
    return weights
