"""Data sets that the datasets library opens: of the hub, parquet files, ``save_to_disk``.

The library keeps tables in a cache of its own. A name never leads to what it has kept for a folder:
tables of a local folder are kept by its path, and made again when a file in it has changed.
"""

import contextlib
import glob
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel.core.config import DataConfig
from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.files import read_json, write_json
from dml_accel.core.host import require_hub_cache
from dml_accel.core.locks import lock
from dml_accel.core.rng import key
from dml_accel.core.tables import printable
from dml_accel.core.versions import require_packages
from dml_accel.data.class_layout import VALIDATION
from dml_accel.data.image_files import files_below
from dml_accel.data.listing import StoredFiles
from dml_accel.data.named_files import metadata_in, read_named
from dml_accel.data.tar_shards import read_shards, shards_of

_SHOWN_CONFIGURATIONS = 8


# ---------------------------------------------------------------- opening


@dataclass(frozen=True)
class Opened:
    """A data set that the datasets library has opened.

    Attributes:
        splits: its tables, by name.
        files: of the folder that they come from; None for the hub.
        roots: folders that must contain every file that a row names.
        by_number: whether classes that are whole numbers, as texts, are in their order.
    """

    splits: Mapping[str, Any]
    files: StoredFiles | None
    roots: Sequence[Path]
    by_number: bool = False


def open_tables(data: DataConfig, folder: Path | None, quiet: bool) -> Opened:
    """Open a data set with the datasets library; nothing is decoded.

    Args:
        data: its name, configuration and splits.
        folder: the local folder that the name stands for; None for the hub.
        quiet: show no progress, because another process does.

    Raises:
        UsageError: it cannot be reached or read, or has several configurations.
    """
    require_packages(f"--dataset {data.dataset}", "datasets")
    require_hub_cache()
    import datasets  # imported late: it takes a second, which digits does not need
    import huggingface_hub.constants as hub

    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Older versions would ask whether to run a program that a data set brings along.
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    name = data.dataset
    try:
        if folder is None:
            name = _id_on_the_hub(name)
            caches = (datasets.config.HF_CACHE_HOME, hub.HF_HUB_CACHE, hub.HF_HOME)
            return Opened(_load(name, data.dataset_config, None), None, list(map(Path, caches)))
        files = StoredFiles.of(
            (os.path.join(folder, path), stat) for path, stat in files_below(folder, "") if stat
        )
        if shards := shards_of(folder, files):
            _refuse_configuration(data)
            columns = data.image_column, data.label_column
            kept = _kept(folder, "tar", *(one or "" for one in columns))
            kept.mkdir(parents=True, exist_ok=True)
            with open(kept / "lock", "w") as file:
                lock(file, wait=True)
                tables = read_shards(folder, shards, kept, files.digest(), columns, quiet)
            return Opened(tables, files, [folder], by_number=True)
        is_saved = any((folder / one).is_file() for one in ("dataset_dict.json", "state.json"))
        metadata = [] if is_saved else metadata_in(folder, files)
        if metadata:
            _refuse_configuration(data)
            asked = [data.train_split, data.test_split, data.val_split, *VALIDATION]
            asked = [os.path.normpath(one) for one in asked if one not in ("", os.curdir)]
            return Opened(read_named(folder, metadata, files, asked, quiet), files, [folder])
        named = _folders_named(folder, data)
        kept = _kept(folder, *named)
        found = _open_folder(folder, kept, files, data.dataset_config, named)
        if not isinstance(found, Mapping):
            if not data.test_fraction:
                raise UsageError(
                    f"--dataset {name} was saved as a single split: --test-fraction 0.2 holds out "
                    "a fifth of each class for testing; else save a DatasetDict with the splits "
                    f"{data.train_split!r} and {data.test_split!r}"
                )
            found = {data.train_split: found}
        return Opened(found, files, [folder, kept / "files", kept])
    except UsageError:
        raise
    except ConnectionError as error:
        raise UsageError(
            f"--dataset {name}: the hub cannot be reached, the data set is not cached here, and "
            "there is no local folder of that name. Connect once, name a folder of images, or use "
            "--dataset digits"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UsageError(
            f"--dataset {name}: not a local folder, and not a data set that you can read on the hub"
        ) from error
    except Exception as error:  # the library raises many kinds for files it cannot parse
        _refuse_configurations(str(folder or name), data, error)
        raise UsageError(f"--dataset {name} cannot be read: {_root_cause(error)}") from error


def _refuse_configuration(data: DataConfig) -> None:
    if data.dataset_config is not None:
        raise UsageError(
            f"--dataset-config has no effect with --dataset {data.dataset}, which has no "
            "configurations: drop it"
        )


def _load(
    name: str, configuration: str | None, cache: Path | None, folders: Sequence[str] = ()
) -> Any:
    import datasets

    patterns = {f"s{place}": f"{glob.escape(one)}/**" for place, one in enumerate(folders)}
    # Kept on disk, because the cache of decoded images is keyed by those files.
    found = datasets.load_dataset(
        name,
        configuration,
        data_files=patterns or None,
        keep_in_memory=False,
        cache_dir=cache and str(cache),
    )
    return {one: found[f"s{place}"] for place, one in enumerate(folders)} or found


def _folders_named(folder: Path, data: DataConfig) -> list[str]:
    """Return the folders that flags name as splits, if the library knows one by no such name."""
    if (folder / "dataset_dict.json").is_file():
        return []
    flags = (data.train_split, data.test_split, data.val_split)
    names = [name for name in flags if name and (folder / name).is_dir()]
    names = [os.path.normpath(name) for name in names if os.path.normpath(name) != os.curdir]
    if all(name in _words(name) for name in names):
        return []
    return sorted({*names, *(name for name in VALIDATION if (folder / name).is_dir())})


def known_split(splits: Mapping[str, Any], name: str) -> str | None:
    """Return what the library calls a split: a folder ``val`` becomes ``validation``."""
    return next((one for one in (name, *_words(name)) if one in splits), None)


def _words(name: str) -> list[str]:
    """Return all names that the library takes for that of one split; none if it knows it not."""
    from datasets.data_files import SPLIT_KEYWORDS

    for split, words in SPLIT_KEYWORDS.items():
        if name in words:
            return [str(split), *words]
    return []


def _open_folder(
    folder: Path,
    kept: Path,
    stored: StoredFiles,
    configuration: str | None,
    named: Sequence[str],
) -> Any:
    """Open a local folder; its tables are made again if any file in it is another one."""
    import datasets

    kept.mkdir(parents=True, exist_ok=True)
    asked = {"files": stored.digest()}
    with open(kept / "lock", "w") as file:
        lock(file, wait=True)  # without locks, two processes may both make the tables
        record, tables = kept / "files.json", kept / "tables"
        # By a link, because the library takes [ and * in a path for patterns.
        link = _link(kept / "files", folder)
        if any((link / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(link))
        with contextlib.suppress(UnreadableError):
            if read_json(record) == asked:
                return _load(str(link), configuration, tables, named)
        record.unlink(missing_ok=True)
        shutil.rmtree(tables, ignore_errors=True)
        found = _load(str(link), configuration, tables, named)
        write_json(record, asked)
    return found


def _kept(folder: Path, *about: str) -> Path:
    """Return where the tables of a local folder are kept."""
    import datasets

    where = key("tables", os.path.realpath(folder), *about)
    return Path(datasets.config.HF_DATASETS_CACHE) / "dml_accel" / f"{where:016x}"


def _link(path: Path, folder: Path) -> Path:
    """Return a link to a folder at ``path``; the folder itself where there are no links."""
    try:
        if not path.is_symlink():
            path.symlink_to(os.path.realpath(folder), target_is_directory=True)
    except OSError:
        return folder
    return path


def _id_on_the_hub(name: str) -> str:
    """Return a data set's id on the hub, ``owner/name``.

    A bare name is asked for on the hub, because offline the library would take any folder of that
    name that it has once read, wherever it lay.
    """
    import datasets
    import huggingface_hub
    import huggingface_hub.constants

    online = hub_answers()
    if not online:
        # Online, the library would retry for half a minute; offline it uses its cache at once.
        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "/" in name:
        return name
    missing = f"--dataset {name}: there is no folder {printable(os.path.abspath(name))}"
    if not online:
        raise UsageError(
            f"{missing}, and the hub cannot be asked; its data sets are called owner/name"
        )
    try:
        return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).id)
    except Exception as error:  # of several libraries below
        raise UsageError(f"{missing}, and the hub has no data set of that name") from error


def hub_answers() -> bool:
    """Whether the hub answers within seconds; any HTTP status counts as an answer."""
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(
            urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=5
        ).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def _refuse_configurations(name: str, data: DataConfig, error: Exception) -> None:
    """Say which configurations a data set has, if one must be chosen."""
    text = str(error)
    if not ("Config name is missing" in text or "BuilderConfig" in text):
        return
    import datasets

    try:
        found = [str(one) for one in datasets.get_dataset_config_names(name)]
    except Exception:  # then the library's own words have to do
        return
    shown = ", ".join(map(printable, found[:_SHOWN_CONFIGURATIONS]))
    shown += ", ..." * (len(found) > _SHOWN_CONFIGURATIONS)
    asked = f"no configuration {data.dataset_config!r}"
    said = asked if data.dataset_config else f"{len(found)} configurations"
    raise UsageError(
        f"--dataset {data.dataset} has {said}: choose one of {shown} with --dataset-config"
    ) from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
