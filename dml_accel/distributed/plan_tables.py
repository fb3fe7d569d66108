"""A plan in tables and words: one number of processes in detail, or several in a row each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dml_accel.core.tables import ranges, table
from dml_accel.core.updates import UpdateSchedule
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.plan import (
    Machine,
    Prediction,
    StepLoad,
    choose,
    everywhere,
    predict,
    predict_both,
)

# Processes that are alike but do not follow each other are listed in at most so many ranges.
_MOST_RANGES = 4


@dataclass(frozen=True)
class Assumptions:
    """What a plan rests on, in words.

    Attributes:
        image_size: pixels per side.
        computing: how the time of the networks is known.
        timed: whether that was measured.
        decoding: how the time to decode an image is known; empty if none is decoded.
    """

    image_size: int
    computing: str
    timed: bool
    decoding: str = ""

    def text(self, load: StepLoad, machine: Machine) -> str:
        """Return what is measured and what is assumed."""
        measured = [self.computing] if self.timed else []
        assumed = [] if self.timed else [self.computing]
        if machine.start:
            assumed.append(f"{1e6 * machine.start:.3g} us to start an operation")
        if self.decoding:
            assumed.append(self.decoding)
        assumed.append(
            f"{machine.bandwidth / 1e9:g} GB/s, {1e6 * machine.latency:g} us per message"
        )
        form = "along a tree, 2 log2 n" if machine.trees else "around a ring, 2 (n - 1)"
        whose = "NCCL's" if machine.trees else "gloo's"
        return (
            f"{load.images} images of {self.image_size} pixels per step, {load.classes} classes\n"
            f"measured: {', '.join(measured) or 'nothing'}\n"
            f"assumed: {', '.join(assumed)}, all-reduces {form} messages for n processes, as "
            f"{whose};\n"
            "an idle machine, equal processes, nothing sent while something is computed, and half "
            f"the rows take half the time{' above that of the starts' if machine.start else ''}.\n"
            f"Memory is {_copies_in_words(load)} and {_computing_in_words(machine)}."
        )


# ---------------------------------------------------------------- one number of processes


def plan_text(
    predictions: tuple[Prediction, Prediction],
    why: str,
    load: StepLoad,
    asked: str,
    assumptions: Assumptions,
    machine: Machine,
) -> str:
    """Return tables of both placements, process by process, and which one is chosen.

    Args:
        predictions: for ``replicate`` and for ``split``.
        why: the choice in one line.
        load: of a step.
        asked: ``--placement``.
        assumptions: what the numbers rest on.
        machine: the assumed rates.
    """
    parts = []
    headers = ("process", "peers", "rows", "busy ms", "idle %", "sends kB", "receives kB", "MB")
    for kind, found in zip(("replicate", "split"), predictions, strict=True):
        parts.append(
            f"{kind}: {1e3 * found.step_seconds:.1f} ms per step\n\n"
            + table(_processes(found), headers, "simple", left=2)
            + _decoding_in_words(found, load)
        )
    parts.append(assumptions.text(load, machine))
    parts.append(f"--placement {asked}: {why}")
    return "\n\n".join(parts)


def _processes(found: Prediction) -> list[list[str]]:
    """Return a row for all processes that are alike."""
    peers: list[list[str]] = [[] for _ in found.busy]
    for name, held in found.ranks.items():
        for rank in held:
            peers[rank].append(name)
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, (busy, idle) in enumerate(zip(found.busy, found.idle, strict=True)):
        cells = (
            " ".join(peers[rank]),
            str(found.rows[rank]),
            f"{1e3 * busy:.1f}",
            f"{100 * idle:.0f}",
            f"{found.sent[rank] / 1e3:.1f}",
            f"{found.received[rank] / 1e3:.1f}",
            f"{found.memory[rank] / 1e6:.0f}",
        )
        alike.setdefault(cells, []).append(rank)
    return [[_which(held), *cells] for cells, held in alike.items()]


def _which(ranks: Sequence[int]) -> str:
    """Return which processes these are; how many and between which, if they are in many pieces."""
    text = ranges(ranks)
    if text.count(" ") < _MOST_RANGES:
        return text
    return f"{len(ranks)} of {ranks[0]}-{ranks[-1]}"


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
    kept += ["weights of all peers at the last exchange"] * load.is_stale
    return ", ".join(kept)


def _computing_in_words(machine: Machine) -> str:
    if not machine.temporaries:
        return "activations, without images, libraries and what these work with"
    beside = f"{machine.temporaries} tensors like the largest of these for what is computed"
    return f"activations, with {beside}; without images and libraries"


# ---------------------------------------------------------------- several numbers of processes


@dataclass(frozen=True)
class Scale:
    """A step on so many processes.

    Attributes:
        world_size: processes.
        batch_size: the smallest of which every process has a row.
        both: predictions for ``replicate`` and ``split``; None if the batch is too small.
        chosen: the one that is chosen.
        images_per_second: by it.
        efficiency: images per second and process, as a share of those of a single process.
    """

    world_size: int
    batch_size: int
    both: tuple[Prediction, Prediction] | None = None
    chosen: Prediction | None = None
    images_per_second: float = 0.0
    efficiency: float = 0.0


def scales(
    worlds: Sequence[int],
    costs: Mapping[int, Mapping[str, Cost]],
    loads: Mapping[int, StepLoad],
    asked: str,
    schedule: UpdateSchedule,
    machine: Machine,
) -> list[Scale]:
    """Return a step on each number of processes.

    Args:
        worlds: numbers of processes.
        costs: of each peer, by number of processes, also for one.
        loads: of a step, by number of processes, also of one.
        asked: ``--placement``.
        schedule: the update schedule.
        machine: rates.
    """
    alone = predict(everywhere(costs[1], 1), costs[1], loads[1], machine)
    of_one = loads[1].images / alone.step_seconds
    found = []
    for world in worlds:
        load = loads[world]
        needed = world * len(load.micro_batches)
        if min(load.micro_batches) < world:
            found.append(Scale(world, needed))
            continue
        both = predict_both(costs[world], world, load, machine)
        ranks, _ = choose(costs[world], world, load, asked, schedule, machine)
        chosen = predict(ranks, costs[world], load, machine)
        rate = load.images / chosen.step_seconds
        found.append(Scale(world, needed, both, chosen, rate, rate / world / of_one))
    return found


def scaling_text(
    found: Sequence[Scale], load: StepLoad, asked: str, assumptions: Assumptions, machine: Machine
) -> str:
    """Return a table with a row for each number of processes, and what it rests on.

    Args:
        found: from ``scales``.
        load: of a step.
        asked: ``--placement``.
        assumptions: what the numbers rest on.
        machine: the assumed rates.
    """
    headers = (
        "processes",
        "placement",
        "replicate ms",
        "split ms",
        "rows",
        "images/s",
        "efficiency %",
        "receives kB",
        "sends kB",
        "MB",
        "exchange kB",
        "exchange %",
    )
    text = table([_scale_cells(one) for one in found], headers, "simple", left=2)
    return (
        f"{text}\n\n"
        f"--placement {asked}: a step takes the time of the placement in its row.\n"
        "rows: of a process, the least and the most\n"
        "kB and MB: of a step, for the process that has most\n"
        "efficiency: images per second, over those of as many single processes\n"
        "exchange: received from processes of other peers, and the share of the step for that\n\n"
        f"{assumptions.text(load, machine)}"
    )


def _scale_cells(one: Scale) -> list[str]:
    chosen = one.chosen
    if one.both is None or chosen is None:
        needs = f"batch too small: --batch-size {one.batch_size}"
        return [str(one.world_size), needs, *[""] * 10]
    least, most = min(chosen.rows), max(chosen.rows)
    return [
        str(one.world_size),
        chosen.kind,
        *(f"{1e3 * placed.step_seconds:.1f}" for placed in one.both),
        str(most) if least == most else f"{least}-{most}",
        f"{one.images_per_second:.0f}",
        f"{100 * one.efficiency:.1f}",
        f"{max(chosen.received) / 1e3:.1f}",
        f"{max(chosen.sent) / 1e3:.1f}",
        f"{max(chosen.memory) / 1e6:.0f}",
        f"{max(chosen.exchanged) / 1e3:.1f}",
        f"{100 * chosen.exchange / chosen.step_seconds:.1f}",
    ]
