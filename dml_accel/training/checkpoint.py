"""Checkpoints: all state that a run carries, as safetensors and JSON, complete or absent.

    step-00001000/
      state.json              step, what the run adds, the sha256 of every file and of itself
      <peer>.safetensors      parameters, buffers, the optimizer's tensors; where they are kept, the
                              averages and the best of its weights (ema. and best.), and those of
                              the last exchange (snapshot.)
      <peer>.json             the optimizer's numbers, the loss scaler

A folder gets its name once every file in it is on the disk. Reading checks everything, shapes
included, before any network is changed; file names come from the peers' names, never from a file.
The sha256 detects damage; neither format can execute code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dml_accel.core.errors import CheckpointNotWrittenError, UnreadableError
from dml_accel.core.files import LARGEST_JSON, parse_json, read_at_most
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.peer import Peer
from dml_accel.training.optimizer_state import pack_state, problem, unpack_state

_FORMAT = 1
_LARGEST_HEADER = 16 * 2**20  # bytes
_STATE = "state.json"
KINDS = ("model", "ema", "best")  # the weights of a peer, their average, its best ones
_SNAPSHOT = "snapshot"  # the weights that it teaches with between two exchanges
_SCALER = set(torch.amp.GradScaler("cpu").state_dict())


def _damaged(path: Path) -> UnreadableError:
    return UnreadableError(f"{path} is damaged: its content does not match its sha256")


# ---------------------------------------------------------------- writing


def write_together(
    root: Path,
    step: int,
    peers: Sequence[Peer],
    state: dict[str, Any],
    keep: int | None,
    placement: Placement,
) -> None:
    """Write a checkpoint from all processes, or from none; older ones stay until it is complete.

    Args:
        root: the folder of checkpoints.
        step: optimizer steps taken.
        peers: those that are trained here; the first process of a peer writes it.
        state: what else the run needs, as JSON.
        keep: how many checkpoints to keep, this one included; None for all.
        placement: which peers this process leads.

    Raises:
        CheckpointNotWrittenError: it could not be written, raised in all processes; the newest one
            before it is intact.
    """
    first = placement.processes.rank == 0
    folder = unnamed(root, step)  # the same path in every process, on a file system that all share

    def begin_it() -> None:
        if first:
            begin(root, step)

    def write_ours() -> None:
        for peer in peers:
            if placement.leads(peer.name):
                write_peer(folder, peer)

    def finish_it() -> None:
        if first:
            finish(folder, placement.names, step, state, keep)

    # Every process waits after each part for all others: the folder exists before anybody writes
    # into it, and it gets its name after everybody has.
    for part in (begin_it, write_ours, finish_it):
        problem = None
        try:
            part()
        except (OSError, UnreadableError) as error:  # mostly a full disk: all must give up together
            problem = error
        failed = placement.processes.failed_rank(problem is not None)
        if failed is not None:
            if first:
                abandon(root)
            newest = next((path.name for path in named(root)), None)
            raise CheckpointNotWrittenError(
                f"the checkpoint of step {step} could not be written"
                f"{f': {problem}' if problem else f' by rank {failed}'}; "
                f"{f'{newest} is intact' if newest else 'there is none before it'}",
                prints=problem is not None,
            ) from problem


def begin(root: Path, step: int) -> Path:
    """Create the unnamed folder of a new checkpoint in ``root``; remove unfinished ones."""
    root.mkdir(parents=True, exist_ok=True)
    abandon(root)
    folder = unnamed(root, step)
    folder.mkdir()
    return folder


def unnamed(root: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written before it gets its name."""
    return root / f".new-step-{step:08d}"


def abandon(root: Path) -> None:
    """Remove what is not yet, or no longer, a checkpoint."""
    for leftover in root.glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_peer(folder: Path, peer: Peer) -> None:
    """Write the two files of a peer; they are on the disk when this returns."""
    tensors, rest = pack(peer)
    # In memory first, so that the sha256 is that of the bytes that were meant to be written.
    content = save(tensors, metadata={"format": "pt"})
    _write(folder / f"{peer.name}.safetensors", content)
    rest["sha256"] = _sha256(content)
    _write(folder / f"{peer.name}.json", _dump(rest))


def finish(
    folder: Path, peers: Iterable[str], step: int, state: dict[str, Any], keep: int | None
) -> Path:
    """Name a checkpoint whose peers are all written, then remove the oldest ones.

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
        # Computed by the peer's writer from the bytes at hand, so that rank 0 need not read them.
        files[f"{name}.safetensors"] = parse_json(folder / f"{name}.json", content)["sha256"]
    # state.json is written last and lists every file: without it there is no checkpoint.
    whole = {"format": _FORMAT, "step": step, "files": files} | state
    _write(folder / _STATE, _dump(whole | {"sha256": _sha256(_dump(whole))}))
    _sync(folder)
    final = folder.with_name(f"step-{step:08d}")
    if final.exists():  # damaged: else the run would have resumed from it
        final.rename(folder.with_name(f".old-step-{step:08d}"))
    folder.rename(final)  # atomic: a reader sees the whole checkpoint or none
    _sync(final.parent)  # the name itself must survive a power failure
    # Later ones are damaged, or this run would have resumed there: they do not count.
    known = [path for path in named(final.parent) if step_of(path) <= step]
    for old in known[keep:] if keep else ():
        # Renamed first: a half removed folder must not look like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")), ignore_errors=True)
    return final


def named(root: Path) -> list[Path]:
    """Return the checkpoints in ``root``, the newest first."""
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
        UnreadableError: it is missing, damaged or of another format.
    """
    path = folder / _STATE
    content = read_at_most(path, LARGEST_JSON)
    state = parse_json(path, content)
    as_written = _dump(state) == content
    given = state.pop("sha256", None)  # it covers everything but itself
    if not as_written or given != _sha256(_dump(state)):
        raise _damaged(path)
    if state.get("format") != _FORMAT:
        raise UnreadableError(f"{path} has format {state.get('format')}, not {_FORMAT}")
    if not isinstance(state.get("files"), dict) or not isinstance(state.get("step"), int):
        raise UnreadableError(f"{path} does not say its step and files")
    return state


def verify(folder: Path, peers: Iterable[str]) -> dict[str, Any]:
    """Check every file of a checkpoint against its sha256; return the content of state.json.

    Raises:
        UnreadableError: a file is missing or damaged.
    """
    state = read_state(folder)
    for name in peers:
        path = folder / f"{name}.safetensors"
        _read_rest(folder, state, name)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
        if found != state["files"].get(path.name):
            raise _damaged(path)
    return state


def load_peers(folder: Path, peers: Sequence[Peer]) -> dict[str, Any]:
    """Load the state of peers from a checkpoint; return the content of state.json.

    Raises:
        UnreadableError: a file is missing or damaged, or does not fit a peer; no peer has been
            changed then.
    """
    state = read_state(folder)
    # Everything is read and checked first: a peer is never left half loaded.
    read = [_read_peer(folder, state, peer) for peer in peers]
    for peer, (tensors, rest) in zip(peers, read, strict=True):
        unpack(peer, tensors, rest)
    return state


def _read_peer(
    folder: Path, state: dict[str, Any], peer: Peer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rest = _read_rest(folder, state, peer.name)
    expected, _ = pack(peer)
    path = folder / f"{peer.name}.safetensors"
    tensors = _read_tensors(path, state, expected.values())
    require_fit(path, peer, tensors, expected)
    _require_state_fits(folder, peer, tensors, rest)
    if bool(weights_in(tensors, "best")) != (peer.name in state.get("best", {})):
        raise UnreadableError(f"{path} and {_STATE} differ in whether they have best weights")
    exchanged = peer.snapshot is not None and state["step"] > peer.snapshot.first
    if bool(weights_in(tensors, _SNAPSHOT)) != exchanged:
        has, step = "lacks" if exchanged else "has", state["step"]
        raise UnreadableError(f"{path} {has} weights of an exchange at step {step}")
    return tensors, rest


def weights_in(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the weights of one of the kinds ``KINDS`` among the tensors of a peer."""
    start = f"{kind}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def load_weights(
    folder: Path, state: dict[str, Any], name: str, net: nn.Module, kind: str = "model"
) -> None:
    """Load the weights of one peer, without its optimizer, into its network.

    Args:
        folder: of the checkpoint.
        state: the content of its state.json.
        name: of the peer.
        net: its network.
        kind: one of ``KINDS``.

    Raises:
        UnreadableError: the file is missing or damaged, or does not fit; nothing has been changed.
    """
    path, expected = folder / f"{name}.safetensors", net.state_dict()
    tensors = _read_tensors(path, state, expected.values())
    found = weights_in(tensors, kind)
    shapes = [{n: (t.shape, t.dtype) for n, t in one.items()} for one in (found, expected)]
    if shapes[0] != shapes[1]:
        raise UnreadableError(f"{path} holds other weights than {name} has")
    net.load_state_dict(found)


def _read_tensors(path: Path, state: dict[str, Any], like: Iterable[Tensor]) -> dict[str, Tensor]:
    """Read a peer's tensors; ``like`` are those of the peer as it is, which bound their size."""
    weights = sum(t.numel() * t.element_size() for t in like)
    # The optimizer here has not stepped and has less state than the saved one: allow for it.
    content = read_at_most(path, 8 * weights + _LARGEST_HEADER)
    if _sha256(content) != state["files"].get(path.name):
        raise _damaged(path)
    try:
        return load(content)
    except SafetensorError as error:
        raise UnreadableError(f"{path} cannot be read: {error}") from error


def _read_rest(folder: Path, state: dict[str, Any], name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    content = read_at_most(path, LARGEST_JSON)
    if _sha256(content) != state["files"].get(path.name):
        raise _damaged(path)
    return parse_json(path, content)


# ---------------------------------------------------------------- a peer as tensors and JSON


def pack(peer: Peer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all state of a peer: tensors by name, and the rest as JSON."""
    tensors = {f"model.{n}": t for n, t in peer.module.state_dict().items()}
    if peer.average is not None:
        tensors |= {f"ema.{n}": t for n, t in peer.average.module.state_dict().items()}
    if peer.best is not None:
        tensors |= {f"best.{n}": t for n, t in peer.best.items()}
    if peer.snapshot is not None and peer.snapshot.is_taken:
        weights = peer.snapshot.module.state_dict()
        tensors |= {f"{_SNAPSHOT}.{n}": t for n, t in weights.items()}
    state, rest = pack_state(peer.optimizer)
    tensors |= {f"optimizer.{n}": t for n, t in state.items()}
    rest["scaler"] = peer.scaler.state_dict()
    # Cloned, because the format refuses tensors that share memory (tied weights).
    return {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, rest


def unpack(peer: Peer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Set a peer to what ``pack`` returned, after both ``require`` functions accepted it."""
    peer.module.load_state_dict(weights_in(tensors, "model"))
    if peer.average is not None:
        peer.average.module.load_state_dict(weights_in(tensors, "ema"))
    peer.best = weights_in(tensors, "best") or None
    if peer.snapshot is not None and (weights := weights_in(tensors, _SNAPSHOT)):
        peer.snapshot.module.load_state_dict(weights)
        peer.snapshot.is_taken = True
    unpack_state(peer.optimizer, weights_in(tensors, "optimizer"), rest)
    if rest["scaler"]:  # empty outside fp16
        peer.scaler.load_state_dict(rest["scaler"])


def require_fit(
    path: Path, peer: Peer, tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Refuse tensors that do not fit a peer.

    Its best weights and those of the last exchange may be there or not.

    Args:
        path: the file, for the message.
        peer: the peer.
        tensors: that were read.
        expected: what ``pack`` returns for the peer as it is.

    Raises:
        UnreadableError: a tensor is missing, or has another shape or dtype.
    """
    names = peer.module.state_dict().keys()
    averages = names if peer.average is not None else set()
    found = [weights_in(tensors, kind).keys() for kind in (*KINDS, _SNAPSHOT)]
    if found[:2] != [names, averages] or any(one and one != names for one in found[2:]):
        raise UnreadableError(f"{path} holds other weights than {peer.name} has")
    # Those that a peer does not have at its start are like the others.
    model = weights_in(expected, "model")
    for kind in ("best", _SNAPSHOT):
        expected = expected | {f"{kind}.{name}": value for name, value in model.items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            continue
        like = expected.get(name)
        if like is None or (value.shape, value.dtype) != (like.shape, like.dtype):
            raise UnreadableError(
                f"{path}: {name} {tuple(value.shape)} {value.dtype} does not fit {peer.name}"
            )


def _require_state_fits(
    folder: Path, peer: Peer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    """Refuse what would make the optimizer or the scaler fail half way."""
    path, scaler = folder / f"{peer.name}.json", rest.get("scaler")
    if not (isinstance(scaler, dict) and (not scaler or set(scaler) == _SCALER)):
        raise UnreadableError(f"{path} holds another loss scaler than {peer.name} has")
    found = problem(peer.optimizer, weights_in(tensors, "optimizer"), rest)
    if found:
        raise UnreadableError(
            f"{folder / peer.name}.safetensors and {path.name}: {found} does not fit {peer.name}"
        )


# ---------------------------------------------------------------- files


def _dump(content: Any) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False).encode()


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
