"""Predict what a placement costs, and choose one: operations over rates, bytes over bandwidth.

The model assumes an idle machine and no overlap of communication and computation. It compares
placements; it does not promise seconds.

Shape letters: K peers of the cohort, B rows of a micro-batch that a process has, C classes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dml_accel.core.cohort import words_of
from dml_accel.core.config import Config
from dml_accel.core.tables import ranges
from dml_accel.core.updates import UpdateSchedule
from dml_accel.data.batches import slices
from dml_accel.data.mixing import Mixing
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.exchange import Team, blocks_of, teams_of

_MACS_PER_SECOND_OF_A_THREAD = 40e9
_MACS_PER_SECOND_OF_A_GPU = 5e12
# What the host takes to start one operation and its share of autograd, so that a small network on a
# GPU takes as long for few images as for many: 7 ms a step of ResNet-32. An estimate.
_SECONDS_TO_START_ON_A_GPU = 20e-6
_BACKWARD = 2  # a backward pass costs as much as two forward passes
_COPIES = 2  # parameters, gradients
# Of one core, for a photograph of 400 x 300 pixels that is cut to 224: benchmarks/photographs.md.
SECONDS_TO_DECODE = 3e-3
# What a process on a CPU takes besides, in tensors as large as the largest that a network keeps:
# for what is being computed, and for gaps between what is kept (benchmarks/plan.md).
_TEMPORARIES_ON_A_CPU = 13
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
        trees: whether an all-reduce goes up and down a tree, as NCCL's do for few bytes; else
            around a ring, as gloo's do. Either sends as many bytes.
        temporaries: memory beside what is kept, in tensors as large as the largest of these; 0: not
            known.
    """

    bandwidth: float = 1e9
    latency: float = 1e-3
    macs_per_second: float = _MACS_PER_SECOND_OF_A_THREAD
    start: float = 0.0
    trees: bool = False
    temporaries: int = 0

    def messages_of_all_reduce(self, width: int) -> int:
        """Return the messages of an all-reduce that wait for each other."""
        return 2 * (math.ceil(math.log2(width)) if self.trees else width - 1)


def gpus() -> Machine:
    """Return the rates that are assumed of GPUs with NCCL."""
    return Machine(1e10, 2e-5, _MACS_PER_SECOND_OF_A_GPU, _SECONDS_TO_START_ON_A_GPU, trees=True)


def cpus() -> Machine:
    """Return the rates that are assumed of CPUs with gloo, with as many threads as this process."""
    rate = _MACS_PER_SECOND_OF_A_THREAD * torch.get_num_threads()
    return Machine(macs_per_second=rate, temporaries=_TEMPORARIES_ON_A_CPU)


def this_machine() -> Machine:
    """Return the rates that are assumed by default."""
    return gpus() if torch.cuda.is_available() else cpus()


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
        batches: that a step uses, each of as many images.
        passes: forward passes of a peer over a batch in a step, a backward pass counted as two.
        exchange_every: steps between two exchanges of weights; 1: logits are exchanged.
        shared_target: whether all peers learn from one target, which they are part of.
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
    batches: int = 1
    passes: float = 1 + _BACKWARD
    exchange_every: int = 1
    shared_target: bool = False

    @property
    def images(self) -> int:
        """Images of a step."""
        return self.batches * sum(self.micro_batches)

    @property
    def is_stale(self) -> bool:
        """Whether peers learn from weights of an earlier step."""
        return self.mutual and self.exchange_every > 1

    @classmethod
    def of(
        cls, config: Config, classes: int, decoding: float = 0.0, workers: int = 0
    ) -> "StepLoad":
        """Return the load of a run's steps."""
        number_bytes = 8 if config.numerics.float64 else 4
        cuts = slices(config.optim.batch_size, config.optim.grad_accum)
        peers = sum(len(word.peers) for word in words_of(config.cohort))
        method = config.method
        return cls(
            micro_batches=tuple(stop - start for start, stop in cuts),
            classes=classes,
            contribution=method.numbers_taught(classes),
            number_bytes=number_bytes,
            logit_bytes=2 if config.numerics.exchange_dtype == "bf16" else number_bytes,
            spans_batch_norm=config.numerics.batch_norm == "group",
            mutual=method.kl_weight > 0,
            low_memory=config.compute.low_memory,
            sums=config.compute.exchange == "sum",
            averages=config.optim.ema is not None,
            averages_teach=method.teach_with == "ema",
            best=config.run.keep == "best",
            decoding=decoding,
            workers=workers,
            mixes=Mixing.of(config.data) is not None,
            batches=method.schedule.batches_per_step(peers),
            passes=method.schedule.cost(peers),
            exchange_every=method.exchange_every,
            shared_target=method.one_target.is_shared,
        )


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of one placement, process by process.

    Attributes:
        ranks: the processes of each peer.
        step_seconds: of one optimizer step.
        rows: images of a batch that each process trains on.
        busy: seconds of a step that each process computes and averages within its peers' groups.
        sent: payload bytes that each process sends per step.
        received: payload bytes that each process receives per step.
        memory: bytes of each process's parameters, their copies (gradients, optimizer, averages,
            best weights, peers of an earlier step), activations and temporary tensors.
        exchange: seconds of the step in which processes of different peers exchange.
        exchanged: payload bytes that each process receives in that time.
        decoded: images that each process decodes per step, if they are not in memory.
        late: seconds of the step for which decoding holds up the slowest process.
    """

    ranks: Ranks
    step_seconds: float
    rows: list[int]
    busy: list[float]
    sent: list[float]
    received: list[float]
    memory: list[float]
    exchange: float
    exchanged: list[float]
    decoded: list[int] = dataclasses.field(default_factory=list)
    late: float = 0.0

    @property
    def idle(self) -> list[float]:
        """Share of the step that each process waits for the slowest one or for the exchange."""
        return [1 - busy / self.step_seconds for busy in self.busy]

    @property
    def kind(self) -> str:
        """``replicate`` or ``split``."""
        return "replicate" if len({tuple(held) for held in self.ranks.values()}) == 1 else "split"


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


def splits(work: Mapping[str, float], world_size: int) -> Iterator[Ranks]:
    """Yield the allocation of all processes, and others whose blocks are smaller.

    Teams of 341 and 683 processes have one block of all 1,024; teams of 320 and 704, of which 64
    divides both, have 64 blocks of 16: the slowest peer is a little slower, the exchange faster.

    Args:
        work: of each peer, as for ``allocate``.
        world_size: processes.
    """
    seen = set()
    for times in range(1, max(1, world_size // len(work)) + 1):
        if world_size % times == 0:
            ranks = {
                name: list(range(times * held[0], times * (held[-1] + 1)))
                for name, held in allocate(work, world_size // times).items()
            }
            widths = tuple(map(len, ranks.values()))
            if widths not in seen:
                yield ranks
            seen.add(widths)


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
    teams = teams_of(ranks)
    world_size = sum(len(team.ranks) for team in teams)
    works: dict[int, _Work] = {}
    for team in teams:
        known: dict[tuple[int, ...], _Work] = {}  # of thousands of processes, most are alike
        for rank, rows in zip(team.ranks, _rows(load, len(team.ranks)), strict=True):
            if rows not in known:
                known[rows] = _work(team, rows, costs, load, machine)
            works[rank] = known[rows]
    exchanged = _exchanged(teams, costs, load, machine)
    ours = [works[rank] for rank in range(world_size)]
    losses, waits = 0.0, 0.0
    if world_size > 1:
        losses = _ring(world_size, 3 * load.number_bytes * len(ranks))
        waits = machine.messages_of_all_reduce(world_size) * machine.latency
    busy = [one.busy for one in ours]
    exchange = max(one.seconds for one in exchanged)
    computing, late = max(busy) + exchange + losses / machine.bandwidth + waits, 0.0
    decoded = [one.decoded for one in ours] if load.decoding else []
    if decoded:
        reading = max(decoded) * load.decoding
        # Workers decode while the networks compute.
        late = max(0.0, reading / load.workers - computing) if load.workers else reading
    return Prediction(
        {name: list(held) for name, held in ranks.items()},
        computing + late,
        [sum(one.rows) for one in ours],
        busy,
        [one.averaged + other.sent + losses for one, other in zip(ours, exchanged, strict=True)],
        [a.averaged + b.received + losses for a, b in zip(ours, exchanged, strict=True)],
        [one.memory for one in ours],
        exchange,
        [one.received for one in exchanged],
        decoded,
        late,
    )


def _rows(load: StepLoad, width: int) -> Iterator[tuple[int, ...]]:
    """Yield the rows of each micro-batch that each of ``width`` processes has."""
    cuts = ([hi - lo for lo, hi in slices(count, width)] for count in load.micro_batches)
    return zip(*cuts, strict=True)


@dataclass(frozen=True)
class _Work:
    """What a process does in a step, without the exchange between peers.

    Attributes:
        rows: of each micro-batch.
        busy: seconds.
        averaged: bytes of gradients and batch statistics that it sends, and receives.
        memory: bytes.
        decoded: images.
    """

    rows: tuple[int, ...]
    busy: float
    averaged: float
    memory: float
    decoded: int


def _work(
    team: Team, rows: tuple[int, ...], costs: Mapping[str, Cost], load: StepLoad, machine: Machine
) -> _Work:
    width, parts, activations = len(team.ranks), len(rows), []
    busy = averaged = memory = 0.0
    largest = 0
    passes = load.passes if load.mutual else 1.0 + _BACKWARD
    if load.mutual and not load.is_stale and (load.low_memory or load.averages_teach):
        passes += 1  # every network predicts twice, or once and its average once
    for cost in (costs[name] for name in team.peers):
        busy += passes * _forward_seconds(cost, sum(rows), parts, machine)
        size, messages = _group_bytes(cost, width, load, machine)
        busy += size / machine.bandwidth + messages * machine.latency
        averaged += size
        # An average keeps the differences of a step as well, and DDP the gradients in buckets.
        kept = cost.optimizer_state + 2 * load.averages + load.best
        copies = _COPIES + kept + (width > 1)
        memory += copies * load.number_bytes * cost.parameters
        activations.append(max(rows) * cost.activation_bytes)
        largest = max(largest, max(rows) * cost.largest_bytes)
    if load.is_stale:
        # A peer that is alone here does not teach itself, unless it is part of its own target.
        is_teacher = len(team.peers) > 1 or load.shared_target
        for name, cost in costs.items():
            memory += cost.state_bytes
            if is_teacher or name not in team.peers:
                busy += _forward_seconds(cost, sum(rows), parts, machine)
    together = max if load.low_memory or not load.mutual else sum
    # All peers of a process see the same rows.
    images = sum(row * (1 + (load.mixes and row < sum(load.micro_batches))) for row in rows)
    memory += together(activations) + machine.temporaries * largest
    return _Work(rows, busy, averaged, memory, images)


def _forward_seconds(cost: Cost, rows: int, parts: int, machine: Machine) -> float:
    """Return the seconds in which a network predicts ``rows`` rows in ``parts`` parts."""
    computes = cost.macs / machine.macs_per_second
    if cost.seconds is not None:
        computes = cost.seconds / (1 + _BACKWARD)
    return max(rows * computes, parts * cost.operations * machine.start)


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
    learning = "" if load.mutual else ", both with the mutual loss"
    return chosen.ranks, (
        f"{kinds[0]}, {_named(chosen.ranks)}: {_milliseconds(chosen)} per step predicted, "
        f"{_milliseconds(other)} for {kinds[1]}{learning}"
    )


def predict_both(
    costs: Mapping[str, Cost], world_size: int, load: StepLoad, machine: Machine
) -> tuple[Prediction, Prediction]:
    """Return the predictions for ``replicate`` and for the best ``split``."""
    replicate = predict(everywhere(costs, world_size), costs, load, machine)
    if world_size == 1:
        return replicate, replicate
    work = {name: cost.seconds or float(cost.macs) for name, cost in costs.items()}
    found = (predict(ranks, costs, load, machine) for ranks in splits(work, world_size))
    return replicate, min(found, key=lambda one: one.step_seconds)


def timed_as_a_whole(
    costs: Mapping[str, Cost], load: StepLoad, machine: Machine, seconds: float
) -> tuple[dict[str, Cost], Machine]:
    """Return costs by which one process takes ``seconds`` for a step, and the machine.

    The peers share the time by their operations. No operation can take longer to start than in the
    step that was measured, so that a network for which ``machine`` assumes more is taken for one
    that only waits for starts: fewer rows do not make it faster.

    Args:
        costs: of each peer; their own times are replaced.
        load: of the step that was measured.
        machine: rates.
        seconds: of an optimizer step of the whole cohort in one process.
    """
    alone, in_memory = everywhere(costs, 1), dataclasses.replace(load, decoding=0.0)
    timed = {name: dataclasses.replace(one, seconds=float(one.macs)) for name, one in costs.items()}
    unit = predict(alone, timed, in_memory, dataclasses.replace(machine, start=0.0)).step_seconds
    scaled = {
        name: dataclasses.replace(one, seconds=one.macs * seconds / unit)
        for name, one in costs.items()
    }
    started = {name: dataclasses.replace(one, seconds=0.0) for name, one in costs.items()}
    least = predict(alone, started, in_memory, machine).step_seconds
    shorter = min(1.0, seconds / least) if least else 1.0
    return scaled, dataclasses.replace(machine, start=machine.start * shorter)


# ---------------------------------------------------------------- bytes and messages


def _ring(width: int, size: float) -> float:
    """Return the bytes that each of ``width`` processes sends to all-reduce ``size`` bytes."""
    return 2 * (width - 1) / width * size


def _group_bytes(cost: Cost, width: int, load: StepLoad, machine: Machine) -> tuple[float, int]:
    """Return bytes and messages per process and step of gradients and batch statistics."""
    if width == 1:
        return 0.0, 0
    item, parts = load.number_bytes, len(load.micro_batches)
    size, waits = _ring(width, item * cost.parameters), machine.messages_of_all_reduce(width)
    messages = waits * math.ceil(item * cost.parameters / _BUCKET_BYTES)
    if load.spans_batch_norm:
        forward = item * width * (2 * cost.channels + cost.norms)
        size += parts * (_ring(width, forward) + _ring(width, item * 2 * cost.channels))
        messages += parts * 2 * cost.norms * waits
    return size, messages


@dataclass(frozen=True)
class _Exchanged:
    """What a process exchanges with those of other peers in a step, on average: bytes, seconds."""

    sent: float = 0.0
    received: float = 0.0
    seconds: float = 0.0


def _exchanged(
    teams: Sequence[Team], costs: Mapping[str, Cost], load: StepLoad, machine: Machine
) -> list[_Exchanged]:
    """Return what each process exchanges, by rank; see ``distributed.exchange``."""
    world_size = sum(len(team.ranks) for team in teams)
    if len(teams) == 1 or not load.mutual:
        return [_Exchanged()] * world_size
    blocks = blocks_of(teams)
    if load.is_stale:
        return _exchanged_weights(teams, blocks, costs, load, machine)
    found: dict[int, _Exchanged] = {}
    for team in teams:
        for rank, rows in zip(team.ranks, _rows(load, len(team.ranks)), strict=True):
            found[rank] = _exchanged_rows(team, teams, len(blocks[0]), rows, load, machine)
    return [found[rank] for rank in range(world_size)]


def _exchanged_rows(
    team: Team,
    teams: Sequence[Team],
    block: int,
    rows: tuple[int, ...],
    load: StepLoad,
    machine: Machine,
) -> _Exchanged:
    """Return what a process with these rows of each micro-batch sends and receives about them."""
    others, messages = len(teams) - 1, block - 1
    if load.sums:
        size = sum(rows) * load.contribution * load.number_bytes
        sent = received = float(others * size)
        if block == len(teams):  # as many processes in each team: an all-reduce
            sent = received = _ring(block, size)
            messages = machine.messages_of_all_reduce(block)
    else:
        size = sum(rows) * load.classes * load.logit_bytes
        mine, peers = len(team.peers), sum(len(one.peers) for one in teams)
        sent, received = float(others * mine * size), float((peers - mine) * size)
    seconds = max(sent, received) / machine.bandwidth
    return _Exchanged(sent, received, seconds + messages * len(rows) * machine.latency)


def _exchanged_weights(
    teams: Sequence[Team],
    blocks: Sequence[tuple[int, ...]],
    costs: Mapping[str, Cost],
    load: StepLoad,
    machine: Machine,
) -> list[_Exchanged]:
    """Return what each process sends and receives of weights: each peer's go along a tree."""
    every, width = load.exchange_every, len(blocks[0])
    depth, rounds = math.ceil(math.log2(width)), [2**i for i in range(width.bit_length())]
    seconds = sum(
        depth * (cost.state_bytes / machine.bandwidth + cost.dtypes * machine.latency)
        for cost in costs.values()
    )
    found: dict[int, _Exchanged] = {}
    for block in blocks:
        sent, received = [0.0] * width, [0.0] * width
        for team in teams:
            size = sum(costs[name].state_bytes for name in team.peers)
            root = next(place for place, rank in enumerate(block) if rank in _span(team))
            for place, at in itertools.product(range(width), rounds):
                # Counted from the root, those before ``at`` have them, and send them that far on.
                step = (place - root) % width
                sent[place] += size * (step < at and step + at < width)
            for place in range(width):
                received[place] += size * (place != root)
        for rank, out, into in zip(block, sent, received, strict=True):
            found[rank] = _Exchanged(out / every, into / every, seconds / every)
    return [found[rank] for rank in sorted(found)]


def _span(team: Team) -> range:
    """Return the processes of a team, which are consecutive."""
    return range(team.ranks[0], team.ranks[-1] + 1)


# ---------------------------------------------------------------- in words


def _named(ranks: Mapping[str, Sequence[int]]) -> str:
    if len({tuple(held) for held in ranks.values()}) == 1:
        return "every peer in every process"
    return ", ".join(f"{name} on {ranges(held)}" for name, held in ranks.items())


def _milliseconds(prediction: Prediction) -> str:
    return f"{1e3 * prediction.step_seconds:.0f} ms"
