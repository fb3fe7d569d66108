"""Models on the Hugging Face Hub: downloaded where a folder is named, and pushed.

``hf-hub:owner/name[@revision]`` stands for a folder wherever one of trained peers is taken. Of a
repository only the files of a peer are downloaded, into the cache of the hub's own library:

    model.safetensors, config.json, README.md      of a peer, or
    */ those, and README.md                        of an ensemble
"""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import LARGEST_JSON
from dml_accel.core.host import HUB_PREFIX, expanded, is_on_hub, require_hub_cache
from dml_accel.data.arrow import hub_answers
from dml_accel.models.timm_config import FILE

WEIGHTS, CARD = "model.safetensors", "README.md"
_SECONDS = 10.0  # that the hub may take to answer a question
_LONGEST_REASON = 300  # characters
_OWNER_AND_NAME = re.compile(r"(?=.{3,96}$)[\w.-]+/[\w.-]+", re.ASCII)
_REVISION = re.compile(r"[\w][\w./+-]{0,250}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+)--(.+)")
_LARGEST_TEXT = {FILE: LARGEST_JSON, CARD: LARGEST_JSON}  # bytes, of files beside the weights
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
        _refuse(model, error, status)


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
    for name in names[:-1]:
        hf_hub_download(model.repository, name, revision=info.sha)
    # The last one says which commit the branch stands for, so that a copy which is not complete is
    # never found by its name.
    last = Path(hf_hub_download(model.repository, names[-1], revision=model.revision))
    folder = last.parent
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


# ---------------------------------------------------------------- errors of the hub


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of the hub's library stands for, if it does."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _reason(error: BaseException) -> str:
    """Return an error on one line, without a token that it might quote."""
    from huggingface_hub import get_token

    text = one_line(error)
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}"


def _refuse(model: _Model, error: Exception, status: int | None) -> NoReturn:
    """Raise the one line that says why a model cannot be downloaded."""
    from huggingface_hub import errors, get_token

    if isinstance(error, UsageError):
        raise error
    login = (
        "the token that is set may not read it" if get_token() else f"it may be private: {_LOG_IN}"
    )
    if isinstance(error, errors.GatedRepoError):
        text = f"access to it is gated: accept its terms on its page, and {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"it has no revision {model.revision}: name a branch, a tag or a commit"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        text = f"the hub has no such model that can be read; check the name ({login})"
    elif status == 429:
        text = "the hub asks to wait, because there were too many requests: try again later"
    else:
        text = f"it cannot be downloaded: {_reason(error)}"
    raise UsageError(f"{model}: {text}") from error
