"""From Python: networks and images of one's own in, records out. Nothing is written.

Shape letters: N images, C channels, H and W pixels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dml_accel.core.config import Config, UsageError
from dml_accel.data import batches as data
from dml_accel.data.batches import Data, ImageSet, Normalisation
from dml_accel.data.decode import Split
from dml_accel.data.sources import Source
from dml_accel.distributed.allocation import everywhere
from dml_accel.distributed.batchnorm import check_spanning
from dml_accel.distributed.launch import check_launch, launched_processes, share_cores
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.models import build as building
from dml_accel.models import peer_folder as frozen
from dml_accel.models import spec as cohort
from dml_accel.models.peer_folder import PeerFolder
from dml_accel.models.spec import Peer, PeerSpec
from dml_accel.mutual import links
from dml_accel.mutual.teaching import Teaching
from dml_accel.training.loop import CheckpointRecord, EvaluationRecord, StepRecord, fit

__all__ = ["Config", "EvaluationRecord", "StepRecord", "UsageError", "learn"]

Labelled = tuple[Tensor, Tensor]
# What names a folder or files; there are none here.
_OF_FOLDERS = ("output_dir", "resume", "log_with")


class Tensors(ImageSet):
    """Floating images of any shape as they are: shuffled, and neither augmented nor normalised.

    Args:
        split: ``images`` [N, ...] floating.
        seed: keys the order.
        device: where batches are made.
        dtype: of the images in a batch.
        labelled: rows whose labels are used, int64; None for all.
    """

    def __init__(
        self,
        split: Split,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        labelled: Tensor | None = None,
    ) -> None:
        self._images = split.images.to(device, dtype)
        self._set_labels(split.labels, labelled, device)
        self._augment, self._pad, self._seed, self._dtype = "none", 0, seed, dtype

    def batch(self, step: int, batch_size: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return rows ``lo`` to ``hi`` of the batch that optimizer step ``step`` uses."""
        return self.at(self._rows_of(step, batch_size)[lo:hi])

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at some places in stored order, int64."""
        rows = rows.to(self._device)
        return self._images[rows], self._labels[rows]


def learn(
    modules: Mapping[str, nn.Module],
    train: Labelled,
    test: Labelled,
    config: Config | None = None,
) -> Iterator[StepRecord | EvaluationRecord]:
    """Train networks together, by what ``config`` says of the recipe and of the method.

    Args:
        modules: by name, each mapping images to logits [B, K]; trained in place, on the device
            that Accelerate finds. Untrained, unless their weights differ.
        train: images and labels [N] int64. Images are uint8 [N, H, H, 3], augmented and normalised
            as ``config`` says, or floating of any shape, such as [N, C, H, W]: these are taken as
            they are.
        test: to report on; images of the same kind.
        config: see ``train.py --help``; what it says of cohort, data set and files has no meaning
            here.

    Yields:
        A record per optimizer step, and one per evaluation; the last is an evaluation. Losses stay
        on the device, rows in the order of the sorted names.

    Raises:
        UsageError: at once, before the first record: modules, images and ``config`` do not fit.
        DivergedError: a peer is lost.
    """
    config = config or Config()
    if not isinstance(modules, Mapping):
        raise UsageError(f"modules is a {type(modules).__name__}; it must map names to networks")
    for name in _OF_FOLDERS:
        if getattr(config, name):
            raise UsageError(f"Config({name}={getattr(config, name)!r}): learn writes no files")
    if config.placement == "split":
        raise UsageError("Config(placement='split'): learn has every network in every process")
    check_launch(config)
    share_cores(config)
    source, config = _source(modules, train, test, config)
    data.check_sizes(source, config)
    folders = frozen.read_all(config.frozen_peers, source.classes, config.image_size)
    if folders and source.train.images.is_floating_point():
        raise UsageError("Config(frozen_peers=...) needs uint8 images, to normalise them for each")
    weights = links.read(config.links, list(modules), list(folders))
    teaching = Teaching(config, list(modules), list(folders), weights)
    return _records(modules, source, config, teaching, folders)


def _records(
    modules: Mapping[str, nn.Module],
    source: Source,
    config: Config,
    teaching: Teaching,
    folders: dict[str, PeerFolder],
) -> Iterator[StepRecord | EvaluationRecord]:
    processes = Processes(config)
    try:
        with processes.watching():
            placement = Placement(config, processes, everywhere(modules, processes.world_size))
            images = _prepare(source, config, placement.device)
            peers = [_peer(name, net, config, placement) for name, net in modules.items()]
            teachers = frozen.prepare(folders, images, config, placement)
            for record in fit(peers, images, config, placement, None, None, teaching, teachers):
                if not isinstance(record, CheckpointRecord):
                    yield record
            processes.release_networks()
            processes.close()
    finally:
        processes.stop_beating()


def _peer(name: str, module: nn.Module, config: Config, placement: Placement) -> Peer:
    module.double() if config.float64 else module
    net = placement.prepare(module.train())
    spec = PeerSpec(name, type(module).__name__)
    return Peer(spec, module, net, cohort.optimizer(module, config), placement.scaler())


def _prepare(source: Source, config: Config, device: torch.device) -> Data:
    if not source.train.images.is_floating_point():
        return data.prepare(source, config, device)
    train, val = data.held_out(source, config)
    dtype = torch.float64 if config.float64 else torch.float32

    def tensors(split: Split, labelled: Tensor | None = None) -> Tensors:
        return Tensors(split, config.seed, device, dtype, labelled)

    return Data(
        tensors(train, data.labelled_rows(train, config)),
        tensors(val) if val else None,
        tensors(source.test),
        source.classes,
        Normalisation((0.0,) * 3, (1.0,) * 3),
    )


# ---------------------------------------------------------------- what is refused


def _source(
    modules: Mapping[str, nn.Module], train: Labelled, test: Labelled, config: Config
) -> tuple[Source, Config]:
    """Return the images, and the configuration with their size.

    Raises:
        UsageError: see the text.
    """
    if not modules:
        raise UsageError("modules is empty; at least one network is needed")
    splits = {"train": Split(*train), "test": Split(*test)}
    for name, split in splits.items():
        _check_split(name, split, splits["train"].images)
    shape, floating = splits["train"].images.shape[1:], splits["train"].images.is_floating_point()
    if floating and config.augment not in (None, "none"):
        raise UsageError(
            f"Config(augment={config.augment!r}): floating images are taken as they are; give "
            "uint8 ones [N, H, H, 3], or augment='none'"
        )
    if floating and launched_processes() > 1 and list(shape) != [3, shape[-1], shape[-1]]:
        raise UsageError(f"several processes need images [N, 3, H, H]; these are [N, *{[*shape]}]")
    if not floating or launched_processes() > 1:
        config = dataclasses.replace(config, image_size=shape[1])
    classes = _classes(modules, splits["train"].images[:1], config)
    for name, split in splits.items():
        least, most = int(split.labels.min()), int(split.labels.max())
        if least < 0 or most >= classes:
            raise UsageError(
                f"{name} has labels from {least} to {most}; the networks have {classes} classes, "
                f"0 to {classes - 1}"
            )
    for name, module in modules.items():
        if launched_processes() > 1 and config.batch_norm == "group":
            check_spanning(module, name)
    building.refuse_twins(modules)
    return Source(splits["train"], splits["test"], tuple(map(str, range(classes)))), config


def _check_split(name: str, split: Split, like: Tensor) -> None:
    images, labels = split.images, split.labels
    if len(labels) == 0 or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise UsageError(
            f"{name} has images {list(images.shape)} and labels {list(labels.shape)} of "
            f"{labels.dtype}; a label of torch.int64 is needed for each image"
        )
    if images.shape[1:] != like.shape[1:] or images.dtype != like.dtype:
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}, and train "
            f"{list(like.shape)} of {like.dtype}"
        )
    square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
    if not images.is_floating_point() and not (images.dtype == torch.uint8 and square):
        raise UsageError(
            f"{name} has images {list(images.shape)} of {images.dtype}: write uint8 [N, H, H, 3], "
            "or floating ones of any shape"
        )


@torch.no_grad()
def _classes(modules: Mapping[str, nn.Module], image: Tensor, config: Config) -> int:
    """Return the classes that the networks tell apart, by a look at one image."""
    found: dict[str, Any] = {}
    for name, module in modules.items():
        weight = next(module.parameters(), None)
        if weight is None:
            raise UsageError(f"{name} has no parameters to learn")
        x = image if image.is_floating_point() else image.permute(0, 3, 1, 2) / 255
        training = module.training
        module.eval()
        try:
            found[name] = list(module(x.to(weight)).shape)
        except Exception as error:  # whatever a network of one's own raises
            reason = " ".join(str(error).split())
            raise UsageError(f"{name} cannot take images {list(x.shape)}: {reason}") from error
        finally:
            module.train(training)
    shapes = list(found.values())
    if any(len(s) != 2 or s[0] != 1 or s[1] < 2 or s != shapes[0] for s in shapes):
        raise UsageError(f"networks must return logits [1, classes] for one image; these: {found}")
    return int(shapes[0][1])
