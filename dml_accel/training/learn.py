"""Train your own modules on your own images, and iterate over the results, from Python.

    learn             everything is looked at and refused here, before the first record
    _without_folder   no files are written
    _in_folder        the folder of a run, with checkpoints: as ``train`` does, for a caller

Shape letters: N images, B rows of a batch, C channels, H and W pixels, K classes.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import is_compiled_module
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dml_accel.core.config import Config
from dml_accel.core.errors import StoppedError, UsageError
from dml_accel.core.updates import UPDATE_SCHEDULES
from dml_accel.core.versions import Caller, call_text
from dml_accel.data.augment import parse_augment
from dml_accel.data.given import Given, plan_batches, read_given, refuse_different
from dml_accel.data.images import check_batch_size
from dml_accel.data.selection import training_sizes
from dml_accel.data.sources import Source
from dml_accel.data.splits import Fingerprint, SplitPrint, sha256
from dml_accel.data.stream import Batches
from dml_accel.distributed.batchnorm import check_spanning
from dml_accel.distributed.launch import (
    Stop,
    check_launch,
    launched_precision,
    launched_processes,
    launched_rank,
    restarts,
    runs_on_cpu,
    share_cores,
)
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.build import (
    parameter_count,
    refuse_shared,
    refuse_twins,
    require_learning,
)
from dml_accel.models.optim import check_optimizers
from dml_accel.models.own_network import OwnNetwork, kind_of, layout_of
from dml_accel.models.own_optim import OptimizerOf, check_own_optimizer
from dml_accel.models.peer_folder import load_network
from dml_accel.models.rehearsal import logits_problem, require_trainable
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.averages import refuse_uncopied
from dml_accel.mutual.links import read_links
from dml_accel.mutual.teachers import read_teachers
from dml_accel.training import progress, resume, trackers
from dml_accel.training.loop import (
    CheckpointRecord,
    EvaluationRecord,
    Record,
    StepRecord,
    fit,
    steps_to_take,
)
from dml_accel.training.rates import Schedule, factor_of
from dml_accel.training.record import Recorder
from dml_accel.training.resume import LEARN, Origin
from dml_accel.training.run_folder import CHECKPOINTS, RunFolder, SavedRun, explaining_stop
from dml_accel.training.setup import (
    Checked,
    Own,
    Prepared,
    check_exchange,
    check_pauses,
    make_cohort,
    prepare_images,
    refuse_idle,
    refuse_other_files,
    require_validation,
)
from dml_accel.training.train import conclude, take_all_steps

__all__ = ["Config", "EvaluationRecord", "Images", "StepRecord", "UsageError", "learn"]

Images = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any] | Iterable[tuple[Tensor, Tensor]]
Records = Generator[StepRecord | EvaluationRecord, None, None]
# What Accelerate puts on a network to compute in half precision.
_OF_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")
# Names of networks that name files.
_A_NAME = re.compile(r"\w[\w.-]{0,99}")

# Flags that say nothing here, by the reason.
_OF_COMMANDS = {
    "learn is given networks": ("cohort",),
    "learn is given images, and reads none": (
        *("dataset", "dataset_config", "image_column", "label_column", "train_split"),
        *("test_split", "val_split", "test_fraction", "image_size", "eval_resize", "crop_mode"),
        *("bad_images", "feed"),
    ),
    "learn trains every network in every process": ("measure",),
    "learn starts no processes; accelerate launch does": ("processes",),
}
_OF_A_FOLDER = ("resume", "save_every", "keep_checkpoints", "log_with")
_OF_LABELS = (
    *("train_limit", "val_fraction", "labelled_fraction", "class_weights"),
    *("mixup", "cutmix"),
)
_OF_LEVELS = ("augment", "mean", "std", "images_on")
_OF_OPTIMIZERS = (
    *("optimizer", "opt_args", "lr", "lr_min", "momentum", "weight_decay"),
    *("wd_exclude_norm_bias", "peer_opt"),
)
_OF_SCHEDULES = (
    *("lr_schedule", "lr_step", "lr_milestones", "lr_gamma", "lr_min", "lr_power", "lr_every"),
    "warmup",
)


def learn(
    modules: Mapping[str, nn.Module],
    train: Images,
    test: Images,
    config: Config | None = None,
    *,
    val: Images | None = None,
    optimizer: OptimizerOf | None = None,
    schedule: Schedule | None = None,
    steps_per_epoch: int | None = None,
    **flags: Any,
) -> Records:
    """Train networks together, with the recipe and the method of ``config`` or of ``flags``.

    Before the first record every network predicts and goes backward once, on copies or without a
    trace, so that what the first step would trip over is refused at once.

    Args:
        modules: by name, each from images to logits [B, K]; trained in place, on the device that
            Accelerate finds. Untrained, unless their weights differ; they share nothing.
        train: what to train on:
            a pair of tensors, images and labels [N] int64: images are uint8 [N, H, H, 3],
            augmented and normalised as the flags say, or floating of any shape, used as they are;
            a ``Dataset`` of (image, label), whose order and draws are keyed by the seed;
            a ``DataLoader``, or anything that yields batches (images, labels) each time it is
            iterated, which is read as it comes: its batch size is that of the run.
        test: images of the same shape, in any of these forms, to report on.
        config: see ``dml-accel train --help``; cohort and data set have no meaning here.
        val: images to choose weights by (``keep="best"``, ``early_stop``).
        optimizer: returns the optimizer of a network, in place of the flags. It is called to check
            it, and again when the network is on its device.
        schedule: returns the factor of the learning rates by optimizer step, from 0.
        steps_per_epoch: how many batches are an epoch, if ``train`` has no ``len()`` or an epoch
            shall be shorter.
        flags: those of ``config``, as keywords: ``epochs=5, output_dir="runs/mine"``. With
            ``output_dir`` a run folder with checkpoints is written.

    Yields:
        A record per optimizer step, and one per evaluation; the last is an evaluation. Losses stay
        on the device, with rows in the order of the sorted names.

    Raises:
        UsageError: at once, before the first record: what is given does not fit together. While
            it trains: a batch does not fit.
        DivergedError: a peer has diverged.
        StoppedError: with ``output_dir``: a signal has stopped it, after a checkpoint.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError("learn cannot train under torch.inference_mode(): leave it first")
    config, named = _settled(config, flags)
    modules = _modules(modules)
    _refuse_without_effect(config, named, optimizer is not None, schedule is not None)
    splits = {"train": read_given("train", train), "test": read_given("test", test)}
    splits |= {} if val is None else {"val": read_given("val", val)}
    for given in splits.values():
        refuse_different(given, splits["train"])
    _refuse_for_images(config, named, splits)
    per_epoch, notes = None, list[str]()
    if splits["train"].is_batches:
        plan = plan_batches(splits["train"], named.get("batch_size"), steps_per_epoch)
        config, per_epoch, notes = (
            config.changed(batch_size=plan.batch_size),
            plan.per_epoch,
            plan.notes,
        )
    elif steps_per_epoch is not None:
        raise UsageError(
            "steps_per_epoch= is for batches: here the number of images and batch_size say it"
        )
    require_validation(config, has_split=val is not None)
    check_launch(config.numerics, config.compute, config.optim)
    if config.compute.memory_format is None:
        # The caller's networks may rely on the usual layout, as Tensor.view does. bf16 on a CPU
        # always had the other one, which is much faster there.
        half = launched_precision(config.numerics) == "bf16" and runs_on_cpu(config.compute)
        config = config.changed(memory_format="channels_last" if half else "contiguous")
    share_cores(config.compute)
    with _bare(modules):
        source, config = _check(modules, splits, per_epoch, config)
        made = {
            name: check_own_optimizer(optimizer, name, module)
            for name, module in modules.items()
            if optimizer is not None
        }
    if schedule is not None:
        factor_of(schedule, 0)
    words = splits["train"].words
    facts = {f"weights of {name}": layout_of(module) for name, module in modules.items()}
    facts |= {f"optimizer of {name}": text for name, text in made.items()}
    facts |= {"train": words, "schedule": "of learn" if schedule is not None else "by flags"}
    networks = {
        name: OwnNetwork(kind_of(module), splits["train"].shape, len(source.classes))
        for name, module in modules.items()
    }
    own = Own(networks, words, {LEARN: True, **facts})
    checked = _checked(modules, source, config, own, by_flags=optimizer is None)
    job = _Job(modules, checked, config, optimizer, schedule, notes, call_text("learn", named))
    if config.run.output_dir is None:
        return _without_folder(job)
    return _in_folder(*_with_folder(job))


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class _Job:
    """What a call of ``learn`` has asked for, after it was looked at.

    Attributes:
        modules: the networks.
        checked: the same as a run has it.
        config: of the run.
        optimizer: makes that of each network; None: by the flags.
        schedule: of the learning rates; None: by the flags.
        notes: what the caller should know.
        text: the call, for the record.
    """

    modules: Mapping[str, nn.Module]
    checked: Checked
    config: Config
    optimizer: OptimizerOf | None
    schedule: Schedule | None
    notes: list[str]
    text: str

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        trained, _ = training_sizes(len(self.checked.source.train), self.config.data)
        return steps_to_take(self.config.optim, trained)

    def print(self, *lines: str) -> None:
        """Print lines in the first process."""
        for line in lines if launched_rank() == 0 else ():
            print(line, file=sys.stderr, flush=True)


@torch.enable_grad()  # whatever the caller does between two records
def _without_folder(job: _Job) -> Records:
    processes = Processes(job.config.numerics, job.config.compute)
    try:
        with processes.watching(), _bare(job.modules):
            job.print(*job.notes)
            ready = _prepare(job, processes, Path(), Origin())
            yield from _shown(processes, _fit(ready, job))
            processes.free_networks()
            processes.close(keeps_group=True)
    finally:
        processes.stop_heartbeat()
        processes.accelerator.release()


@torch.enable_grad()
def _in_folder(job: _Job, folder: RunFolder | None, finished: str) -> Records:
    """Train in the folder of a run; a finished one is loaded and evaluated, and left as it is.

    Args:
        job: what is trained.
        folder: in the first process.
        finished: in the first process, that all steps were taken before; empty if they were not.
    """
    config, writes = job.config, folder is not None and not finished
    with (
        explaining_stop(folder, Caller(job.text, in_python=True), resume="auto"),
        Stop(in_python=True) as stop,
        folder if folder and writes else contextlib.nullcontext(),
    ):
        origin = Origin()
        if folder:
            origin = resume.find_origin(config, job.checked)
            _print_origin(job, origin, folder, finished)
        processes = Processes(config.numerics, config.compute)
        stop.listen()
        if folder and writes:
            folder.set_running(origin.state.get("step", 0))
        try:
            watching = processes.watching(folder.fail if folder and writes else None)
            with watching, _bare(job.modules):
                finished = processes.broadcast_text(finished)
                path = Path(processes.broadcast_text(str(folder.path.resolve()) if folder else ""))
                origin = origin.agreed(processes)
                _print_again(job, origin)
                progress.forget_peak_memory(processes.device)
                ready = _prepare(job, processes, path, origin)
                if finished:
                    yield from _shown(processes, _fit(ready, job))
                else:
                    recorder = Recorder(folder, ready, job.text, "", None) if folder else None
                    records = take_all_steps(ready, recorder, stop, "resume='auto'", job.schedule)
                    last = yield from _shown(processes, records)
                    conclude(ready, recorder, last)
                processes.free_networks()
                processes.close(keeps_group=True)
        finally:
            processes.stop_heartbeat()
            processes.accelerator.release()


def _fit(ready: Prepared, job: _Job) -> Iterator[Record]:
    return fit(ready.cohort, ready.images, job.config.run, ready.start, schedule=job.schedule)


def _shown(
    processes: Processes, records: Iterator[Record]
) -> Generator[StepRecord | EvaluationRecord, None, EvaluationRecord]:
    """Yield the records that a caller sees; return the last evaluation."""
    last: EvaluationRecord | None = None
    for record in records:
        if not isinstance(record, CheckpointRecord):
            last = record if isinstance(record, EvaluationRecord) else last
            with processes.looking_away():  # the caller may keep it as long as they like
                yield record
    assert last is not None, "the last step is evaluated"
    return last


def _prepare(job: _Job, processes: Processes, path: Path, origin: Origin) -> Prepared:
    """Place and load what this process trains with; all processes do, together."""
    config, checked = job.config, job.checked
    refuse_other_files(checked, processes)
    ranks = everywhere(job.modules, processes.world_size)
    placement = Placement(processes, ranks, config.numerics.batch_norm)
    images = prepare_images(config, checked.source, placement.device, processes.world_size)
    for module in job.modules.values():
        module.train()
        if config.numerics.float64:
            module.double()
    if images.train.shape is None and checked.own is not None:  # uint8 images
        networks = {
            name: dataclasses.replace(one, normalisation=images.normalisation)
            for name, one in checked.own.networks.items()
        }
        checked = dataclasses.replace(
            checked, own=dataclasses.replace(checked.own, networks=networks)
        )
    cohort = make_cohort(
        config,
        checked.specs,
        dict(job.modules),
        images,
        placement,
        frozen=checked.frozen,
        links=checked.links,
        to_compile=checked.names if config.compute.compile == "on" else (),
        optimizer=job.optimizer,
    )
    resume.load_peers(origin, cohort.peers, processes)
    return Prepared(
        config,
        path,
        checked,
        cohort,
        images,
        placement.union(peer.name for peer in cohort.peers if is_compiled_module(peer.net)),
        {name: parameter_count(module) for name, module in job.modules.items()},
        origin.start(path / CHECKPOINTS),
        origin.path is not None,
    )


# ---------------------------------------------------------------- the folder


def _with_folder(job: _Job) -> tuple[_Job, RunFolder | None, str]:
    """Return the folder of a run in the first process, and whether it holds the whole run already.

    Raises:
        UsageError: the folder holds another run, or files of something else; nothing was written.
    """
    config, names = job.config, job.checked.names
    for name, module in job.modules.items():
        if not _A_NAME.fullmatch(name):
            raise UsageError(
                f"modules[{name!r}]: with output_dir= a name is that of files, and must consist of "
                "letters, digits, '_', '-' and '.'"
            )
        kept = module.state_dict()
        if wrong := [one for one, value in kept.items() if not isinstance(value, Tensor)]:
            raise UsageError(f"{name}: {wrong[0]} of its state_dict is no tensor, and is not saved")
    trackers.resolve(config.run.log_with)
    # What readers of a run's folder find in place of the data set and the cohort of the flags.
    own = job.checked.own
    config = config.changed(cohort=tuple(names), dataset=own.images if own else "")
    job = dataclasses.replace(job, config=config)
    if launched_rank() != 0:
        return job, None, ""
    folder = RunFolder(config.run.output_dir, "", resume.resumes_in_place(config))
    nothing = resume.nothing_to_do(config, job.checked.source, folder.path, job.steps)
    if nothing and not SavedRun(folder.path).is_done:
        if restarts():
            raise StoppedError(nothing)
        raise UsageError(f"{nothing}; raise epochs or max_steps")
    return job, folder, nothing


def _print_origin(job: _Job, origin: Origin, folder: RunFolder, finished: str) -> None:
    """Say what a run resumes from, and refuse a checkpoint of more steps than are asked for."""
    taken = origin.state.get("step", 0)
    if taken > job.steps:
        raise UsageError(
            f"{origin.path} has already taken {taken} steps, but {job.steps} are asked for; raise "
            "epochs or max_steps"
        )
    if finished:
        job.print(f"{folder.path} has taken all of its {taken} steps: its weights are loaded")
    elif origin.path:
        job.print(f"resuming from {origin.path}")
    else:
        folder.print_restart()


def _print_again(job: _Job, origin: Origin) -> None:
    """Say what is not exact, and how many batches of the caller's are read again."""
    job.print(*job.notes)
    source, optim = job.checked.source, job.config.optim
    if not isinstance(source.train.images, Batches):
        return
    update = UPDATE_SCHEDULES[job.config.method.update]
    taken = origin.state.get("step", 0) * update.batches_per_step(len(job.modules))
    epoch, again = divmod(taken, len(source.train) // optim.batch_size)
    if again and origin.state.get("step", 0) < job.steps:
        job.print(
            f"reading {again} batches of epoch {epoch + 1} again, up to where the run goes on"
        )


@contextlib.contextmanager
def _bare(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Take away what Accelerate has put on networks, and at the end put back what was there.

    Else a network would compute in the precision of an earlier call, or of another accelerator.
    """
    before = []
    kinds = [(part, type(part)) for module in modules.values() for part in module.modules()]
    for module in modules.values():
        own = vars(module)
        before.append((own, {name: own[name] for name in _OF_ACCELERATE if name in own}))
        own.pop("_is_accelerate_prepared", None)
        if "_original_forward" in own:
            own["forward"] = own.pop("_original_forward")
    try:
        yield
    finally:
        for own, had in before:
            for name in _OF_ACCELERATE:
                own.pop(name, None)
            own.update(had)
        for part, kind in kinds:
            if type(part) is not kind:  # a batch norm that spanned processes, or summed in blocks
                part.__class__ = kind


# ---------------------------------------------------------------- what was asked for


def _settled(config: Config | None, flags: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Return the configuration, and the flags that were given or differ from their default.

    Raises:
        UsageError: ``config`` is none, a keyword is no flag, or both say different things.
    """
    if config is not None and not isinstance(config, Config):
        raise UsageError(
            f"config is a {type(config).__name__}; it must be a Config, as Config(epochs=5) is"
        )
    usual = Config().as_dict()
    chosen = {n: v for n, v in config.as_dict().items() if v != usual[n]} if config else {}
    for name in flags.keys() & chosen.keys():
        if Config(**{name: flags[name]}).as_dict()[name] != chosen[name]:
            raise UsageError(
                f"{name} is {chosen[name]!r} in config and {flags[name]!r} as a keyword: give it "
                "once"
            )
    config = Config(**{**chosen, **flags})
    values = config.as_dict()
    return config, {n: v for n, v in values.items() if n in flags or v != usual[n]}


def _modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the networks by name.

    Raises:
        UsageError: they are not a mapping from names to bare networks, or none.
    """
    if isinstance(modules, nn.ModuleDict):
        modules = dict(modules.items())
    if not isinstance(modules, Mapping):
        raise UsageError(f"modules is a {type(modules).__name__}; it must map names to networks")
    for name, module in modules.items():
        if not (isinstance(name, str) and isinstance(module, nn.Module)):
            raise UsageError(
                f"modules[{name!r}] is a {type(module).__name__}; names must be text, and networks "
                "torch.nn.Module"
            )
        if is_compiled_module(module):
            raise UsageError(
                f"{name} is compiled: give the network itself, and Config(compile='on')"
            )
    if not modules:
        raise UsageError("modules is empty; at least one network is needed")
    return dict(modules)


def _refuse_without_effect(
    config: Config, named: Mapping[str, Any], has_optimizer: bool, has_schedule: bool
) -> None:
    """Refuse flags that say nothing in ``learn``, or nothing beside what else is given.

    Args:
        config: of the run.
        named: flags that were given.
        has_optimizer: whether the optimizers are the caller's.
        has_schedule: whether the schedule is.
    """

    def refuse(names: Iterable[str], why: str) -> None:
        for name in names:
            if name in named:
                raise UsageError(f"Config({name}={named[name]!r}): {why}")

    for why, names in _OF_COMMANDS.items():
        refuse(names, why)
    if config.run.output_dir is None:
        if config.run.keep != "last":
            refuse(["keep"], "without output_dir= learn leaves the last weights")
        refuse(_OF_A_FOLDER, "without output_dir= learn writes no files")
    if config.compute.placement == "split":
        refuse(["placement"], "learn trains every network in every process")
    if config.compute.compile == "auto":
        refuse(["compile"], "learn compiles only where it is told to: say on or off")
    if has_optimizer:
        refuse(_OF_OPTIMIZERS, "optimizer= makes the optimizers: say it there")
    if has_schedule:
        refuse(_OF_SCHEDULES, "schedule= says the learning rates: leave one of them out")


def _refuse_for_images(
    config: Config, named: Mapping[str, Any], splits: Mapping[str, Given]
) -> None:
    """Refuse flags that say nothing for images of the given kinds."""
    train = splits["train"]
    if train.held is None:
        for name in filter(named.__contains__, _OF_LABELS):
            raise UsageError(
                f"Config({name}={named[name]!r}) needs images and labels as tensors: those of a "
                f"{train.kind} are not known before they are read"
            )
    if not train.is_augmented:
        for name in filter(named.__contains__, _OF_LEVELS):
            if name == "augment" and config.data.augment == ("none",):
                continue
            raise UsageError(
                f"Config({name}={named[name]!r}): floating images are used as they are; give uint8 "
                "tensors [N, H, H, 3], or leave it out"
            )
    if "workers" in named and not any(one.kind == "Dataset" for one in splits.values()):
        raise UsageError(
            f"Config(workers={config.compute.workers}): workers read a Dataset, and there is none; "
            "those of a DataLoader are its own"
        )
    if "val" in splits and config.data.val_fraction:
        raise UsageError("val= and val_fraction are both given: leave one of them out")


# ---------------------------------------------------------------- what fits


def _check(
    modules: Mapping[str, nn.Module],
    splits: Mapping[str, Given],
    per_epoch: int | None,
    config: Config,
) -> tuple[Source, Config]:
    """Return the images as a run has them, and the configuration with their size.

    Args:
        modules: the networks.
        splits: the images.
        per_epoch: batches of an epoch, if they are the caller's.
        config: of the run.

    Raises:
        UsageError: networks and images do not fit each other.
    """
    train = splits["train"]
    parse_augment(config.data.augmentation)
    if not train.is_augmented and config.data.cutmix and len(train.shape) != 3:
        raise UsageError(
            f"Config(cutmix={config.data.cutmix:g}) needs images [N, C, H, W]; these are "
            f"[N, {', '.join(map(str, train.shape))}]: mixup takes any shape"
        )
    if train.is_augmented:
        config = config.changed(image_size=train.shape[-1])
    dtype = torch.float64 if config.numerics.float64 else torch.float32
    for name, module in modules.items():
        require_trainable(name, module, dtype)
    half = torch.bfloat16 if launched_precision(config.numerics) == "bf16" else None
    shown = train.shown.cpu()
    classes = _count_classes(modules, shown[:1], dtype, half)
    for name, given in splits.items():
        if given.held is None:
            continue
        least, most = int(given.held.labels.min()), int(given.held.labels.max())
        if least < 0 or most >= classes:
            raise UsageError(
                f"{name} has labels from {least} to {most}; the networks have {classes} classes, "
                f"0 to {classes - 1}"
            )
    refuse_shared(modules)
    for name, module in modules.items():
        require_learning(
            name,
            module,
            shown.to(_device(module)),
            classes,
            config.optim.smallest_micro_batch,
            launched_processes() if config.numerics.batch_norm == "local" else 1,
            dtype=dtype,
            autocast=half,
            all_used=launched_processes() > 1,
        )
        if launched_processes() > 1 and config.numerics.batch_norm == "group":
            check_spanning(module, name)
    if config.optim.ema is not None or config.method.exchange_every > 1:
        refuse_uncopied(modules)
    return _source(splits, classes, per_epoch, config), config


def _source(
    splits: Mapping[str, Given], classes: int, per_epoch: int | None, config: Config
) -> Source:
    """Return the images as a run has them; with a folder, tensors have a fingerprint."""
    size, names = config.optim.batch_size, tuple(map(str, range(classes)))
    made = {
        name: one.split(classes, size, per_epoch if name == "train" else None)
        for name, one in splits.items()
    }
    prints = {
        name: SplitPrint.of(one.held.labels, classes, sha256(_bytes_of(one.held.held)))
        for name, one in splits.items()
        if one.held is not None and config.run.output_dir is not None
    }
    return Source(
        made["train"],
        made["test"],
        names,
        Fingerprint(names, prints) if prints else None,
        val=made.get("val"),
        val_name="val" if "val" in made else None,
        feed=(LEARN, splits["train"].words),
    )


def _bytes_of(images: Tensor) -> Tensor:
    """Return images in a dtype that numpy has."""
    return images.view(torch.int16) if images.dtype == torch.bfloat16 else images


def _checked(
    modules: Mapping[str, nn.Module], source: Source, config: Config, own: Own, by_flags: bool
) -> Checked:
    """Return the run after the checks that it shares with ``train``.

    Args:
        modules: the networks.
        source: the images.
        config: of the run.
        own: what is the caller's.
        by_flags: whether the flags make the optimizers.
    """
    names = list(modules)
    check_batch_size(source, config.data, config.optim.batch_size)
    if by_flags:
        check_optimizers(config.optim, names)
    check_pauses(config, len(modules))
    check_exchange(config, source, len(modules))
    frozen = read_teachers(config.method.frozen_peers, source.classes, config.data.size)
    if frozen and not isinstance(source.train.images, Tensor):
        raise UsageError(
            "Config(frozen_peers=...) needs uint8 tensors, normalised for each teacher"
        )
    if frozen and source.train.held.is_floating_point():
        raise UsageError("Config(frozen_peers=...) needs uint8 images, normalised for each teacher")
    teachers = {name: load_network(folder) for name, folder in frozen.items()}
    refuse_shared({**modules, **teachers})
    refuse_twins(modules)
    links = read_links(config.method.links, names, list(frozen))
    refuse_idle(config, names, list(frozen), links)
    specs = [PeerSpec(name, type(net).__name__) for name, net in modules.items()]
    return Checked(specs, source, {}, frozen, links, {}, config.method.registered, own)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _count_classes(
    modules: Mapping[str, nn.Module],
    image: Tensor,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> int:
    """Return the number of classes of the networks, from their logits for one image."""
    found = {}
    for name, module in modules.items():
        reason, found[name] = logits_problem(
            module, image.to(_device(module)), dtype=dtype, autocast=autocast
        )
        if reason.startswith("returns shape"):
            raise UsageError(
                f"networks must return logits [1, classes] for one image: {name} {reason}"
            )
        if reason:
            reason = reason.removeprefix("fails: ")
            raise UsageError(f"{name} cannot take images {list(image.shape)}: {reason}")
    if len(set(found.values())) > 1:
        raise UsageError(f"networks must return logits of the same classes; they return {found}")
    return next(iter(found.values()))
