"""The state of any optimizer as tensors and JSON, and back, bit for bit.

Weights are counted over the optimizer's groups; ``3.exp_avg`` belongs to the fourth. Settings of a
group, such as betas, are written to be read by people: they follow from the configuration, and
other versions of a library name others.
"""

import copy
from typing import Any

import torch
from torch import Tensor

# What a group holds besides settings: steps that are counted there, and in timm 1.0.26 a table by
# step that its weights share.
_STATE_OF_GROUP = {"step", "buffer"}


def pack_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by name, and the numbers and groups as JSON."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    # torch keeps tensors and numbers in one dictionary; the two formats hold one kind each.
    for index, state in saved["state"].items():
        for name, value in state.items():
            kind = tensors if isinstance(value, Tensor) else numbers
            kind[f"{index}.{name}"] = value
    groups = [{n: _as_json(v) for n, v in group.items()} for group in saved["param_groups"]]
    return tensors, {"optimizer": numbers, "groups": groups}


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return str(value) if isinstance(value, torch.dtype) else value


def unpack_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    """Set an optimizer to what ``pack_state`` returned, after ``problem`` found none."""
    state: dict[int, dict[str, Any]] = {}
    for place, value in (tensors | rest["optimizer"]).items():
        index, _, name = place.partition(".")
        state.setdefault(int(index), {})[name] = value
    # Fused kernels walk through a weight and its state in memory order, and do not check that both
    # have the same layout: give the state the layout of its weight.
    weights = _weights(optimizer)
    for index, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == weights[index].shape:
                like = torch.empty_like(weights[index], dtype=value.dtype)
                values[name] = like.copy_(value)
    groups = []
    for own, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        settings = {name: value for name, value in own.items() if name != "step"}
        counted = {name: saved[name] for name in _STATE_OF_GROUP & saved.keys()}
        groups.append(settings | counted | {"params": saved["params"]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # torch gives the state the dtype of its weight, which not all of it had.
    for index, values in state.items():
        loaded = optimizer.state[weights[index]]
        for name, value in values.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def problem(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> str:
    """Return what of a saved state does not fit an optimizer; empty if all of it does.

    Nothing is changed: torch itself would fail half way, or in a later step.
    """
    stepped = _after_a_step(optimizer)
    expected, like = pack_state(stepped)
    numbers, groups = rest.get("optimizer"), rest.get("groups")
    if not (isinstance(numbers, dict) and isinstance(groups, list)):
        return "the optimizer"
    if len(groups) != len(like["groups"]) or not all(map(_is_group, groups, like["groups"])):
        return "the groups of the optimizer"
    for name, value in tensors.items():
        one = expected.get(name)
        if one is None or (value.shape, value.dtype) != (one.shape, one.dtype):
            return f"optimizer.{name} {tuple(value.shape)} {value.dtype}"
    for name, number in numbers.items():
        # A boolean is an int to Python.
        if name not in like["optimizer"] or _kind(number) != _kind(like["optimizer"][name]):
            return f"optimizer.{name}"
    found = tensors.keys() | numbers.keys()
    # A weight that has not been updated yet has no state.
    started = {name.partition(".")[0] for name in found}
    whole = {n for n in expected | like["optimizer"] if n.partition(".")[0] in started}
    return f"optimizer.{min(whole - found)}, which is missing," if whole - found else ""


def _is_group(saved: Any, like: dict[str, Any]) -> bool:
    if not isinstance(saved, dict) or saved.get("params") != like["params"]:
        return False
    # Before its first step an optimizer may not count yet; another version may count elsewhere.
    counted = _STATE_OF_GROUP & saved.keys() & like.keys()
    return all(_kind(saved[name]) is _kind(like[name]) for name in counted)


def _kind(value: Any) -> type:
    kind = type(value)
    return float if kind is int else kind


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _after_a_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return a copy that has taken a step, with copies of the weights: it has all of its state."""
    stepped = copy.deepcopy(optimizer)
    for weight in _weights(stepped):
        weight.grad = torch.zeros_like(weight)
    stepped.step()
    return stepped
