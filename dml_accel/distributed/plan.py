"""Predict what a placement costs, and choose one: operations over rates, bytes over bandwidth.

The model assumes an idle machine and no overlap of communication and computation. It compares
placements; it does not promise seconds.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dml_accel.core.config import Config
from dml_accel.core.tables import table
from dml_accel.core.updates import UpdateSchedule
from dml_accel.data.batches import slices
from dml_accel.data.mixing import Mixing
from dml_accel.distributed.costs import Cost

_MACS_PER_SECOND_OF_A_THREAD = 40e9
_MACS_PER_SECOND_OF_A_GPU = 5e12
# What the host takes to start one operation and its share of autograd, so that a small network on a
# GPU takes as long for few images as for many: 7 ms a step of ResNet-32. An estimate.
_SECONDS_TO_START_ON_A_GPU = 20e-6
_BACKWARD = 2  # a backward pass costs as much as two forward passes
_COPIES = 2  # parameters, gradients
# Of one core, for a photograph of 400 x 300 pixels that is cut to 224: benchmarks/photographs.md.
SECONDS_TO_DECODE = 3e-3
_BUCKET_BYTES = 25e6  # DDP averages gradients in messages of this size

Ranks = dict[str, list[int]]


@dataclass(frozen=True)
class Machine:
    """The rates that the model assumes.

    Attributes:
        bandwidth: bytes per second out of one process.
        latency: seconds per message, including the wait for a process that is not there yet. The
            default is what a ResNet-32 pair's group batch norm took on gloo with two processes on
            one machine (benchmarks/processes.md).
        macs_per_second: of one process, for networks that were not timed.
        start: seconds to start one operation; no network computes faster than it is started.
    """

    bandwidth: float = 1e9
    latency: float = 1e-3
    macs_per_second: float = _MACS_PER_SECOND_OF_A_THREAD
    start: float = 0.0


def this_machine() -> Machine:
    """Return the rates that are assumed by default."""
    if torch.cuda.is_available():
        return Machine(1e10, 2e-5, _MACS_PER_SECOND_OF_A_GPU, _SECONDS_TO_START_ON_A_GPU)
    return Machine(macs_per_second=_MACS_PER_SECOND_OF_A_THREAD * torch.get_num_threads())


@dataclass(frozen=True)
class StepLoad:
    """What one optimizer step computes, keeps and exchanges, whoever does it.

    Attributes:
        micro_batches: images in each.
        classes: of the images.
        contribution: numbers per image of a sum over peers.
        number_bytes: of one parameter or activation.
        logit_bytes: of one logit that is exchanged.
        spans_batch_norm: whether batch statistics span the processes of a peer.
        mutual: whether peers learn from each other.
        low_memory: whether one network's activations at a time are kept.
        averages: whether an average of each network's weights is kept.
        averages_teach: whether the averages predict what peers learn from.
        best: whether each network's best weights are kept.
        sums: whether the sum of posteriors is exchanged, not every peer's logits.
        decoding: seconds of a core to read and cut one image; 0: images are in memory.
        workers: processes that do so for each training process; 0: it does so itself.
        mixes: whether batches are mixed, so that a part of one needs its partners as well.
    """

    micro_batches: tuple[int, ...]
    classes: int
    contribution: int
    number_bytes: int
    logit_bytes: int
    spans_batch_norm: bool
    mutual: bool
    low_memory: bool
    sums: bool
    averages: bool = False
    averages_teach: bool = False
    best: bool = False
    decoding: float = 0.0
    workers: int = 0
    mixes: bool = False

    @classmethod
    def of(
        cls, config: Config, classes: int, decoding: float = 0.0, workers: int = 0
    ) -> "StepLoad":
        """Return the load of a run's steps."""
        number_bytes = 8 if config.numerics.float64 else 4
        cuts = slices(config.optim.batch_size, config.optim.grad_accum)
        return cls(
            micro_batches=tuple(stop - start for start, stop in cuts),
            classes=classes,
            contribution=config.method.numbers_taught(classes),
            number_bytes=number_bytes,
            logit_bytes=2 if config.numerics.exchange_dtype == "bf16" else number_bytes,
            spans_batch_norm=config.numerics.batch_norm == "group",
            mutual=config.method.kl_weight > 0,
            low_memory=config.compute.low_memory,
            sums=config.compute.exchange == "sum",
            averages=config.optim.ema is not None,
            averages_teach=config.method.teach_with == "ema",
            best=config.run.keep == "best",
            decoding=decoding,
            workers=workers,
            mixes=Mixing.of(config.data) is not None,
        )


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of one placement, process by process.

    Attributes:
        ranks: the processes of each peer.
        step_seconds: of one optimizer step.
        busy: seconds of it that each process computes and averages within its peers' groups.
        sent: payload bytes that each process sends per step.
        memory: bytes of each process's parameters, their copies (gradients, optimizer, averages,
            best weights) and activations.
        decoded: images that each process decodes per step, if they are not in memory.
        late: seconds of the step for which decoding holds up the slowest process.
    """

    ranks: Ranks
    step_seconds: float
    busy: list[float]
    sent: list[float]
    memory: list[float]
    decoded: list[int] = dataclasses.field(default_factory=list)
    late: float = 0.0

    @property
    def idle(self) -> list[float]:
        """Share of the step that each process waits for the slowest one or for the exchange."""
        return [1 - busy / self.step_seconds for busy in self.busy]


# ---------------------------------------------------------------- the two maps


def everywhere(peers: Iterable[str], world_size: int) -> Ranks:
    """Return the map of every peer to all processes."""
    return {name: list(range(world_size)) for name in peers}


def allocate(costs: Mapping[str, float], world_size: int) -> Ranks:
    """Return processes for each peer: consecutive, in name order, none left without a peer.

    With at least as many processes as peers, each further process goes to the peer with the
    costliest share, which minimises the largest share. With fewer, several peers share a process:
    the costliest peer first, each to the process with the least work.

    Args:
        costs: of one step of each peer on one process, in any unit.
        world_size: processes.
    """
    names = sorted(costs)
    if world_size < len(names):
        return _allocate_shared(costs, names, world_size)
    count = dict.fromkeys(names, 1)
    for _ in range(world_size - len(names)):
        count[max(names, key=lambda name: costs[name] / count[name])] += 1
    ranks, first = {}, 0
    for name in names:
        ranks[name] = list(range(first, first + count[name]))
        first += count[name]
    return ranks


def _allocate_shared(costs: Mapping[str, float], names: list[str], world_size: int) -> Ranks:
    load = [0.0] * world_size
    held: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(names, key=lambda name: -costs[name]):  # stable: ties in name order
        # Empty processes first, so that none is left without a peer.
        rank = min(range(world_size), key=lambda rank: (bool(held[rank]), load[rank]))
        held[rank].append(name)
        load[rank] += costs[name]
    return {name: [rank] for name in names for rank in range(world_size) if name in held[rank]}


# ---------------------------------------------------------------- prediction and choice


def predict(
    ranks: Mapping[str, Sequence[int]],
    costs: Mapping[str, Cost],
    load: StepLoad,
    machine: Machine,
) -> Prediction:
    """Predict one optimizer step.

    Args:
        ranks: the processes of each peer, as ``Placement`` takes them.
        costs: of each peer.
        load: what a step computes and exchanges.
        machine: rates.
    """
    world_size = 1 + max(rank for held in ranks.values() for rank in held)
    busy, sent, memory = ([0.0] * world_size for _ in range(3))
    activations: list[list[float]] = [[] for _ in range(world_size)]
    batch, decoded = sum(load.micro_batches), [0] * world_size
    for name, held in ranks.items():
        cost, width = costs[name], len(held)
        seconds = cost.seconds or (1 + _BACKWARD) * cost.macs / machine.macs_per_second
        least = (1 + _BACKWARD) * cost.operations * machine.start * len(load.micro_batches)
        if load.mutual and (load.low_memory or load.averages_teach):
            # Every network predicts twice, or once and its average once.
            again = (2 + _BACKWARD) / (1 + _BACKWARD)
            seconds, least = seconds * again, least * again
        for index, rank in enumerate(held):
            rows = [_length(slices(count, width)[index]) for count in load.micro_batches]
            # All peers of a process see the same rows.
            decoded[rank] = sum(row * (1 + (load.mixes and row < batch)) for row in rows)
            grouped, messages = _group_bytes(cost, width, load)
            busy[rank] += max(sum(rows) * seconds, least) + grouped / machine.bandwidth
            busy[rank] += messages * machine.latency
            sent[rank] += grouped
            # An average keeps the differences of a step as well, and DDP the gradients in buckets.
            kept = cost.optimizer_state + 2 * load.averages + load.best
            copies = _COPIES + kept + (width > 1)
            memory[rank] += copies * load.number_bytes * cost.parameters
            activations[rank].append(max(rows) * cost.activation_bytes)
    together = max if load.low_memory or not load.mutual else sum
    memory = [a + together(b) for a, b in zip(memory, activations, strict=True)]
    exchanged, messages = _exchange_bytes(ranks, load, world_size)
    exchange = max(exchanged) / machine.bandwidth + messages * machine.latency
    computing, late = max(busy) + exchange, 0.0
    if load.decoding:
        reading = max(decoded) * load.decoding
        # Workers decode while the networks compute.
        late = max(0.0, reading / load.workers - computing) if load.workers else reading
    return Prediction(
        {name: list(held) for name, held in ranks.items()},
        computing + late,
        busy,
        [a + b for a, b in zip(sent, exchanged, strict=True)],
        memory,
        decoded if load.decoding else [],
        late,
    )


def choose(
    costs: Mapping[str, Cost],
    world_size: int,
    load: StepLoad,
    asked: str,
    schedule: UpdateSchedule,
    machine: Machine,
) -> tuple[Ranks, str]:
    """Return the processes of each peer, and the reason in one line.

    Args:
        costs: of each peer.
        world_size: processes.
        load: of a step.
        asked: ``--placement``.
        schedule: the update schedule.
        machine: rates.
    """
    # Independent training is compared with mutual training, so both get the same placement.
    mutual = dataclasses.replace(load, mutual=True)
    replicate, split = predict_both(costs, world_size, mutual, machine)
    if world_size == 1 or asked == "replicate":
        return replicate.ranks, "every peer in every process"
    if schedule.takes_turns:
        return replicate.ranks, f"every peer in every process, as --update {schedule.name} needs"
    if asked == "split":
        return split.ranks, f"as asked, {_named(split.ranks)}"
    chosen, other = sorted((split, replicate), key=lambda p: p.step_seconds)
    kinds = ("split", "replicate") if chosen is split else ("replicate", "split")
    return chosen.ranks, (
        f"{kinds[0]}, {_named(chosen.ranks)}: {_milliseconds(chosen)} per step predicted, "
        f"{_milliseconds(other)} for {kinds[1]}"
    )


def predict_both(
    costs: Mapping[str, Cost], world_size: int, load: StepLoad, machine: Machine
) -> tuple[Prediction, Prediction]:
    """Return the predictions for ``replicate`` and for the best ``split``."""
    replicate = everywhere(costs, world_size)
    work = {name: cost.seconds or float(cost.macs) for name, cost in costs.items()}
    split = allocate(work, world_size) if world_size > 1 else replicate
    return predict(replicate, costs, load, machine), predict(split, costs, load, machine)


def _length(slice_: tuple[int, int]) -> int:
    return slice_[1] - slice_[0]


def _ring(width: int, size: float) -> float:
    """Return the bytes that each of ``width`` processes sends to all-reduce ``size`` bytes."""
    return 2 * (width - 1) / width * size


def _group_bytes(cost: Cost, width: int, load: StepLoad) -> tuple[float, int]:
    """Return bytes and messages per process and step of gradients and batch statistics."""
    if width == 1:
        return 0.0, 0
    item, parts = load.number_bytes, len(load.micro_batches)
    size = _ring(width, item * cost.parameters)
    messages = 2 * (width - 1) * math.ceil(item * cost.parameters / _BUCKET_BYTES)
    if load.spans_batch_norm:
        forward = item * width * (2 * cost.channels + cost.norms)
        size += parts * (_ring(width, forward) + _ring(width, item * 2 * cost.channels))
        messages += parts * 2 * cost.norms * 2 * (width - 1)
    return size, messages


def _exchange_bytes(
    ranks: Mapping[str, Sequence[int]], load: StepLoad, world_size: int
) -> tuple[list[float], int]:
    """Return the bytes that each process sends to other peers' processes per step, and messages."""
    if world_size == 1:
        return [0.0], 0
    item, parts = load.number_bytes, load.micro_batches
    losses = _ring(world_size, 3 * item * len(ranks))
    messages = 2 * (world_size - 1)
    apart = len({tuple(held) for held in ranks.values()}) > 1
    if not apart or not load.mutual:
        return [losses] * world_size, messages
    if load.sums:
        each = sum(_ring(world_size, part * load.contribution * item) for part in parts)
        return [losses + each] * world_size, messages * (1 + len(parts))
    held = [sum(rank in members for members in ranks.values()) for rank in range(world_size)]
    narrowest = min(len(members) for members in ranks.values())
    rows = sum(math.ceil(part / narrowest) for part in parts)
    each = (world_size - 1) * max(held) * rows * load.classes * load.logit_bytes
    return [losses + each] * world_size, messages + (world_size - 1) * len(parts)


# ---------------------------------------------------------------- in words


def plan_text(
    predictions: tuple[Prediction, Prediction],
    why: str,
    load: StepLoad,
    image_size: int,
    asked: str,
    measured: bool,
    machine: Machine,
    times_images: bool = False,
) -> str:
    """Return tables of both placements, process by process, and which one is chosen.

    Args:
        predictions: for ``replicate`` and for ``split``.
        why: the choice in one line.
        load: of a step.
        image_size: pixels per side.
        asked: ``--placement``.
        measured: whether the networks were timed.
        machine: the assumed rates.
        times_images: whether decoding was timed.
    """
    parts = []
    headers = ("process", "peers", "busy ms", "idle %", "sends kB per step", "memory MB")
    for kind, found in zip(("replicate", "split"), predictions, strict=True):
        rows = [
            [
                rank,
                " ".join(name for name, held in found.ranks.items() if rank in held),
                f"{1e3 * busy:.1f}",
                f"{100 * found.idle[rank]:.0f}",
                f"{found.sent[rank] / 1e3:.1f}",
                f"{found.memory[rank] / 1e6:.0f}",
            ]
            for rank, busy in enumerate(found.busy)
        ]
        parts.append(
            f"{kind}: {1e3 * found.step_seconds:.1f} ms per step\n\n"
            + table(rows, headers, "simple", left=2)
            + _decoding_in_words(found, load)
        )
    assumed = "networks timed on this machine"
    if not measured:
        rate = machine.macs_per_second / 1e9
        assumed = f"{rate:.0f} billion multiply-accumulates per second and process"
    if machine.start:
        assumed += f", {1e6 * machine.start:.0f} us to start an operation"
    if load.decoding:
        how = "timed on this machine" if times_images else "assumed"
        assumed += f", {1e3 * load.decoding:.1f} ms of a core to decode an image ({how})"
    parts.append(
        f"{sum(load.micro_batches)} images of {image_size} pixels per step, {load.classes} "
        f"classes; assumed: {assumed}, {machine.bandwidth / 1e9:g} GB/s, "
        f"{1e6 * machine.latency:.0f} us per message.\n"
        f"Memory is {_copies_in_words(load)} and activations, without images and libraries."
    )
    parts.append(f"--placement {asked}: {why}")
    return "\n\n".join(parts)


def _decoding_in_words(found: Prediction, load: StepLoad) -> str:
    """Return what decoding costs a machine that has all processes; empty if it costs nothing."""
    if not load.decoding:
        return ""
    times = sum(found.decoded) / sum(load.micro_batches)
    work = sum(found.decoded) * load.decoding
    enough = math.ceil(max(found.decoded) * load.decoding / (found.step_seconds - found.late))
    return (
        f"\n\non one machine each image is decoded {times:g} times an epoch: "
        f"{1e3 * work:.0f} core-ms per step; {enough} workers per process keep up, and there are "
        f"{load.workers}" + (f", which adds {1e3 * found.late:.1f} ms" if found.late else "")
    )


def _copies_in_words(load: StepLoad) -> str:
    kept = ["parameters", "gradients", "state of the optimizer"]
    kept += ["averages"] * load.averages + ["best weights"] * load.best
    return ", ".join(kept)


def _named(ranks: Mapping[str, Sequence[int]]) -> str:
    if len({tuple(held) for held in ranks.values()}) == 1:
        return "every peer in every process"
    return ", ".join(f"{name} on {' '.join(map(str, held))}" for name, held in ranks.items())


def _milliseconds(prediction: Prediction) -> str:
    return f"{1e3 * prediction.step_seconds:.0f} ms"
