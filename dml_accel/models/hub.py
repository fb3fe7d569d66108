"""Models on the Hugging Face Hub: downloaded where a folder is named, and pushed.

``hf-hub:owner/name[@revision]`` stands for a folder wherever one of trained peers is taken. Of a
repository only the files of a peer are downloaded, into the cache of the hub's own library:

    model.safetensors, config.json, README.md      of a peer, or
    */ those, and README.md                        of an ensemble

The token is whatever the hub's library finds in the environment or in a login. It goes to that
library and nowhere else: no file, message or commit holds it.
"""

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dml_accel.core.errors import RunError, UsageError, one_line
from dml_accel.core.files import LARGEST_JSON, read_at_most
from dml_accel.core.host import HUB_PREFIX, expanded, is_on_hub, require_hub_cache
from dml_accel.data.arrow import hub_answers
from dml_accel.models.timm_config import FILE

WEIGHTS, CARD, ONNX = "model.safetensors", "README.md", "model.onnx"
TAG = "dml_accel"  # in the metadata of every card of ours; the hub lists models by their tags
_SECONDS = 10.0  # that the hub may take to answer a question
_LONGEST_REASON = 300  # characters
_OWNER_AND_NAME = re.compile(r"(?=.{3,96}$)[\w.-]+/[\w.-]+", re.ASCII)
_REVISION = re.compile(r"[\w][\w./+-]{0,250}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+)--(.+)")
_LARGEST_TEXT = {FILE: LARGEST_JSON, CARD: LARGEST_JSON}  # bytes, of files beside the weights
# Files that a repository may have besides a model.
_OF_ANYBODY = re.compile(r"\.git\w+|README\.md|(LICEN[SC]E|NOTICE)[^/]*", re.ASCII)
_LOG_IN = "set HF_TOKEN to a token, or run: hf auth login"


@dataclass(frozen=True)
class _Model:
    """What ``hf-hub:owner/name[@revision]`` names; the revision is a branch, a tag or a commit."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.repository}{at}"


# ---------------------------------------------------------------- where a folder is named


def local_folder(text: str) -> Path:
    """Return the local folder that a text names; one of the hub is downloaded first.

    The hub is asked which commit a branch or tag stands for. If it cannot be reached, the copy that
    was downloaded last is used, which is printed on stderr. With ``HF_HUB_OFFLINE`` set it is not
    asked, and nothing is printed.

    Args:
        text: a path, in which ``~`` is the home directory, or ``hf-hub:owner/name[@revision]``.

    Returns:
        The path, which need not exist; or the folder of a commit in the cache of the hub, with at
        least one model.safetensors in it or one level below. ``name_of`` names its commit.

    Raises:
        UsageError: the name is malformed, the hub has no such model or revision that can be read,
            it holds no trained peer, or it cannot be downloaded and is not cached.
    """
    if not is_on_hub(text):
        return expanded(text)
    model = _parse(text)
    require_hub_cache()
    cached = _cached(model)
    if cached and model.revision and _COMMIT.fullmatch(model.revision):
        return cached  # a commit does not change
    import huggingface_hub.constants as hub

    why = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else "the hub cannot be reached"
    if not hub_answers():
        if cached is None:
            raise UsageError(
                f"{model} is not cached here, and {why}: connect once, or name a local folder"
            )
        if not hub.HF_HUB_OFFLINE:
            _say_cached(cached, why)
        return cached
    try:
        return _download(model)
    except Exception as error:  # from the hub's library, what it is built on, or the disk
        status = _status(error)
        if cached and (status is None or status == 429 or status >= 500):
            _say_cached(cached, f"the hub fails ({_reason(error)})")
            return cached
        raise _not_downloaded(model, error, status) from error


def name_of(path: Path) -> str:
    """Return how to name a folder: ``hf-hub:owner/name@commit`` if it is one of the hub's cache."""
    parts = path.parts
    for place in range(len(parts) - 2):
        found = _SNAPSHOT.fullmatch(parts[place])
        if found and parts[place + 1] == "snapshots" and _COMMIT.fullmatch(parts[place + 2]):
            below = "/".join(("", *parts[place + 3 :]))
            return f"{HUB_PREFIX}{found[1]}/{found[2]}@{parts[place + 2]}{below}".rstrip("/")
    return str(path)


def _parse(text: str) -> _Model:
    repository, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
    if not is_repository(repository):
        raise UsageError(
            f"{text}: write {HUB_PREFIX}owner/name, or {HUB_PREFIX}owner/name@revision"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{text}: the revision after @ must be a branch, a tag or a commit")
    return _Model(repository, revision or None)


def is_repository(text: str) -> bool:
    """Whether a text has the form ``owner/name`` that the hub accepts."""
    return (
        _OWNER_AND_NAME.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not any(part.strip(".-") != part for part in text.split("/"))
        and not text.endswith(".git")
    )


def _say_cached(folder: Path, why: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        print(f"{why}: using the cached copy {name_of(folder)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- downloading


def _cached(model: _Model) -> Path | None:
    """Return the folder of the cached copy of a model, if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    for name in (WEIGHTS, CARD):
        found = try_to_load_from_cache(model.repository, name, revision=model.revision)
        if isinstance(found, str):
            folder = Path(found).parent
            # The card of an ensemble is downloaded after everything else.
            if name == WEIGHTS or any(folder.glob(f"*/{WEIGHTS}")):
                return folder
    return None


def _download(model: _Model) -> Path:
    """Download the files of a model's peers; return the folder of its commit in the cache."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(
        model.repository, revision=model.revision, timeout=_SECONDS, files_metadata=True
    )
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    names = _files_of_peers(model, sizes)
    for name in names:
        most = _LARGEST_TEXT.get(PurePosixPath(name).name)
        if most is not None and sizes[name] > most:
            raise UsageError(
                f"{model}: {name} has {sizes[name]:,} bytes, more than the allowed {most:,}"
            )
    with _bars_on_terminals():
        for name in names[:-1]:
            hf_hub_download(model.repository, name, revision=info.sha)
        # The last one says which commit the branch stands for, so that a copy which is not complete
        # is never found by its name.
        last = hf_hub_download(model.repository, names[-1], revision=model.revision)
    folder = Path(last).parent
    if folder.name != info.sha:
        raise UsageError(f"{model} was changed on the hub while it was downloaded: start again")
    return folder


def _files_of_peers(model: _Model, files: Iterable[str]) -> list[str]:
    """Return which files are downloaded, in an order that ends with the one that completes them.

    Raises:
        UsageError: the repository holds no trained peer.
    """
    files = set(files)
    if WEIGHTS in files:
        return [name for name in (FILE, CARD) if name in files] + [WEIGHTS]
    below = sorted(name for name in files if name.count("/") == 1)
    peers = {name.split("/")[0] for name in below if name.endswith(f"/{WEIGHTS}")}
    wanted = [f"{peer}/{name}" for peer in sorted(peers) for name in (FILE, CARD, WEIGHTS)]
    if peers and CARD in files:
        return [name for name in wanted if name in files] + [CARD]
    onnx = [name for name in files if name.endswith(".onnx")]
    pickles = [name for name in files if name.endswith((".bin", ".pth", ".pt", ".ckpt", ".pkl"))]
    reason = f"neither {WEIGHTS} nor folders with one beside {CARD}"
    if onnx:
        reason += f"; {min(onnx)} is an exported ONNX file, which onnxruntime runs"
    elif pickles:
        reason += f"; {min(pickles)} is pickled and could execute code"
    raise UsageError(f"{model} holds no trained peer: {reason}")


# ---------------------------------------------------------------- pushing


@dataclass(frozen=True)
class PushTarget:
    """A repository of the hub that may be pushed to.

    Attributes:
        repository: ``owner/name``.
        private: whether it is to be created as a private one.
        commit: its newest one; None if it is yet to be created.
        files: that it holds.
        licence: what its card says of a licence, which a new card keeps.
    """

    repository: str
    private: bool
    commit: str | None = None
    files: frozenset[str] = frozenset()
    licence: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"--push-to {self.repository}"


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        address: of the repository.
        commit: of the files.
        notes: a line for each thing that its owner should know.
    """

    address: str
    commit: str
    notes: tuple[str, ...]


def check_push(repository: str, private: bool = False) -> PushTarget:
    """Check all that can be checked before files are written and pushed; the hub is only asked.

    Args:
        repository: ``owner/name``, which may exist.
        private: whether to create it as a private one.

    Raises:
        UsageError: the name is malformed, there is no token, the token is refused, or the
            repository holds something else or is public where it is to be private.
        RunError: the hub cannot be reached, or fails.
    """
    import huggingface_hub.constants as hub
    from huggingface_hub import HfApi

    target = PushTarget(repository, private)
    if not is_repository(repository):
        raise UsageError(f"{target}: write owner/name")
    token = _token()
    if not token:
        raise UsageError(f"{target} needs a token of the hub that may write: {_LOG_IN}")
    if hub.HF_HUB_OFFLINE:
        raise UsageError(f"{target}: HF_HUB_OFFLINE is set: unset it to push")
    if not hub_answers():
        raise RunError(f"{target}: the hub ({hub.ENDPOINT}) cannot be reached")
    try:
        info = HfApi(token=token).model_info(repository, timeout=_SECONDS)
    except Exception as error:  # from the hub's library, or what it is built on
        if _status(error) == 404:
            return target
        raise _not_pushed(target, error, asked=True) from error
    files = frozenset(one.rfilename for one in info.siblings or ())
    others = sorted(name for name in files if not _OF_ANYBODY.fullmatch(name))
    if others and TAG not in (info.tags or ()):
        raise UsageError(
            f"{target}: it holds {others[0]}, and its card has no tag {TAG}, so that it is not of "
            "an earlier push: name another repository"
        )
    if private and not info.private:
        raise UsageError(
            f"{target}: it is public, and --private does not change that: make it private in its "
            "settings on the hub, or name another one"
        )
    card: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}
    licence = {name: value for name, value in card.items() if name.startswith("license") and value}
    return PushTarget(repository, private, info.sha, files, licence)


def push_folder(target: PushTarget, folder: Path) -> Pushed:
    """Push the files of an exported folder in one commit; create the repository if it is missing.

    Files of an earlier export are replaced or removed. The hub keeps them in the history.

    Args:
        target: as ``check_push`` returns it.
        folder: as ``inference.export`` writes it.

    Raises:
        RunError: the hub refuses or fails. Its files are then as they were, because a commit is
            whole or not made.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {file.relative_to(folder).as_posix(): file for file in _files_in(folder)}
    contents: dict[str, str | bytes] = {name: str(file) for name, file in files.items()}
    if CARD in files:
        contents[CARD] = _card_of(target, files[CARD])
    stale = sorted(name for name in target.files - files.keys() if _is_exported(name, target.files))
    operations: list[Any] = [
        *(CommitOperationDelete(name) for name in stale),
        *(CommitOperationAdd(name, content) for name, content in contents.items()),
    ]
    api = HfApi(token=_token())
    try:
        if target.commit is None:
            api.create_repo(target.repository, private=target.private or None)
        # What the library warns of is its own use of what it is built on.
        with (
            _bars_on_terminals(),
            warnings.catch_warnings(action="ignore", category=DeprecationWarning),
        ):
            commit = api.create_commit(
                target.repository,
                operations,
                commit_message="Export of a trained network",
                parent_commit=target.commit,
            ).oid
        info = api.model_info(target.repository, revision=commit, timeout=_SECONDS)
    except Exception as error:  # from the hub's library, or what it is built on
        raise _not_pushed(target, error, asked=False) from error
    # A .gitignore of the repository makes the hub leave files out without a word.
    missing = sorted(files.keys() - {one.rfilename for one in info.siblings or ()})
    if missing:
        raise RunError(
            f"{target}: the hub has left out {', '.join(missing)}; is there a .gitignore?"
        )
    return Pushed(
        f"{api.endpoint}/{target.repository}", commit, _notes(target, bool(info.private), stale)
    )


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Let the hub's library draw its progress on terminals only, and end the line of a bar."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    draws = not are_progress_bars_disabled()
    is_free = constants.HF_HUB_DISABLE_PROGRESS_BARS is None  # else the user decides
    if draws and is_free and not sys.stderr.isatty():
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()
        return
    try:
        yield
    except Exception:
        if draws:
            print(file=sys.stderr)
        raise


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _is_exported(name: str, files: Iterable[str]) -> bool:
    """Whether a file of a repository is one that an export writes."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return file in (WEIGHTS, ONNX, FILE, CARD)
    return "/" not in folder and f"{folder}/{WEIGHTS}" in files and file in (WEIGHTS, FILE, CARD)


def _card_of(target: PushTarget, path: Path) -> bytes:
    """Return the card as it is pushed: with our tag, an earlier licence and the hub's name."""
    from huggingface_hub import ModelCard

    text = read_at_most(path, LARGEST_JSON).decode(errors="replace")
    name = f"{HUB_PREFIX}{target.repository}"
    text = text.replace("local-dir:path/to/this/folder", name).replace("path/to/this/folder", name)
    card = ModelCard(text, ignore_metadata_errors=True)
    tags = card.data.get("tags") or []
    if TAG not in tags:
        card.data["tags"] = [*tags, TAG]
    for key, value in target.licence.items():
        setattr(card.data, key, value)
    return str(card).encode()


def _notes(target: PushTarget, private: bool, stale: list[str]) -> tuple[str, ...]:
    kind = "private" if private else "public"
    notes = [f"a new {kind} repository"]
    if target.commit is not None:
        removed = f"; {', '.join(stale)} of an earlier export is removed" if stale else ""
        notes = [f"a new commit of a {kind} repository, whose history keeps earlier files{removed}"]
    if target.licence:
        kept = ", ".join(f"{key}: {value}" for key, value in target.licence.items())
        return (*notes, f"the card keeps its licence ({kept})")
    return (*notes, f"the card names no licence: add one (license: ... at the top of {CARD})")


# ---------------------------------------------------------------- errors of the hub


def _token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception as error:  # a login that has expired and cannot be renewed
        raise UsageError(f"the login to the hub fails ({one_line(error)}): {_LOG_IN}") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error of the hub's library comes from, if it does."""
    while error is not None:
        found = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(found, int):
            return found
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """Return the first cause of an error on one line, without a token that it might quote."""
    while error.__cause__ is not None:
        error = error.__cause__
    text, token = f"{type(error).__name__}: {one_line(error)}", _token()
    return (text.replace(token, "***") if token else text)[:_LONGEST_REASON]


def _not_downloaded(model: _Model, error: Exception, status: int | None) -> UsageError:
    """Return the one line that says why a model cannot be downloaded."""
    from huggingface_hub import errors

    if isinstance(error, UsageError):
        return error
    login = "the token that is set may not read it" if _token() else f"it may be private: {_LOG_IN}"
    if isinstance(error, errors.GatedRepoError):
        text = f"access to it is gated: accept its terms on its page, and {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"it has no revision {model.revision}: name a branch, a tag or a commit"
    elif status in (401, 403, 404):
        text = f"the hub has no such model that can be read; check the name ({login})"
    elif status == 429:
        text = "the hub asks to wait, because there were too many requests: try again later"
    else:
        text = f"it cannot be downloaded: {_reason(error)}"
    return UsageError(f"{model}: {text}")


def _not_pushed(target: PushTarget, error: Exception, asked: bool) -> UsageError | RunError:
    """Return the one line that says why nothing is pushed.

    Args:
        target: of the push.
        error: from the hub's library.
        asked: whether the hub was only asked, before anything was written.
    """
    owner, status = target.repository.partition("/")[0], _status(error)
    text = {
        401: f"the hub does not accept the token: {_LOG_IN}",
        403: f"the token may not do that: it needs write access to {owner}",
        404: "the repository is not there any more: start again",
        409: "the repository exists and cannot be read, or is being changed: name another one",
        412: "the repository has been changed meanwhile: start again",
        413: "the files are too large for the hub",
        429: "the hub asks to wait, because there were too many requests: try again later",
    }.get(status or 0, "the hub fails: try again")
    said = getattr(error, "server_message", None) if status else None
    reason = _reason(error) if said is None else _reason(RuntimeError(said)).partition(": ")[2]
    text = f"{target}: {text} ({reason})" if reason else f"{target}: {text}"
    return UsageError(text) if asked and status in (401, 403) else RunError(text)
