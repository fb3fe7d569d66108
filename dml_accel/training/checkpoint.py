"""Checkpoints: everything that a run carries, as safetensors and JSON, complete or absent.

    step-00001000/
      state.json              step, what the run adds, the sha256 of every file and of itself
      <peer>.safetensors      parameters, buffers, the optimizer's tensors
      <peer>.json             the optimizer's numbers, the loss scaler

A folder gets its name when every file in it is on the disk. Reading checks everything, shapes
included, before any network is touched; names of files come from the peers' names, never from a
file. A sha256 finds damage; that nothing read can execute is up to the two formats.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dml_accel.core.files import LARGEST_JSON, UnreadableError, read_at_most, strict_json
from dml_accel.models.spec import Peer
from dml_accel.training.packing import (
    CheckpointError,
    pack,
    require_fit,
    require_state_fits,
    unpack,
)

_FORMAT = 1
_LARGEST_HEADER = 16 * 2**20  # bytes
_STATE = "state.json"


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: its content does not match its sha256")


# ---------------------------------------------------------------- writing


def begin(root: Path, step: int) -> Path:
    """Make the unnamed folder of a new checkpoint below ``root``; clear what others left behind."""
    root.mkdir(parents=True, exist_ok=True)
    abandon(root)
    folder = unnamed(root, step)
    folder.mkdir()
    return folder


def unnamed(root: Path, step: int) -> Path:
    """Return the folder that a checkpoint is written into before it gets its name."""
    return root / f".new-step-{step:08d}"


def abandon(root: Path) -> None:
    """Clear away what is not, or no longer, a checkpoint."""
    for leftover in root.glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_peer(folder: Path, peer: Peer) -> None:
    """Write one peer's two files; on the disk when this returns."""
    tensors, rest = pack(peer)
    content = save(tensors, metadata={"format": "pt"})
    _write(folder / f"{peer.name}.safetensors", content)
    rest["sha256"] = _sha256(content)
    _write(folder / f"{peer.name}.json", _dump(rest))


def finish(
    folder: Path, peers: Iterable[str], step: int, state: dict[str, Any], keep: int | None
) -> Path:
    """Give a checkpoint whose peers are all written its name; then forget the oldest.

    Args:
        folder: what ``begin`` returned.
        peers: names of all peers.
        step: optimizer steps taken.
        state: what else the run needs, as JSON.
        keep: how many checkpoints to keep, this one included; None for all.
    """
    files: dict[str, str] = {}
    for name in peers:
        content = (folder / f"{name}.json").read_bytes()
        files[f"{name}.json"] = _sha256(content)
        # By its writer, who has the bytes at hand: the first rank need not read the weights back.
        files[f"{name}.safetensors"] = _parse(folder / f"{name}.json", content)["sha256"]
    whole = {"format": _FORMAT, "step": step, "files": files} | state
    _write(folder / _STATE, _dump(whole | {"sha256": _sha256(_dump(whole))}))
    _sync(folder)
    final = folder.with_name(f"step-{step:08d}")
    if final.exists():  # damaged, or it would have been resumed from
        final.rename(folder.with_name(f".old-step-{step:08d}"))
    folder.rename(final)
    _sync(final.parent)
    # Later ones are damaged, or this run would have begun there: they do not count.
    known = [path for path in named(final.parent) if step_of(path) <= step]
    for old in known[keep:] if keep else ():
        # Renamed first: what is half removed must not look like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")), ignore_errors=True)
    return final


def named(root: Path) -> list[Path]:
    """Return the checkpoints below ``root``, the newest first."""
    return sorted(filter(is_named, root.glob("step-*")), key=step_of, reverse=True)


def is_named(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return re.fullmatch(r"step-\d{8,12}", folder.name) is not None


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name[5:])


# ---------------------------------------------------------------- reading


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = folder / _STATE
    content = _bytes(path, LARGEST_JSON)
    state = _parse(path, content)
    as_written = _dump(state) == content
    given = state.pop("sha256", None)
    if not as_written or given != _sha256(_dump(state)):
        raise _damaged(path)
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, not {_FORMAT}")
    if not isinstance(state.get("files"), dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path} does not say its step and files")
    return state


def verify(folder: Path, peers: Iterable[str]) -> dict[str, Any]:
    """Check every file of a checkpoint against its sha256; return the content of state.json.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    state = read_state(folder)
    for name in peers:
        path = folder / f"{name}.safetensors"
        _read_rest(folder, state, name)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if found != state["files"].get(path.name):
            raise _damaged(path)
    return state


def load_peers(folder: Path, peers: Sequence[Peer]) -> dict[str, Any]:
    """Set the peers back to what they were; return the content of state.json.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit a peer. No peer has been
            touched then.
    """
    state = read_state(folder)
    read = [_read_peer(folder, state, peer) for peer in peers]
    for peer, (tensors, rest) in zip(peers, read, strict=True):
        unpack(peer, tensors, rest)
    return state


def _read_peer(
    folder: Path, state: dict[str, Any], peer: Peer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rest = _read_rest(folder, state, peer.name)
    expected, like = pack(peer)
    require_state_fits(folder / f"{peer.name}.json", peer, rest, like)
    weights = sum(t.numel() * t.element_size() for t in expected.values())
    # An optimizer that has not stepped yet has less state than one that has: allow for it.
    path = folder / f"{peer.name}.safetensors"
    content = _bytes(path, 8 * weights + _LARGEST_HEADER)
    if _sha256(content) != state["files"].get(path.name):
        raise _damaged(path)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    require_fit(path, peer, tensors, expected)
    return tensors, rest


def _read_rest(folder: Path, state: dict[str, Any], name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    content = _bytes(path, LARGEST_JSON)
    if _sha256(content) != state["files"].get(path.name):
        raise _damaged(path)
    return _parse(path, content)


# ---------------------------------------------------------------- files


def _dump(content: Any) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False).encode()


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = strict_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object")
    return found


def _bytes(path: Path, most: int) -> bytes:
    try:
        return read_at_most(path, most)
    except UnreadableError as error:
        raise CheckpointError(str(error)) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
