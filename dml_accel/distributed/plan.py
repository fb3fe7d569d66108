"""Predict what a placement costs, and choose one: arithmetic over rates, bytes over bandwidth.

The model knows no waiting for a busy machine and no overlap of exchange and arithmetic. It is
there to compare placements, not to promise seconds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dml_accel.core.config import Config
from dml_accel.core.rng import bounds
from dml_accel.distributed.allocation import allocate, everywhere
from dml_accel.distributed.costs import Cost

_MACS_PER_SECOND_OF_A_THREAD = 40e9
_MACS_PER_SECOND_OF_A_GPU = 5e12
_BACKWARD = 2  # the backward pass costs twice the forward pass
_STATE = 3  # parameters, gradients, momentum


@dataclass(frozen=True)
class Machine:
    """What the model assumes.

    Attributes:
        bandwidth: bytes per second out of one process.
        latency: seconds of one message, the wait for a process that is not there yet included.
            The default is what a ResNet-32 pair's group batch norm took on gloo with two
            processes of one machine (benchmarks/processes.md).
        macs_per_second: of one process, for networks that were not timed.
    """

    bandwidth: float = 1e9
    latency: float = 1e-3
    macs_per_second: float = _MACS_PER_SECOND_OF_A_THREAD


@dataclass(frozen=True)
class Prediction:
    """What one placement is expected to cost, process by process.

    Attributes:
        ranks: the processes of each peer.
        step_seconds: of one optimizer step.
        busy: seconds of it that each process computes and averages within its peers' groups.
        sent: payload bytes that each process sends in a step.
        memory: bytes of each process's parameters, gradients, momentum and activations.
    """

    ranks: dict[str, list[int]]
    step_seconds: float
    busy: list[float]
    sent: list[float]
    memory: list[float]

    @property
    def idle(self) -> list[float]:
        """Share of the step that each process waits for the slowest, or for the exchange."""
        return [1 - busy / self.step_seconds for busy in self.busy]


def this_machine() -> Machine:
    """Return what is assumed where nothing is said."""
    if torch.cuda.is_available():
        return Machine(1e10, 2e-5, _MACS_PER_SECOND_OF_A_GPU)
    return Machine(macs_per_second=_MACS_PER_SECOND_OF_A_THREAD * torch.get_num_threads())


def predict(
    ranks: Mapping[str, Sequence[int]],
    costs: Mapping[str, Cost],
    config: Config,
    classes: int,
    machine: Machine,
) -> Prediction:
    """Predict one optimizer step.

    Args:
        ranks: the processes of each peer, as ``Placement`` takes them.
        costs: of each peer.
        config: batch, precision and exchange.
        classes: of the images.
        machine: rates.
    """
    world_size = 1 + max(rank for held in ranks.values() for rank in held)
    item = 8 if config.float64 else 4
    parts = [stop - start for start, stop in bounds(config.batch_size, config.grad_accum)]
    busy, sent, memory = ([0.0] * world_size for _ in range(3))
    activations: list[list[float]] = [[] for _ in range(world_size)]
    for name, held in ranks.items():
        cost, width = costs[name], len(held)
        seconds = cost.seconds or (1 + _BACKWARD) * cost.macs / machine.macs_per_second
        if config.low_memory and config.kl_weight:
            seconds *= (2 + _BACKWARD) / (1 + _BACKWARD)  # every network predicts twice
        for index, rank in enumerate(held):
            rows = [_length(bounds(part, width)[index]) for part in parts]
            grouped, messages = _group_bytes(cost, width, len(parts), item, config)
            busy[rank] += sum(rows) * seconds + grouped / machine.bandwidth
            busy[rank] += messages * machine.latency
            sent[rank] += grouped
            copies = _STATE + (width > 1)  # buckets of gradients to average
            memory[rank] += copies * item * cost.parameters
            activations[rank].append(max(rows) * cost.activation_bytes)
    together = max if config.low_memory or config.kl_weight == 0 else sum
    memory = [a + together(b) for a, b in zip(memory, activations, strict=True)]
    exchanged, messages = _exchange_bytes(ranks, config, classes, parts, item, world_size)
    exchange = max(exchanged) / machine.bandwidth + messages * machine.latency
    return Prediction(
        {name: list(held) for name, held in ranks.items()},
        max(busy) + exchange,
        busy,
        [a + b for a, b in zip(sent, exchanged, strict=True)],
        memory,
    )


def choose(
    costs: Mapping[str, Cost], world_size: int, config: Config, classes: int, machine: Machine
) -> tuple[dict[str, list[int]], str]:
    """Return the processes of each peer as ``--placement`` asks, and why in one line."""
    # Independent training is compared with mutual: both are to be placed alike.
    mutual = dataclasses.replace(config, kl_weight=config.kl_weight or 1.0)
    replicate, split = both(costs, world_size, mutual, classes, machine)
    if world_size == 1 or config.placement == "replicate":
        return replicate.ranks, "every peer in every process"
    if config.update != "simultaneous":
        return replicate.ranks, f"every peer in every process, as --update {config.update} needs"
    if config.placement == "split":
        return split.ranks, f"as asked, {_named(split.ranks)}"
    chosen, other = sorted((split, replicate), key=lambda p: p.step_seconds)
    kinds = ("split", "replicate") if chosen is split else ("replicate", "split")
    return chosen.ranks, (
        f"{kinds[0]}, {_named(chosen.ranks)}: {_milliseconds(chosen)} a step predicted, "
        f"{_milliseconds(other)} for {kinds[1]}"
    )


def both(
    costs: Mapping[str, Cost], world_size: int, config: Config, classes: int, machine: Machine
) -> tuple[Prediction, Prediction]:
    """Return the predictions of ``replicate`` and of the best ``split``."""
    replicate = everywhere(costs, world_size)
    work = {name: cost.seconds or float(cost.macs) for name, cost in costs.items()}
    split = allocate(work, world_size) if world_size > 1 else replicate
    return (
        predict(replicate, costs, config, classes, machine),
        predict(split, costs, config, classes, machine),
    )


def _length(slice_: tuple[int, int]) -> int:
    return slice_[1] - slice_[0]


def _ring(width: int, size: float) -> float:
    """Bytes that each of ``width`` processes sends to add up ``size`` bytes."""
    return 2 * (width - 1) / width * size


def _group_bytes(
    cost: Cost, width: int, parts: int, item: int, config: Config
) -> tuple[float, int]:
    """Return bytes and messages per process and step to act as one: gradients, batch norm."""
    if width == 1:
        return 0.0, 0
    size = _ring(width, item * cost.parameters)
    messages = 2 * (width - 1) * math.ceil(item * cost.parameters / 25e6)
    if config.batch_norm == "group":
        forward = item * width * (2 * cost.channels + cost.norms)
        size += parts * (_ring(width, forward) + _ring(width, item * 2 * cost.channels))
        messages += parts * 2 * cost.norms * 2 * (width - 1)
    return size, messages


def _exchange_bytes(
    ranks: Mapping[str, Sequence[int]],
    config: Config,
    classes: int,
    parts: Sequence[int],
    item: int,
    world_size: int,
) -> tuple[list[float], int]:
    """Return the bytes that each process sends between peers in a step, and its messages."""
    if world_size == 1:
        return [0.0], 0
    losses = _ring(world_size, 3 * item * len(ranks))
    messages = 2 * (world_size - 1)
    apart = len({tuple(held) for held in ranks.values()}) > 1
    if not apart or config.kl_weight == 0:
        return [losses] * world_size, messages
    if config.exchange == "sum":
        each = sum(_ring(world_size, part * (classes + 2) * item) for part in parts)
        return [losses + each] * world_size, messages * (1 + len(parts))
    held = [sum(rank in members for members in ranks.values()) for rank in range(world_size)]
    narrowest = min(len(members) for members in ranks.values())
    rows = sum(math.ceil(part / narrowest) for part in parts)
    sent_item = 2 if config.exchange_dtype == "bf16" else item
    each = (world_size - 1) * max(held) * rows * classes * sent_item
    return [losses + each] * world_size, messages + (world_size - 1) * len(parts)


def _named(ranks: Mapping[str, Sequence[int]]) -> str:
    if len({tuple(held) for held in ranks.values()}) == 1:
        return "every peer in every process"
    return ", ".join(f"{name} on {' '.join(map(str, held))}" for name, held in ranks.items())


def _milliseconds(prediction: Prediction) -> str:
    return f"{1e3 * prediction.step_seconds:.0f} ms"
