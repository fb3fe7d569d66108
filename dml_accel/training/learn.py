"""Train your own modules on your own tensors, and iterate over the results. No files are written.

Shape letters: N images, C channels, H and W pixels, K classes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError, one_line
from dml_accel.data.batches import check_batch_size
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from dml_accel.distributed.batchnorm import check_spanning
from dml_accel.distributed.launch import check_launch, launched_processes, share_cores
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.build import refuse_twins
from dml_accel.models.peer_folder import PeerFolder
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.links import LinkWeights, read_links
from dml_accel.mutual.teachers import read_teachers
from dml_accel.training.loop import CheckpointRecord, EvaluationRecord, StepRecord, fit
from dml_accel.training.setup import make_cohort, prepare_images

__all__ = ["Config", "EvaluationRecord", "StepRecord", "UsageError", "learn"]

Labelled = tuple[Tensor, Tensor]
# Flags that name a folder or files, which ``learn`` does not have.
_FILE_FLAGS = ("output_dir", "resume", "log_with")


def learn(
    modules: Mapping[str, nn.Module],
    train: Labelled,
    test: Labelled,
    config: Config | None = None,
) -> Iterator[StepRecord | EvaluationRecord]:
    """Train networks together, with the recipe and the method of ``config``.

    Args:
        modules: by name, each from images to logits [B, K]; trained in place, on the device that
            Accelerate finds. Untrained, unless their weights differ.
        train: images and labels [N] int64, on any device. Images are uint8 [N, H, H, 3], augmented
            and normalised as ``config`` says, or floating of any shape, such as [N, C, H, W], used
            as they are.
        test: images of the same kind, and labels, to report on.
        config: see ``train.py --help``; cohort, data set and files have no meaning here.

    Yields:
        A record per optimizer step, and one per evaluation; the last is an evaluation. Losses stay
        on the device, with rows in the order of the sorted names.

    Raises:
        UsageError: at once, before the first record: modules, images and ``config`` do not fit.
        DivergedError: a peer has diverged.
    """
    config = config or Config()
    if not isinstance(modules, Mapping):
        raise UsageError(f"modules is a {type(modules).__name__}; it must map names to networks")
    for name in _FILE_FLAGS:
        if value := getattr(config.run, name):
            raise UsageError(f"Config({name}={value!r}): learn writes no files")
    if config.compute.placement == "split":
        raise UsageError("Config(placement='split'): learn trains every network in every process")
    check_launch(config.numerics, config.compute, config.optim)
    share_cores(config.compute)
    source, config = _check(modules, train, test, config)
    check_batch_size(source, config.data, config.optim.batch_size)
    frozen = read_teachers(config.method.frozen_peers, source.classes, config.data.image_size)
    if frozen and source.train.images.is_floating_point():
        raise UsageError("Config(frozen_peers=...) needs uint8 images, normalised for each teacher")
    links = read_links(config.method.links, list(modules), list(frozen))
    return _records(modules, source, config, frozen, links)


def _records(
    modules: Mapping[str, nn.Module],
    source: Source,
    config: Config,
    frozen: Mapping[str, PeerFolder],
    links: LinkWeights | None,
) -> Iterator[StepRecord | EvaluationRecord]:
    processes = Processes(config.numerics, config.compute)
    try:
        with processes.watching():
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
            processes.close()
    finally:
        processes.stop_heartbeat()


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
    splits = {"train": _on_host(*train), "test": _on_host(*test)}
    for name, split in splits.items():
        _check_split(name, split, splits["train"].images)
    shape, floating = splits["train"].images.shape[1:], splits["train"].images.is_floating_point()
    augment = config.data.augment
    if floating and augment not in (None, "none"):
        raise UsageError(
            f"Config(augment={augment!r}): floating images are used as they are; give uint8 "
            "images [N, H, H, 3], or augment='none'"
        )
    if floating and launched_processes() > 1 and list(shape) != [3, shape[-1], shape[-1]]:
        raise UsageError(f"several processes need images [N, 3, H, H]; these are [N, *{[*shape]}]")
    if not floating or launched_processes() > 1:
        config = config.changed(image_size=shape[1])
    classes = _count_classes(modules, splits["train"].images[:1])
    for name, split in splits.items():
        least, most = int(split.labels.min()), int(split.labels.max())
        if least < 0 or most >= classes:
            raise UsageError(
                f"{name} has labels from {least} to {most}; the networks have {classes} classes, "
                f"0 to {classes - 1}"
            )
    for name, module in modules.items():
        if launched_processes() > 1 and config.numerics.batch_norm == "group":
            check_spanning(module, name)
    refuse_twins(modules)
    return Source(splits["train"], splits["test"], tuple(map(str, range(classes)))), config


def _on_host(images: Tensor, labels: Tensor) -> Split:
    """Return images and labels in the memory of the host, where both are measured and drawn."""
    return Split(images.cpu(), labels.cpu())


def _check_split(name: str, split: Split, like: Tensor) -> None:
    images, labels = split.images, split.labels
    if len(labels) == 0 or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise UsageError(
            f"{name} has images {list(images.shape)} and labels {list(labels.shape)} of "
            f"{labels.dtype}; each image needs a label of torch.int64"
        )
    if images.shape[1:] != like.shape[1:] or images.dtype != like.dtype:
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}, but train has "
            f"{list(like.shape)} of {like.dtype}"
        )
    square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
    if not images.is_floating_point() and not (images.dtype == torch.uint8 and square):
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}; give uint8 images "
            "[N, H, H, 3], or floating ones of any shape"
        )


@torch.no_grad()
def _count_classes(modules: Mapping[str, nn.Module], image: Tensor) -> int:
    """Return the number of classes of the networks, from their logits for one image."""
    shapes: dict[str, Any] = {}
    for name, module in modules.items():
        weight = next(module.parameters(), None)
        if weight is None:
            raise UsageError(f"{name} has no parameters to train")
        x = image if image.is_floating_point() else image.permute(0, 3, 1, 2) / 255
        training = module.training
        module.eval()
        try:
            shapes[name] = list(module(x.to(weight)).shape)
        except Exception as error:  # whatever a user's network raises
            raise UsageError(
                f"{name} cannot take images {list(x.shape)}: {one_line(error)}"
            ) from error
        finally:
            module.train(training)
    first, *others = shapes.values()
    if len(first) != 2 or first[0] != 1 or first[1] < 2 or any(one != first for one in others):
        raise UsageError(f"networks must return logits [1, classes] for one image; these: {shapes}")
    return int(first[1])
