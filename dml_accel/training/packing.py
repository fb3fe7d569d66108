"""A peer as tensors and JSON, and back: all that training has made of it.

Shapes and kinds are checked before anything of a peer is touched.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dml_accel.models.spec import Peer

_SCALER = set(torch.amp.GradScaler("cpu").state_dict())


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the text names the file."""


def pack(peer: Peer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a peer's tensors by name, and the rest as JSON."""
    tensors = {f"model.{n}": t for n, t in peer.module.state_dict().items()}
    optimizer, numbers = peer.optimizer.state_dict(), {}
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    rest = {
        "optimizer": numbers,
        "groups": optimizer["param_groups"],
        "scaler": peer.scaler.state_dict(),
    }
    # Cloned, because the format refuses tensors that share memory (tied weights).
    return {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, rest


def unpack(peer: Peer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Set a peer to what ``pack`` returned; both ``require`` functions have accepted it."""
    weights = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith("model.")}
    peer.module.load_state_dict(weights)
    values = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith("optimizer.")}
    state: dict[int, dict[str, Any]] = {}
    for place, value in (values | rest["optimizer"]).items():
        index, _, name = place.partition(".")
        state.setdefault(int(index), {})[name] = value
    # Fused kernels read weights and what belongs to them in the order of memory, and do not look
    # whether both lie there alike.
    weights_of = [weight for group in peer.optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(weights_of):
        for name, value in state.get(index, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[index][name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    peer.optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    if rest["scaler"]:
        peer.scaler.load_state_dict(rest["scaler"])


def require_state_fits(path: Path, peer: Peer, rest: dict[str, Any], like: dict[str, Any]) -> None:
    """Refuse numbers that the optimizer or the scaler would choke on half way."""
    numbers, groups, scaler = (rest.get(name) for name in ("optimizer", "groups", "scaler"))
    weights = sum(len(group["params"]) for group in like["groups"])
    fits = isinstance(numbers, dict) and all(
        (place := re.fullmatch(r"(\d{1,9})\.\w+", name)) and int(place[1]) < weights
        for name in numbers
    )
    fits &= isinstance(groups, list) and [_shape(g) for g in groups] == [
        _shape(g) for g in like["groups"]
    ]
    fits &= isinstance(scaler, dict) and (not scaler or set(scaler) == _SCALER)
    if not fits:
        raise CheckpointError(f"{path} holds another optimizer or loss scaler than {peer.name} has")


def _shape(group: Any) -> Any:
    return (set(group), group.get("params")) if isinstance(group, dict) else None


def require_fit(
    path: Path, peer: Peer, tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Refuse tensors that are not those of a peer.

    Args:
        path: the file, for the text.
        peer: the peer.
        tensors: what was read.
        expected: what ``pack`` returns of the peer as it is.

    Raises:
        CheckpointError: one is missing, or has another shape or precision.
    """
    model = {name for name in expected if name.startswith("model.")}
    if {name for name in tensors if name.startswith("model.")} != model:
        raise CheckpointError(f"{path} holds other weights than {peer.name} has")
    sizes = [w.shape for group in peer.optimizer.param_groups for w in group["params"]]
    for name, value in tensors.items():
        like, index = expected.get(name), name.partition(".")[2].partition(".")[0]
        if like is not None:
            fits = (value.shape, value.dtype) == (like.shape, like.dtype)
        else:  # a tensor of an optimizer that has not stepped here: a weight's shape, or a number
            known = name.startswith("optimizer.") and index.isdigit() and int(index) < len(sizes)
            fits = known and value.shape in (sizes[int(index)], torch.Size([]))
        if not fits:
            raise CheckpointError(
                f"{path}: {name} {tuple(value.shape)} {value.dtype} does not fit {peer.name}"
            )
