"""Train your own modules on your own tensors, and iterate over the results. No files are written.

Shape letters: N images, C channels, H and W pixels, K classes.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils.other import is_compiled_module
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.data.augment import parse_augment
from dml_accel.data.images import check_batch_size
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from dml_accel.distributed.batchnorm import check_spanning
from dml_accel.distributed.launch import (
    check_launch,
    launched_precision,
    launched_processes,
    share_cores,
)
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.build import refuse_shared, refuse_twins, require_learning
from dml_accel.models.optim import check_optimizers
from dml_accel.models.peer_folder import PeerFolder, load_network
from dml_accel.models.rehearsal import logits_problem, require_trainable
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.averages import refuse_uncopied
from dml_accel.mutual.links import LinkWeights, read_links
from dml_accel.mutual.teachers import read_teachers
from dml_accel.training.loop import CheckpointRecord, EvaluationRecord, StepRecord, fit
from dml_accel.training.setup import (
    check_pauses,
    make_cohort,
    prepare_images,
    refuse_idle,
    require_validation,
)

__all__ = ["Config", "EvaluationRecord", "StepRecord", "UsageError", "learn"]

Labelled = tuple[Tensor, Tensor]
# Flags that name a folder or files, which ``learn`` does not have.
_FILE_FLAGS = ("output_dir", "resume", "log_with")
# Flags of images that are read from files.
_READING_FLAGS = (
    "feed",
    "workers",
    "bad_images",
    "val_split",
    "eval_resize",
    "crop_mode",
)
_AT_ONCE = 1024  # images looked at for values that are not finite
# What Accelerate puts on a network to compute in half precision.
_OF_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")


def learn(
    modules: Mapping[str, nn.Module],
    train: Labelled,
    test: Labelled,
    config: Config | None = None,
) -> Iterator[StepRecord | EvaluationRecord]:
    """Train networks together, with the recipe and the method of ``config``.

    Before the first record every network predicts and goes backward once, on copies or without a
    trace, so that what the first step would trip over is refused at once.

    Args:
        modules: by name, each from images to logits [B, K]; trained in place, on the device that
            Accelerate finds. Untrained, unless their weights differ; they share nothing.
        train: images and labels [N] int64, a pair of tensors on any device. Images are uint8
            [N, H, H, 3], augmented and normalised as ``config`` says, or floating of any shape,
            such as [N, C, H, W], used as they are.
        test: images of the same kind, and labels, to report on.
        config: see ``train.py --help``; cohort, data set and files have no meaning here.

    Yields:
        A record per optimizer step, and one per evaluation; the last is an evaluation. Losses stay
        on the device, with rows in the order of the sorted names.

    Raises:
        UsageError: at once, before the first record: modules, images and ``config`` do not fit.
        DivergedError: a peer has diverged.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise UsageError(
            f"config is a {_kind(config)}; it must be a Config, as Config(epochs=5) is"
        )
    if isinstance(modules, nn.ModuleDict):
        modules = dict(modules.items())
    if torch.is_inference_mode_enabled():
        raise UsageError("learn cannot train under torch.inference_mode(): leave it first")
    if not isinstance(modules, Mapping):
        raise UsageError(f"modules is a {type(modules).__name__}; it must map names to networks")
    for name, module in modules.items():
        if not (isinstance(name, str) and isinstance(module, nn.Module)):
            raise UsageError(
                f"modules[{name!r}] is a {_kind(module)}; names must be text, and networks "
                "torch.nn.Module"
            )
        if is_compiled_module(module):
            raise UsageError(
                f"{name} is compiled: give the network itself, and Config(compile='on')"
            )
    for name in _FILE_FLAGS:
        if value := getattr(config.run, name):
            raise UsageError(f"Config({name}={value!r}): learn writes no files")
    if config.run.keep != "last":
        raise UsageError(f"Config(keep={config.run.keep!r}): learn leaves the last weights")
    usual = Config().as_dict()
    for name in _READING_FLAGS:
        if (value := config.as_dict()[name]) != usual[name]:
            raise UsageError(f"Config({name}={value!r}): learn is given images, and reads none")
    require_validation(config, has_split=False)
    if config.compute.placement == "split":
        raise UsageError("Config(placement='split'): learn trains every network in every process")
    check_launch(config.numerics, config.compute, config.optim)
    share_cores(config.compute)
    with _bare(modules):
        source, config = _check(modules, train, test, config)
    check_batch_size(source, config.data, config.optim.batch_size)
    check_optimizers(config.optim, list(modules))
    check_pauses(config, len(modules))
    frozen = read_teachers(config.method.frozen_peers, source.classes, config.data.size)
    if frozen and source.train.held.is_floating_point():
        raise UsageError("Config(frozen_peers=...) needs uint8 images, normalised for each teacher")
    teachers = {name: load_network(folder) for name, folder in frozen.items()}
    refuse_shared({**modules, **teachers})
    refuse_twins(modules)
    links = read_links(config.method.links, list(modules), list(frozen))
    refuse_idle(config, list(modules), list(frozen), links)
    return _records(modules, source, config, frozen, links)


@torch.enable_grad()  # whatever the caller does between two records
def _records(
    modules: Mapping[str, nn.Module],
    source: Source,
    config: Config,
    frozen: Mapping[str, PeerFolder],
    links: LinkWeights | None,
) -> Iterator[StepRecord | EvaluationRecord]:
    processes = Processes(config.numerics, config.compute)
    try:
        with processes.watching(), _bare(modules):
            ranks = everywhere(modules, processes.world_size)
            placement = Placement(processes, ranks, config.numerics.batch_norm)
            images = prepare_images(config, source, placement.device)
            specs = [PeerSpec(name, type(net).__name__) for name, net in modules.items()]
            for module in modules.values():
                module.train()
                if config.numerics.float64:
                    module.double()
            cohort = make_cohort(
                config, specs, dict(modules), images, placement, frozen=frozen, links=links
            )
            for record in fit(cohort, images, config.run):
                if not isinstance(record, CheckpointRecord):
                    with processes.looking_away():  # the caller may keep it as long as they like
                        yield record
            processes.free_networks()
            processes.close(keeps_group=True)
    finally:
        processes.stop_heartbeat()
        processes.accelerator.release()


@contextlib.contextmanager
def _bare(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Take away what Accelerate has put on networks, and at the end put back what was there.

    Else a network would compute in the precision of an earlier call, or of another accelerator.
    """
    before = []
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


# ---------------------------------------------------------------- validation


def _check(
    modules: Mapping[str, nn.Module], train: Labelled, test: Labelled, config: Config
) -> tuple[Source, Config]:
    """Return the images, and the configuration with their size.

    Raises:
        UsageError: see the text.
    """
    if not modules:
        raise UsageError("modules is empty; at least one network is needed")
    splits = {"train": _as_split("train", train), "test": _as_split("test", test)}
    for name, split in splits.items():
        _check_split(name, split, splits["train"].held)
    shape, floating = splits["train"].held.shape[1:], splits["train"].held.is_floating_point()
    augment = config.data.augment
    if floating and augment not in (None, ("none",)):
        raise UsageError(
            f"Config(augment={augment!r}): floating images are used as they are; give uint8 "
            "images [N, H, H, 3], or augment='none'"
        )
    if floating and (config.data.mean or config.data.std):
        raise UsageError(
            "Config(mean=..., std=...): floating images are used as they are; give uint8 images"
        )
    parse_augment(config.data.augmentation)
    if floating and config.data.cutmix and len(shape) != 3:
        raise UsageError(
            f"Config(cutmix={config.data.cutmix:g}) needs images [N, C, H, W]; these are "
            f"[N, {', '.join(map(str, shape))}]: mixup takes any shape"
        )
    if floating and launched_processes() > 1 and list(shape) != [3, shape[-1], shape[-1]]:
        raise UsageError(f"several processes need images [N, 3, H, H]; these are [N, *{[*shape]}]")
    if not floating or launched_processes() > 1:
        config = config.changed(image_size=shape[1])
    dtype = torch.float64 if config.numerics.float64 else torch.float32
    for name, module in modules.items():
        require_trainable(name, module, dtype)
    shown = splits["train"].held[:2]
    shown = shown if floating else shown.permute(0, 3, 1, 2) / 255
    half = torch.bfloat16 if launched_precision(config.numerics) == "bf16" else None
    classes = _count_classes(modules, shown[:1], dtype, half)
    for name, split in splits.items():
        least, most = int(split.labels.min()), int(split.labels.max())
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
    if config.optim.ema is not None:
        refuse_uncopied(modules)
    return Source(splits["train"], splits["test"], tuple(map(str, range(classes)))), config


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _kind(value: object) -> str:
    """Return the type of a value, for messages: ``list of tensors``."""
    kind = type(value).__name__
    holds_tensors = isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)
    return f"{kind} of tensors" if holds_tensors else kind


def _as_split(name: str, given: Any) -> Split:
    """Return images and labels in the memory of the host, where both are measured and drawn."""
    takes = "learn takes a pair of tensors (images, labels)"
    if not (isinstance(given, tuple | list) and len(given) == 2):
        # By its type: a data set may have no end.
        hint, rows = takes, f"for image, label in {name}"
        if isinstance(given, TensorDataset):
            hint += f", such as {name}.tensors"
        elif isinstance(given, DataLoader):
            rows = f"for images, labels in {name}"
            hint += f": torch.cat([images {rows}]), torch.cat([labels {rows}])"
        elif isinstance(given, tuple | list) and not isinstance(next(iter(given), None), tuple):
            hint += f", and these are {len(given)}"
        elif isinstance(given, Dataset | tuple | list):
            hint += f": torch.stack([image {rows}]), torch.tensor([label {rows}])"
        raise UsageError(f"{name} is a {_kind(given)}; {hint}")
    for what, value in zip(("images", "labels"), given, strict=True):
        if not isinstance(value, Tensor):
            fix = f"torch.as_tensor({what})"
            if _kind(value) != type(value).__name__:
                fix = f"torch.stack({what})"
            raise UsageError(f"{name}: its {what} are a {_kind(value)}; {takes}: {fix}")
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            fix = f"{what}.to_dense()" if value.layout != torch.strided else f"torch.stack({what})"
            raise UsageError(
                f"{name}: its {what} are on the device meta, which holds no values"
                if value.is_meta
                else f"{name}: its {what} are not dense; {takes}: {fix}"
            )
    images, labels = given
    if images.requires_grad:
        raise UsageError(f"{name}: its images require gradients; give images.detach()")
    return Split(images.cpu(), labels.cpu())


def _check_split(name: str, split: Split, like: Tensor) -> None:
    images, labels = split.held, split.labels
    shown = f"images {list(images.shape)} and labels {list(labels.shape)} of {labels.dtype}"
    if images.dim() == 0 or len(images) == 0:
        raise UsageError(f"{name} has {shown}: at least one image is needed")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        fix = ""
        if labels.shape == (len(images), 1):
            fix = "; use labels[:, 0].long()"
        elif labels.dim() == 2 and len(labels) == len(images):
            fix = "; use labels.argmax(1)"
        elif labels.shape == images.shape[:1]:
            fix = "; use labels.long()"
        raise UsageError(f"{name} has {shown}; each image needs a label of torch.int64{fix}")
    square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
    if not images.is_floating_point() and not (images.dtype == torch.uint8 and square):
        fix = ": images / 255"
        if images.dtype != torch.uint8:
            fix = "" if images.is_complex() else ": images.float()"
        elif images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]:
            fix = ": images.permute(0, 2, 3, 1)"
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}; give uint8 images "
            f"[N, H, H, 3], or floating ones of any shape{fix}"
        )
    if images.shape[1:] != like.shape[1:] or images.dtype != like.dtype:
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}, but train has "
            f"{list(like.shape)} of {like.dtype}"
        )
    if images.is_floating_point():
        for start in range(0, len(images), _AT_ONCE):
            rows = images[start : start + _AT_ONCE]
            bad = ~rows.reshape(len(rows), rows[0].numel()).isfinite().all(1)
            if bad.any():
                row = start + int(bad.nonzero()[0])
                raise UsageError(f"{name}: image {row} has values that are not finite")


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
