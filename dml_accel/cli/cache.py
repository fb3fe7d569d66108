"""The command cache: what is kept of decoded images, and its removal."""

import time
from pathlib import Path
from typing import Any

from dml_accel.core.errors import UsageError
from dml_accel.core.host import cache_dir
from dml_accel.core.tables import table
from dml_accel.data import kept


def run(values: dict[str, Any]) -> int:
    """Show or prune the cache; return the exit code."""
    prune, everything, asked = (values.pop(name) for name in ("prune", "all", "limit"))
    if everything and not prune:
        raise UsageError("--all says what --prune removes: write cache --prune --all")
    if everything and asked is not None:
        raise UsageError("--all removes everything, and --limit keeps some of it: drop one")
    most = kept.limit() if asked is None else kept.size_of(asked, "--limit")
    folder = cache_dir()
    if folder is None:
        raise UsageError("there is no home directory: set DML_CACHE to the folder of the cache")
    if prune:
        _prune(folder, -1 if everything else most, everything)
    _show(folder, most, asked is not None)
    return 0


def _prune(folder: Path, most: int, everything: bool) -> None:
    before, _ = kept.kept(folder)
    has_room = kept.make_room(folder, 0, most)
    if everything:
        kept.remove_records(folder)
    after = {one.name for one in kept.kept(folder)[0]}
    gone = [one for one in before if one.name not in after]
    freed = sum(one.stored for one in gone)
    print(f"removed {len(gone):,} of {len(before):,} sets of images, {_megabytes(freed)} MB\n")
    if not has_room and after:
        print("what is left is used by other processes\n")


def _show(folder: Path, most: int, is_asked: bool) -> None:
    sets, records = kept.kept(folder)
    stored = records + sum(one.stored for one in sets)
    source = "--limit" if is_asked else kept.LIMIT_VARIABLE
    print(
        f"{folder}: {_megabytes(stored)} MB of {_megabytes(most)} MB ({source}), "
        f"{_megabytes(records)} MB of them statistics and other records"
    )
    if not sets:
        print("no images are kept")
        return
    rows = [
        [
            one.dataset or "?",
            one.split or "?",
            one.state,
            f"{one.images:,}" if one.images else "?",
            str(one.size or "?"),
            _megabytes(one.stored),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used)),
        ]
        for one in reversed(sets)
    ]
    headers = ("data set", "split", "state", "images", "pixels", "MB", "last used")
    print(f"\n{table(rows, headers, 'simple', left=3)}")
    if any(one.state in (kept.OLD, kept.DAMAGED) for one in sets):
        print("\nwhat is of an old version or damaged is not read; cache --prune --all removes it")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"
