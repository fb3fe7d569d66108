"""What ``dml-accel plan`` prints: the cost of both placements, without training."""

from collections.abc import Sequence
from dataclasses import dataclass

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.data import sources
from dml_accel.data.augment import parse_augment
from dml_accel.data.catalogue import DIGITS, Listed, find_folder
from dml_accel.data.loader import seconds_to_decode
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.device import choose_device
from dml_accel.distributed.plan import (
    SECONDS_TO_DECODE,
    Machine,
    StepLoad,
    choose,
    predict_both,
    timed_as_a_whole,
)
from dml_accel.distributed.plan_tables import (
    Assumptions,
    Scale,
    plan_text,
    scales,
    scaling_text,
)
from dml_accel.models.optim import check_optimizers
from dml_accel.models.spec import PeerSpec, parse_cohort
from dml_accel.training.setup import (
    Modules,
    build_networks,
    count_all,
    refuse_alone,
    step_load,
    with_times,
)

# Data sets of which the classes are known without asking the hub: by the column of the labels.
_CLASSES = {
    "uoft-cs/cifar10": {"label": 10},
    "uoft-cs/cifar100": {"fine_label": 100, "coarse_label": 20},
}


@dataclass(frozen=True)
class Question:
    """What a plan is asked, besides the flags of a run.

    Attributes:
        worlds: numbers of processes.
        classes: of the images; None: those of the data set.
        seconds: of a step of the whole cohort in one process, measured elsewhere; None if not.
        machine: the assumed rates.
    """

    worlds: Sequence[int]
    classes: int | None
    seconds: float | None
    machine: Machine


def plan(config: Config, asked: Question) -> tuple[str, list[Scale]]:
    """Return what both placements cost, and the step on each number of processes.

    One number of processes is described process by process, several in a row each.

    Args:
        config: cohort, images, batch, precision and exchange.
        asked: processes, classes and rates.

    Raises:
        UsageError: a network, an optimizer or an augmentation cannot be had, or the classes are not
            known.
    """
    parse_augment(config.data.augmentation)
    config, listed = _listed(config)
    basis = _basis(config, asked, listed)
    placement, schedule = config.compute.placement, config.method.schedule
    loads, costs, machine = basis.loads, basis.costs, basis.machine
    found = scales(asked.worlds, costs, loads, placement, schedule, machine)
    if len(asked.worlds) > 1:
        return scaling_text(found, loads[1], placement, basis.words, machine), found
    (world,) = asked.worlds
    _, why = choose(costs[world], world, loads[world], placement, schedule, machine)
    both = predict_both(costs[world], world, loads[world], machine)
    return plan_text(both, why, loads[world], placement, basis.words, machine), found


@dataclass(frozen=True)
class _Basis:
    """What is predicted from: steps and costs by number of processes, also for one; rates."""

    loads: dict[int, StepLoad]
    costs: dict[int, dict[str, Cost]]
    machine: Machine
    words: Assumptions


def _basis(config: Config, asked: Question, listed: Listed | None) -> _Basis:
    compute, machine = config.compute, asked.machine
    classes = _classes(config, asked.classes, listed)
    specs = parse_cohort(config.cohort)
    refuse_alone(config, len(specs))
    check_optimizers(config.optim, [spec.name for spec in specs])
    modules = build_networks(config, specs, classes)
    decoding, how = SECONDS_TO_DECODE, "assumed"
    if listed is not None and compute.measure and compute.feed == "loader":
        decoding, how = seconds_to_decode(config.data, listed), "timed on this machine"
    loads = {
        world: step_load(config, classes, compute.feed, world, decoding)
        for world in {1, *asked.worlds}
    }
    counted = count_all(config, modules)
    computing = f"{machine.macs_per_second / 1e9:.0f} billion multiply-accumulates per second"
    computing += " and process"
    if asked.seconds is not None:
        counted, machine = timed_as_a_whole(counted, loads[1], machine, asked.seconds)
        computing = (
            f"{1e3 * asked.seconds:g} ms for a step of the cohort in one process, which its peers "
            "share by their multiply-accumulates"
        )
    costs = dict.fromkeys(loads, counted)
    if compute.measure:
        costs = _measured(config, specs, modules, counted, sorted(loads))
        computing = "networks timed on this machine"
    decodes = f"{1e3 * decoding:.1f} ms of a core to decode an image ({how})"
    words = Assumptions(
        config.data.size,
        computing,
        timed=compute.measure or asked.seconds is not None,
        decoding=decodes if loads[1].decoding else "",
    )
    return _Basis(loads, costs, machine, words)


def _measured(
    config: Config,
    specs: list[PeerSpec],
    modules: Modules,
    costs: dict[str, Cost],
    worlds: Sequence[int],
) -> dict[int, dict[str, Cost]]:
    """Return the costs with times measured here, by number of processes."""
    device = choose_device(config.compute.cpu)
    if device.type == "cpu":  # where an image takes as long among few as among many
        return dict.fromkeys(worlds, with_times(costs, specs, modules, config, device, 1))
    return {world: with_times(costs, specs, modules, config, device, world) for world in worlds}


def _listed(config: Config) -> tuple[Config, Listed | None]:
    """Return the configuration with the size of a local folder's images, and these."""
    if find_folder(config.data.dataset) is None:
        return config, None
    listed = sources.list_images(config.data, quiet=True)
    return sources.sized(config, listed, quiet=True), listed


def _classes(config: Config, asked: int | None, listed: Listed | None) -> int:
    """Return the number of classes, which ``--classes`` must not contradict."""
    data = config.data
    if listed is not None:
        known: int | None = len(listed.classes)
    elif data.dataset == DIGITS:
        known = 10
    else:
        columns = _CLASSES.get(data.dataset, {})
        known = columns.get(data.label_column or next(iter(columns), ""))
    if known is None and asked is None:
        column = f" in --label-column {data.label_column}" if data.label_column else ""
        raise UsageError(
            f"plan does not look at the hub, and does not know how many classes --dataset "
            f"{data.dataset} has{column}: give --classes"
        )
    if known is not None and asked not in (None, known):
        raise UsageError(
            f"--classes {asked} contradicts --dataset {data.dataset}, which has {known} classes: "
            "drop --classes"
        )
    return known or asked or 0
