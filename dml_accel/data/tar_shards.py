"""WebDataset shards: tar files whose members of one name are an image and its label.

They cannot be read in any order, so they are written into tables of the datasets library, once.
"""

import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.tables import printable
from dml_accel.data.listing import StoredFiles
from dml_accel.data.pixels import endings

IMAGE, LABEL = "image", "cls"  # columns of the tables, unless flags name others
_KEYS = ("cls", "label", "class")  # of a label in a member that is JSON
_TABLES = (".parquet", ".arrow", ".csv", ".jsonl")
_NUMBER = re.compile(r"[-_.]?\d*([-_]of[-_]\d+)?\.tar$")


def shards_of(folder: Path, files: StoredFiles) -> dict[str, list[str]]:
    """Return the shards of each split, by its name; empty if the folder holds other tables.

    A split is called as the folder of its shards, or as they are but for their numbers:
    ``train/*.tar``, ``train-000.tar``.
    """
    found: dict[str, list[str]] = {}
    for row in range(len(files)):
        path = files.path(row)
        ending = os.path.splitext(path)[1].lower()
        if ending in _TABLES:
            return {}
        if ending == ".tar":
            inside = os.path.relpath(path, folder)
            parent, name = os.path.split(inside)
            split = parent or _NUMBER.sub("", name) or "train"
            found.setdefault(split, []).append(inside)
    return found


def read_shards(
    folder: Path,
    shards: Mapping[str, Sequence[str]],
    kept: Path,
    state: str,
    columns: tuple[str | None, str | None],
    quiet: bool,
) -> dict[str, Any]:
    """Return a table of each split, from ``kept`` if it was made from these files.

    Args:
        folder: of the shards.
        shards: paths below it, by split.
        kept: where tables are kept; this process has locked it.
        state: another one when a file is another one.
        columns: endings of the members that hold the image and the label; None: the only image,
            and ``cls``, or in ``json`` one of cls, label and class.
        quiet: say nothing.

    Raises:
        UsageError: a shard or a member cannot be read; both are named.
    """
    import datasets

    record = kept / "shards.json"
    about: dict[str, Any] = {}
    try:
        about = read_json(record)
        if about.get("state") != state:
            about = {}
    except UnreadableError:
        pass
    image, label = columns[0] or IMAGE, columns[1] or LABEL
    features = {image: datasets.Image(), label: datasets.Value("string")}
    found, passed = {}, Counter(about.get("passed", {}))
    for place, (split, paths) in enumerate(shards.items()):
        files = about.get("tables", {}).get(split, [])
        if files and all(Path(file).is_file() for file in files):
            parts = [datasets.Dataset.from_file(file) for file in files]
            found[split] = datasets.concatenate_datasets(parts)
            continue
        if not quiet:
            print(
                f"reading {len(paths):,} tar files of split {printable(split)!r} into {kept}, once",
                file=sys.stderr,
                flush=True,
            )

        where = str(kept / f"{state[:16]}-{place}")
        try:
            found[split] = datasets.Dataset.from_generator(
                _Rows(folder, paths, columns, passed),
                datasets.Features(features),
                cache_dir=where,
                keep_in_memory=False,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UsageError):
                raise error.__cause__ from error
            raise
    if not about:
        tables = {
            split: [file["filename"] for file in table.cache_files]
            for split, table in found.items()
        }
        write_json(record, {"state": state, "tables": tables, "passed": dict(passed)})
    if passed and not quiet:
        kinds = ", ".join(f"{count:,} {what}" for what, count in sorted(passed.items()))
        print(f"passed over in the tar files: {kinds}", file=sys.stderr)
    return found


@dataclass
class _Rows:
    """Yields the rows of a table: the samples of some shards; counts what is passed over."""

    folder: Path
    paths: Sequence[str]
    columns: tuple[str | None, str | None]
    passed: Counter[str]

    def __call__(self) -> Iterator[dict[str, Any]]:
        image, label = self.columns
        for path in self.paths:
            for members in _samples(self.folder, path, self.passed):
                row = _row(path, members, self.columns, self.passed)
                if row:
                    yield {image or IMAGE: row[0], label or LABEL: row[1]}


def _samples(
    folder: Path, path: str, passed: Counter[str]
) -> Iterator[dict[str, tuple[str, bytes]]]:
    """Yield the members of each sample, by ending: its name in the shard, and its content."""
    at, name = "its start", ""
    members: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(folder / path, "r:") as shard:
            while (member := shard.next()) is not None:
                vars(shard)["members"] = []  # else the library keeps them all
                place, dot, ending = os.path.basename(member.name).partition(".")
                if not member.isfile() or not place:
                    if not member.isdir():
                        passed[f"{ending or 'no ending'} (no file of a sample)"] += 1
                    continue
                if not dot:
                    passed["without an ending"] += 1
                    continue
                at = member.name
                key = os.path.join(os.path.dirname(at), place)
                if key != name and members:
                    yield members
                if key != name:
                    name, members = key, {}
                stored = shard.extractfile(member)
                assert stored is not None
                content = stored.read()
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                members[ending.lower()] = at, content
            # The library takes a broken header for the end.
            if any(_rest(folder / path, shard.offset)):
                raise tarfile.ReadError("what follows is no member")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(
            f"{folder / path} cannot be read at or after {printable(at)}: {error}; repair or "
            "remove it"
        ) from error
    if members:
        yield members


def _rest(path: Path, offset: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE)


def _row(
    shard: str,
    members: Mapping[str, tuple[str, bytes]],
    columns: tuple[str | None, str | None],
    passed: Counter[str],
) -> tuple[dict[str, Any], str] | None:
    """Return the image and the label of a sample; None if it has no image."""
    image, label = columns
    first = f"{shard}/{next(iter(members.values()))[0]}"
    images = [one for one in members if f".{one}" in endings() and one != label]
    if image is not None:
        images = [one for one in images if one == image.lower()]
    if len(images) > 1:
        raise UsageError(
            f"the sample of {first} has {len(images)} images ({', '.join(images)}): name one of "
            "these endings with --image-column"
        )
    if not images:
        passed["samples without an image"] += 1
        return None
    used = {images[0]}
    found: Any = None
    text = label.lower() if label else LABEL
    if text in members:
        found, used = members[text][1].decode("utf-8", "replace").strip(), {*used, text}
    elif "json" in members:
        found, used = _from_json(shard, members["json"], label), {*used, "json"}
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        raise UsageError(
            f"the sample of {first} has no label ({', '.join(sorted(members))}): give it a member "
            f"{label or LABEL}, or name the ending or the JSON key that holds one with "
            "--label-column"
        )
    for ending in members.keys() - used:
        passed[f".{ending}"] += 1
    name, content = members[images[0]]
    return {"path": f"{shard}/{name}", "bytes": content}, str(found)


def _from_json(shard: str, member: tuple[str, bytes], label: str | None) -> Any:
    try:
        values = json.loads(member[1])
    except ValueError as error:
        raise UsageError(f"{shard}/{member[0]} is no JSON: {error}") from error
    if not isinstance(values, dict):
        return None
    if label is not None:
        return values.get(label)
    keys = [key for key in _KEYS if key in values]
    if len(keys) > 1:
        raise UsageError(
            f"{shard}/{member[0]} has {' and '.join(keys)}: name one with --label-column"
        )
    return values[keys[0]] if keys else None
