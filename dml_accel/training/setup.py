"""Validate a run, choose a placement, and put together what a process trains with.

    check          builds the networks; refuses what does not fit them or the images
    choose_processes  how many processes the command starts by itself
    choose_ranks   rank 0 chooses who trains which peer, and all processes learn it
    compiles       whether to compile, as asked or by a rule
    make_cohort    the peers of this process, wrapped for training

``train.py`` calls them in this order.
"""

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import is_compiled_module
from torch import nn

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.host import cores, is_on_hub
from dml_accel.core.versions import Caller
from dml_accel.data import sources
from dml_accel.data.batches import ImageFormat
from dml_accel.data.catalogue import Listed
from dml_accel.data.feeds import fits, reading_workers
from dml_accel.data.images import Data, Reading, check_batch_size, prepare
from dml_accel.data.memory import processes_here
from dml_accel.data.selection import training_sizes
from dml_accel.data.sources import Source
from dml_accel.data.workers import worker_count
from dml_accel.distributed import environment, rules
from dml_accel.distributed.batchnorm import check_spanning
from dml_accel.distributed.children import can_repeat
from dml_accel.distributed.compile import adds_up_in_pairs, has_compiler
from dml_accel.distributed.costs import Cost, count, timed
from dml_accel.distributed.device import choose_device
from dml_accel.distributed.launch import (
    launched_precision,
    launched_processes,
    runs_on_cpu,
    threads_each,
)
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import (
    SECONDS_TO_DECODE,
    Machine,
    Ranks,
    StepLoad,
    choose,
    everywhere,
    this_machine,
)
from dml_accel.distributed.processes import Processes
from dml_accel.distributed.rules import Work, processes_to_start
from dml_accel.distributed.wrap import Wrapper
from dml_accel.models.build import (
    build,
    memory_format,
    refuse_reused,
    refuse_shared,
    refuse_twins,
    require_learning,
)
from dml_accel.models.hub import name_of
from dml_accel.models.optim import check_optimizers, make_optimizer, state_per_parameter
from dml_accel.models.own_network import OwnNetwork
from dml_accel.models.own_optim import OptimizerOf, make_own_optimizer, rates_of
from dml_accel.models.peer_folder import PeerFolder, load_network
from dml_accel.models.pretrained import PretrainedWeights, read_weights, trained_size
from dml_accel.models.spec import PeerSpec, parse_cohort, registered_by
from dml_accel.mutual.averages import Average, copy_of, refuse_uncopied
from dml_accel.mutual.links import LinkWeights, read_links
from dml_accel.mutual.losses import balanced_weights
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.snapshots import Snapshots
from dml_accel.mutual.step import Cohort
from dml_accel.mutual.teachers import load_teachers, read_teachers
from dml_accel.mutual.teaching import Teaching
from dml_accel.training.loop import STEPS_BETWEEN_LOOKS, Start, steps_to_take

Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Own:
    """What a run of ``learn`` is of, besides its flags: networks and images of the caller's.

    Attributes:
        networks: what is recorded of each network, by name.
        images: what it is trained on, in words.
        facts: what a resumed run must share, by what messages call it.
    """

    networks: Mapping[str, OwnNetwork]
    images: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    """A run that was validated: its cohort, images and teachers, without the networks.

    Attributes:
        specs: the peers, in the order of the command line.
        source: the images.
        costs: of each peer, if there are several processes.
        frozen: folders of the frozen peers, by name.
        links: who learns from whom; None if all learn from all alike.
        starts: the trained weights that peers start from, by name, as they are recorded.
        registered: name and hash of the user's own divergence and target, as they are recorded.
        own: of a run of ``learn``; None for others.
    """

    specs: list[PeerSpec]
    source: Source
    costs: dict[str, Cost]
    frozen: dict[str, PeerFolder]
    links: LinkWeights | None
    starts: dict[str, Any]
    registered: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    own: Own | None = None

    @property
    def names(self) -> list[str]:
        """Names of the peers, in the order of the command line."""
        return [spec.name for spec in self.specs]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the images, as it is recorded."""
        return self.source.fingerprint.record() if self.source.fingerprint else {}

    @property
    def teachers(self) -> dict[str, Any]:
        """The content of the files that the flags name: sha256 of frozen peers, links by name."""
        frozen = {
            name: {"arch": folder.arch, "sha256": folder.sha256}
            for name, folder in self.frozen.items()
        }
        return {"frozen": frozen, "links": self.links}

    @property
    def hub_commits(self) -> dict[str, Any]:
        """The commits of frozen peers that are models of the hub, as they are recorded.

        They are no part of ``teachers``, because their sha256 alone says whether they changed.
        """
        named = {name: name_of(folder.path) for name, folder in self.frozen.items()}
        commits = {name: text for name, text in named.items() if is_on_hub(text)}
        return {"teachers_on_the_hub": commits} if commits else {}


@dataclass(frozen=True)
class Prepared:
    """All that one process of a run trains with.

    Attributes:
        config: of the run.
        path: of its folder.
        checked: its cohort and images.
        cohort: the peers of this process, and what they are trained with.
        images: all splits, on the device.
        compiled: names of all peers that are compiled, in any process.
        parameters: of each network.
        start: what the peers have behind them.
        resumes: whether the run comes from a checkpoint.
    """

    config: Config
    path: Path
    checked: Checked
    cohort: Cohort
    images: Data
    compiled: list[str]
    parameters: dict[str, int]
    start: Start
    resumes: bool

    @property
    def placement(self) -> Placement:
        """Which process trains what."""
        return self.cohort.placement


def check_pauses(config: Config, peers: int) -> None:
    """Refuse a schedule under which peers pause for fp16, and for other than two peers.

    Args:
        config: of the run.
        peers: how many are trained.
    """
    update = config.method.update
    if config.method.schedule.pauses and peers != 2:
        raise UsageError(f"--update {update} is made for two peers, not for {peers}")
    # Its loss scaler decides alone whether a step is taken.
    if config.method.schedule.pauses and launched_precision(config.numerics) == "fp16":
        raise UsageError(
            f"--update {update} leaves a peer out of a step, which the loss scaler of fp16 cannot: "
            "use --mixed-precision bf16 or no"
        )


def check_exchange(config: Config, source: Source, peers: int) -> None:
    """Refuse a KL term that would never begin, and weights that nobody would learn from.

    Args:
        config: of the run.
        source: its images.
        peers: how many are trained.
    """
    trained, _ = training_sizes(len(source.train), config.data)
    burn_in, steps = config.method.burn_in, steps_to_take(config.optim, trained)
    if burn_in and burn_in >= steps:
        raise UsageError(
            f"--burn-in {burn_in} is not below the {steps} steps of the run, so the KL term would "
            "never begin: lower it"
        )
    epochs, per_epoch = config.method.kl_warmup, trained // config.optim.batch_size
    whole = config.optim.epochs * per_epoch
    if burn_in and burn_in + epochs * per_epoch > whole:
        raise UsageError(
            f"--burn-in {burn_in} and --kl-warmup {epochs} are more than the {whole} steps of "
            f"--epochs {config.optim.epochs}, so the KL weight would never reach --kl-weight: "
            "lower one"
        )
    refuse_alone(config, peers)


def refuse_alone(config: Config, peers: int) -> None:
    """Refuse a stale exchange without anybody to exchange with.

    Args:
        config: of the run.
        peers: how many are trained.
    """
    every = config.method.exchange_every
    if every > 1 and peers == 1:
        raise UsageError(
            f"--exchange-every {every} is about what peers teach each other, and there is one: add "
            "a network to --cohort, or drop it"
        )


def refuse_idle(config: Config, names: Sequence[str], frozen: Sequence[str], links: Any) -> None:
    """Refuse a peer that learns neither from labels nor from anybody.

    Args:
        config: of the run.
        names: of the peers, in the order of the command line.
        frozen: names of the frozen peers.
        links: from ``read_links``.
    """
    if config.method.ce_weight > 0:
        return
    teaching = Teaching(config.method, names, frozen, links)
    idle = [name for name in names if not teaching.teachers_of(name)]
    if idle:
        raise UsageError(
            f"--ce-weight 0 leaves {', '.join(idle)} nothing to learn, because nobody teaches there"
        )


def image_format(config: Config, device: torch.device) -> ImageFormat:
    """Return what the networks of a run are given on a device."""
    asked, dtype = config.compute.memory_format, _dtype(config)
    # A network of somebody's own may rely on the usual layout, as Tensor.view does.
    if asked is None and any(registered_by(spec.arch) for spec in parse_cohort(config.cohort)):
        asked = "contiguous"
    # Where our batch norms are not compiled exactly in channels last, they are in the usual layout.
    compiled = config.compute.compile == "on" and _is_single(config)
    if asked is None and compiled and not adds_up_in_pairs():
        asked = "contiguous"
    layout = memory_format(asked, dtype, launched_precision(config.numerics), device)
    return ImageFormat(config.data.size, dtype, layout, device)


def layout_name(config: Config, device: torch.device) -> str:
    """Return the memory format of a run as ``--memory-format`` names it."""
    layout = image_format(config, device).layout
    return "channels_last" if layout == torch.channels_last else "contiguous"


def _is_single(config: Config) -> bool:
    """Whether networks compute in single precision only."""
    return _dtype(config) == torch.float32 and launched_precision(config.numerics) == "no"


def _dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.numerics.float64 else torch.float32


# ---------------------------------------------------------------- validation


def check(config: Config, source: Source, starts: bool = True) -> tuple[Checked, Modules]:
    """Build the networks; refuse a configuration that does not fit them or the images.

    Args:
        config: of the run.
        source: its images.
        starts: whether networks are given the trained weights that they start from. A run that
            resumes from a checkpoint does not need them, and they may be gone.

    Returns:
        The validated run, and a network for each peer. Whoever trains takes out the networks that
        it needs, so that the others can be freed.

    Raises:
        UsageError: see the text.
    """
    config.method.refuse_missing()
    registered = config.method.registered
    check_batch_size(source, config.data, config.optim.batch_size)
    specs, classes = parse_cohort(config.cohort), source.classes
    check_optimizers(config.optim, [spec.name for spec in specs])
    check_pauses(config, len(specs))
    check_exchange(config, source, len(specs))
    frozen = read_teachers(config.method.frozen_peers, classes, config.data.size)
    links = read_links(config.method.links, [spec.name for spec in specs], list(frozen))
    refuse_idle(config, [spec.name for spec in specs], list(frozen), links)
    # Refused now if they cannot be built.
    teachers = {name: load_network(folder) for name, folder in frozen.items()}
    weights = {
        spec.name: read_weights(spec.arch, spec.start)
        for spec in specs
        if starts and spec.start is not None
    }
    modules = build_networks(config, specs, len(classes), weights)
    refuse_shared({**modules, **teachers})
    refuse_reused(modules)
    refuse_twins(modules)
    if config.optim.ema is not None or config.method.exchange_every > 1:
        refuse_uncopied(modules)
    world_size, costs = launched_processes(), {}
    if world_size > 1:
        costs = count_all(config, modules)
        load = step_load(config, len(classes), source.feed[0], processes_here())
        ranks, _ = _choose(config, costs, world_size, load, this_machine())
        _check_batch_norm(config, modules, ranks, len(classes))
    recorded = {name: one.record() for name, one in weights.items()}
    return Checked(specs, source, costs, frozen, links, recorded, registered), modules


def require_validation(config: Config, has_split: bool) -> None:
    """Refuse to choose an epoch without images for validation.

    Args:
        config: of the run.
        has_split: whether the data set has a split for it.
    """
    chooses = {"--keep best": config.run.keep == "best"}
    chooses[f"--early-stop {config.optim.early_stop}"] = config.optim.early_stop is not None
    for name, on in chooses.items():
        if on and not has_split and not config.data.val_fraction:
            raise UsageError(
                f"{name} needs --val-fraction above 0, or a --val-split, and there is none: the "
                "test split is for reporting only"
            )


def build_networks(
    config: Config,
    specs: Sequence[PeerSpec],
    classes: int,
    weights: Mapping[str, PretrainedWeights] | None = None,
) -> Modules:
    """Build the network of each peer, with the trained weights that some of them start from."""
    layout = image_format(config, choose_device(runs_on_cpu(config.compute))).layout
    return {
        spec.name: build(
            spec,
            classes=classes,
            image_size=config.data.size,
            seed=config.seed,
            dtype=_dtype(config),
            smallest_micro_batch=config.optim.smallest_micro_batch,
            weights=(weights or {}).get(spec.name),
            layout=layout,
        )
        for spec in specs
    }


def count_all(config: Config, modules: Modules) -> dict[str, Cost]:
    """Return what each network costs, counted."""
    return {
        name: dataclasses.replace(
            count(module, config.data.size),
            optimizer_state=state_per_parameter(config.optim.of_peer(name)),
        )
        for name, module in modules.items()
    }


def refuse_other_files(checked: Checked, processes: Processes) -> None:
    """Refuse images, weights, teachers, links or sources that differ from those of rank 0.

    Raises:
        UsageError: raised in all processes; the text names a rank.
    """
    starts = {name: start.get("sha256") for name, start in checked.starts.items()}
    feed = _rank_that_differs(checked.source.feed[0], processes)
    if feed is not None:
        raise UsageError(
            f"--feed auto chooses another feed on rank {feed} than on rank 0, because their "
            "machines differ in memory: name one with --feed"
        )
    images = _rank_that_differs(checked.fingerprint, processes)
    if images is not None:
        raise UsageError(
            f"rank {images} reads other images, labels or class names than rank 0 for --dataset: "
            "all machines need the same files"
        )
    rank = _rank_that_differs([starts, checked.teachers], processes)
    if rank is not None:
        raise UsageError(
            f"rank {rank} reads other files than rank 0 for pretrained=, --frozen-peers or "
            "--links; all machines need the same files"
        )
    other = _rank_that_differs(checked.registered, processes)
    if other is not None:
        raise UsageError(
            f"rank {other} has another source of the registered divergence or target than rank 0: "
            "all machines need the same file"
        )


def _rank_that_differs(record: Any, processes: Processes) -> int | None:
    """Return the highest rank whose record is not that of rank 0; None if there is none."""
    ours = json.dumps(record)
    return processes.failed_rank(processes.broadcast_text(ours) != ours)


def print_starts(checked: Checked) -> None:
    """Print which trained weights peers start from, one line per peer."""
    classes = len(checked.source.classes)
    for name, start in checked.starts.items():
        classifier = f"; including its classifier of {classes} classes"
        if start["classes"] != classes:
            classifier = f"; with a new classifier: {classes} classes, not {start['classes']}"
        print(f"{name} starts from {start['source']}{classifier}", file=sys.stderr, flush=True)


def _check_batch_norm(config: Config, modules: Modules, ranks: Ranks, classes: int) -> None:
    size, images = config.data.size, config.optim.smallest_micro_batch
    for name, module in modules.items():
        processes = len(ranks[name])
        if processes == 1:
            continue
        if config.numerics.batch_norm == "group":
            check_spanning(module, name)
        elif images // processes == 1:
            with torch.random.fork_rng(devices=[]):
                noise, dtype = torch.rand(2, 3, size, size), _dtype(config)
            require_learning(name, module, noise, classes, images, processes, dtype=dtype)


# ---------------------------------------------------------------- placement


def processes_without_rule(config: Config, caller: Caller, recorded: int | None) -> int | None:
    """Return how many processes the command starts for training; 1: it trains in this one.

    None if a rule has to decide (see ``distributed.rules``).

    Args:
        config: of the run, or of several.
        caller: who asks for it.
        recorded: the number of a run that is resumed; None for a new one.
    """
    compute, usable = config.compute, cores()
    if environment.starter() is not None:  # this is one of them
        return 1
    if compute.own_processes is not None:
        return compute.own_processes
    if caller.in_python or environment.has_launcher() or not runs_on_cpu(compute):
        return 1
    threads = compute.threads or environment.threads()
    if recorded is not None:
        return recorded if recorded * (threads or 1) <= usable else 1
    if threads or usable == 1 or compute.measure or compute.placement == "replicate":
        return 1
    return None if can_repeat(caller.arguments) else 1


def processes_by_rule(config: Config, source: Source, costs: Mapping[str, Cost], steps: int) -> int:
    """Return how many processes train fastest, of those into which the images fit together.

    Args:
        config: of the run, or of several.
        source: the images.
        costs: of the networks.
        steps: optimizer steps in all.
    """
    load = step_load(config, len(source.classes), source.feed[0], processes_here())
    count = processes_to_start(Work(costs, load, steps), config.method.schedule, cores())
    # Each of them has the images in its memory, or none.
    images = len(source.train) + len(source.test)
    return count if source.feed[0] != "memory" or fits(count * images, config.data.size) else 1


def choose_processes(
    config: Config, checked: Checked, modules: Modules, caller: Caller, recorded: int | None
) -> int:
    """Return how many processes the command starts for a run; 1: it trains in this one.

    Args:
        config: of the run.
        checked: its images.
        modules: its networks.
        caller: who asks for it.
        recorded: see ``processes_without_rule``.
    """
    fixed = processes_without_rule(config, caller, recorded)
    if fixed is not None:
        return fixed
    trained, _ = training_sizes(len(checked.source.train), config.data)
    steps = steps_to_take(config.optim, trained)
    return processes_by_rule(config, checked.source, count_all(config, modules), steps)


def print_processes(config: Config, count: int) -> None:
    """Print how many processes the command starts, if nobody has named the number."""
    if config.compute.own_processes is None:
        threads = threads_each(config.compute, count)
        print(
            f"processes: {count} of {threads} thread{'s' * (threads > 1)} each, each for a part of "
            "the cohort (--processes 1 for one)",
            file=sys.stderr,
            flush=True,
        )


def _choose(
    config: Config, costs: dict[str, Cost], world_size: int, load: StepLoad, machine: Machine
) -> tuple[Ranks, str]:
    asked, schedule = config.compute.placement, config.method.schedule
    # The rule has started these processes for parts of the cohort.
    by_rule = environment.starter() is not None and config.compute.own_processes is None
    if asked == "auto" and by_rule:
        ranks, text = choose(costs, world_size, load, "split", schedule, machine)
        return ranks, text.removeprefix("as asked, ")
    return choose(costs, world_size, load, asked, schedule, machine)


def step_load(
    config: Config,
    classes: int,
    feed: str,
    processes: int,
    decoding: float = SECONDS_TO_DECODE,
) -> StepLoad:
    """Return what a step computes and decodes, on a machine with so many processes."""
    if feed != "loader":
        return StepLoad.of(config, classes)
    on_cpu = choose_device(config.compute.cpu).type == "cpu"
    workers = worker_count(config.compute.workers, on_cpu, cores(), processes)
    return StepLoad.of(config, classes, decoding, workers)


def choose_ranks(
    config: Config,
    checked: Checked,
    modules: Modules,
    processes: Processes,
    path: Path,
    recorded: Ranks | None = None,
) -> Ranks:
    """Return rank 0's choice of who trains which peer, in every process.

    Args:
        config: of the run.
        checked: its peers and their costs.
        modules: their networks.
        processes: those that share the work.
        path: the run folder, where processes write their peers.
        recorded: the choice of the run that this one repeats, which is made again.

    Raises:
        UsageError: a process does not see the run folder but would have to write there.
    """
    if processes.world_size == 1:
        return everywhere(checked.names, 1)
    blind = processes.failed_rank(not (path / "run.lock").exists())
    if blind is not None:
        if config.compute.placement == "split":
            raise UsageError(
                f"rank {blind} does not see {path}, where it would have to write its peers under "
                "--placement split; name an --output-dir that all machines share, or use "
                "--placement replicate"
            )
        if processes.rank == 0 and config.compute.placement == "auto":
            print(
                f"placement: replicate, because rank {blind} does not see {path}", file=sys.stderr
            )
        config, recorded = config.changed(placement="replicate"), None
    text = json.dumps(recorded)
    if processes.rank == 0 and recorded:
        print("placement: that of the run that is repeated", file=sys.stderr, flush=True)
    elif processes.rank == 0:
        costs = checked.costs
        if config.compute.measure:
            size = processes.world_size
            costs = with_times(costs, checked.specs, modules, config, processes.device, size)
        source, world_size = checked.source, processes.world_size
        load = step_load(config, len(source.classes), source.feed[0], processes_here())
        ranks, why = _choose(config, costs, world_size, load, this_machine())
        print(f"placement: {why}", file=sys.stderr, flush=True)
        text = json.dumps(ranks)
    ranks = json.loads(processes.broadcast_text(text))
    _check_batch_norm(config, modules, ranks, len(checked.source.classes))
    return ranks


def with_times(
    costs: dict[str, Cost],
    specs: list[PeerSpec],
    modules: Modules,
    config: Config,
    device: torch.device,
    world_size: int,
) -> dict[str, Cost]:
    """Return the costs with the time of each network, measured on this device."""
    precision, images = launched_precision(config.numerics), image_format(config, device)
    seconds = timed(specs, modules, config.optim, precision, images, world_size)
    return {name: dataclasses.replace(cost, seconds=seconds[name]) for name, cost in costs.items()}


# ---------------------------------------------------------------- images and peers


def list_and_size(
    config: Config, cohorts: Sequence[Sequence[str]], quiet: bool
) -> tuple[Config, Listed | None]:
    """List the images of a run, and choose their size if the configuration leaves it open.

    Args:
        config: of the run, or of several that differ in seed, method and cohort.
        cohorts: of those runs, as ``--cohort`` names them.
        quiet: show no progress.

    Returns:
        The configuration with an image size, and the images; None for digits.

    Raises:
        UsageError: see ``sources.list_images``.
    """
    listed = sources.list_images(config.data, quiet)
    require_validation(config, listed is not None and "val" in listed.splits)
    specs = [spec for cohort in cohorts for spec in parse_cohort(cohort)]
    sizes = [trained_size(spec.arch) for spec in specs if spec.start is not None]
    wanted = max((size for size in sizes if size), default=None)
    return sources.sized(config, listed, wanted, quiet), listed


def prepare_images(
    config: Config, source: Source, device: torch.device, processes: int = 1
) -> Data:
    """Return the splits of a run on a device, in its dtype and memory layout.

    Args:
        config: of the run.
        source: its images.
        device: of this process.
        processes: of the run.
    """
    on_cpu = device.type == "cpu"
    reading = Reading(
        reading_workers(config.compute, on_cpu),
        config.compute.images_on,
        # Where processes look at each other's requests less often, damage is known earlier.
        1 if on_cpu or processes == 1 else STEPS_BETWEEN_LOOKS,
    )
    return prepare(source, config.data, config.seed, image_format(config, device), reading)


def make_cohort(
    config: Config,
    specs: Sequence[PeerSpec],
    modules: Modules,
    images: Data,
    placement: Placement,
    *,
    frozen: Mapping[str, PeerFolder] | None = None,
    links: LinkWeights | None = None,
    to_compile: Collection[str] = (),
    optimizer: OptimizerOf | None = None,
) -> Cohort:
    """Return the peers of this process, and what they are trained with.

    Args:
        config: of the run.
        specs: all peers, in the order of the command line, in which they take turns.
        modules: their networks; those that are trained here are taken out.
        images: of the run.
        placement: which peers and rows are ours.
        frozen: folders of the frozen peers, by name.
        links: who learns from whom; None if all learn from all alike.
        to_compile: names of the peers to compile.
        optimizer: makes that of each network, in place of the flags.
    """
    frozen, processes = frozen or {}, placement.processes
    format_, mode = image_format(config, placement.device), config.compute.compile_mode
    format_ = dataclasses.replace(format_, shape=images.train.shape)
    wrapper = Wrapper(placement, config.optim, format_, mode)
    teaching = Teaching(
        config.method,
        [spec.name for spec in specs],
        list(frozen),
        links,
        exchange=config.compute.exchange,
        exchange_dtype=config.numerics.exchange_dtype,
    )
    copies = {}
    if teaching.by_snapshots:  # before those that are trained here are moved to the device
        copies = {name: copy_of(module, name) for name, module in sorted(modules.items())}
    peers = []
    for spec in sorted(specs, key=lambda spec: spec.name):
        if spec.name in placement.mine:
            module = modules.pop(spec.name)
            copy = None if config.optim.ema is None else copy_of(module, spec.name)
            net = wrapper.wrap(module, spec.name, spec.name in to_compile)
            keeps = is_compiled_module(net) and mode != "default"
            if optimizer is None:
                own = make_optimizer(module, config.optim.of_peer(spec.name))
            else:
                own = make_own_optimizer(optimizer, module)
            peer = Peer(spec, module, net, own, processes.loss_scaler(), keeps)
            peer.rates = () if optimizer is None else rates_of(own)
            if copy is not None and config.optim.ema is not None:
                peer.average = Average(wrapper.place(copy), module, config.optim.ema)
            peers.append(peer)
    snapshots = None
    if copies:
        snapshots = Snapshots(
            {name: wrapper.place(copy) for name, copy in copies.items()},
            {peer.name: peer.module for peer in peers},
            placement,
            config.method,
        )
        for peer in peers:
            peer.snapshot = snapshots.of[peer.name]
    return Cohort(
        peers,
        load_teachers(frozen, images.normalisation, format_, processes),
        images.train,
        placement,
        teaching,
        config.optim,
        config.method.update,
        config.seed,
        config.compute.low_memory,
        config.data.label_smoothing,
        _class_weights(config, images, format_),
        snapshots,
    )


def _class_weights(config: Config, images: Data, format_: ImageFormat) -> torch.Tensor | None:
    """Return the weights of ``--class-weights`` on the device; None for 1."""
    if config.data.class_weights == "none":
        return None
    weights = balanced_weights(images.train.label_counts(len(images.classes)).cpu())
    return weights.to(format_.dtype).to(format_.device)


# ---------------------------------------------------------------- compilation


def compiles(
    config: Config, checked: Checked, modules: Modules, placement: Placement, steps: int
) -> bool:
    """Return whether to compile: as asked, or for ``auto`` if any process gains by it.

    Args:
        config: of the run.
        checked: its peers.
        modules: their networks.
        placement: who trains what.
        steps: optimizer steps to come, of this run or of several equal ones.
    """
    if config.compute.compile != "auto":
        return config.compute.compile == "on"
    saved = seconds_saved(config, checked, modules, placement, steps)
    return gains(saved, placement.processes)


def gains(saved: float, processes: Processes) -> bool:
    """Return whether compiling saves any process some seconds; all processes say the same."""
    return bool(processes.all_reduce_max(saved > 0 and has_compiler()))


def seconds_saved(
    config: Config, checked: Checked, modules: Modules, placement: Placement, steps: int
) -> float:
    """Return the seconds that compiling this process's peers is expected to save, by a fixed rule.

    0 where it is known to save nothing, or was not measured.
    """
    mine = {spec.name: spec for spec in checked.specs if spec.name in placement.mine}
    measured = _is_single(config) and placement.device.type == "cpu" and adds_up_in_pairs()
    if not (placement.is_alone and measured):
        return 0.0
    source = checked.source
    costs = count_all(config, {name: modules[name] for name in mine})
    load = step_load(config, len(source.classes), source.feed[0], processes_here())
    kinds = {name: repr((spec.arch, spec.arguments)) for name, spec in mine.items()}
    return rules.seconds_saved(Work(costs, load, steps), kinds, torch.get_num_threads())
