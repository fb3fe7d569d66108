"""Frozen peers: trained networks that teach and are not updated."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import ImageFormat, Normalisation
from dml_accel.distributed.processes import Processes
from dml_accel.models.build import set_memory_format
from dml_accel.models.hub import local_folder, name_of
from dml_accel.models.peer_folder import PeerFolder, find_peers, load_network, read_peer
from dml_accel.models.spec import registered_by


class Teacher:
    """A frozen peer, on the device and in the precision of the peers that it teaches.

    Args:
        name: its name in ``--links``.
        folder: where it was read from.
        net: on the device, in the run's precision, in evaluation mode.
        normalisation: of the run's images.

    Attributes:
        name, folder, net: see above.
    """

    def __init__(
        self, name: str, folder: PeerFolder, net: nn.Module, normalisation: Normalisation
    ) -> None:
        self.name, self.folder, self.net = name, folder, net
        # From images normalised for the run to images normalised as the teacher was trained:
        # x ours.std + ours.mean is the image, which (. - theirs.mean) / theirs.std normalises.
        like = next(net.parameters())
        ours, theirs = normalisation, folder.normalisation
        scale = [a / b for a, b in zip(ours.std, theirs.std, strict=True)]
        shift = [(a - b) / c for a, b, c in zip(ours.mean, theirs.mean, theirs.std, strict=True)]
        self._scale = None if ours == theirs else like.new_tensor(scale).view(3, 1, 1)
        self._shift = like.new_tensor(shift).view(3, 1, 1)
        # A network of somebody's own may rely on the usual layout, as Tensor.view does.
        self._is_own = bool(registered_by(folder.arch))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return logits [B, C] of images [B, 3, S, S] that are normalised for the run."""
        x = x if self._scale is None else x * self._scale + self._shift
        return self.net(x.contiguous() if self._is_own else x)


def read_teachers(
    paths: Sequence[str], classes: Sequence[str], image_size: int
) -> dict[str, PeerFolder]:
    """Read the folders of the frozen peers of a run: frozen-0, frozen-1, ... in the order given.

    Args:
        paths: ``--frozen-peers``: folders, or models of the hub, which are downloaded.
        classes: class names of the run.
        image_size: pixels per side of the run's images.

    Raises:
        UsageError: a folder cannot be read or downloaded, or has other classes or another image
            size.
    """
    folders = [read_peer(found) for path in paths for found in find_peers(local_folder(path))]
    for folder in folders:
        named = f"--frozen-peers {name_of(folder.path)}"
        if folder.number_of_classes != len(classes):
            raise UsageError(
                f"{named} has {folder.number_of_classes} classes; these images have {len(classes)}"
            )
        if folder.classes and folder.classes != tuple(classes):
            differing = next((a, b) for a, b in zip(folder.classes, classes, strict=True) if a != b)
            raise UsageError(
                f"{named} was trained on other classes: {differing[0]!r} "
                f"where these images have {differing[1]!r}"
            )
        if folder.image_size != image_size:
            raise UsageError(
                f"{named} takes images of {folder.image_size} pixels, not "
                f"{image_size}: use --image-size {folder.image_size}"
            )
    return {f"frozen-{index}": folder for index, folder in enumerate(folders)}


def load_teachers(
    folders: Mapping[str, PeerFolder],
    normalisation: Normalisation,
    images: ImageFormat,
    processes: Processes,
) -> list[Teacher]:
    """Build the frozen peers; every process holds all of them.

    Args:
        folders: by name, in order.
        normalisation: of the run's images.
        images: what the run's networks are given.
        processes: give the device and the mixed precision.
    """
    teachers = []
    for name, folder in folders.items():
        net = load_network(folder).requires_grad_(False)
        net = net.double() if images.dtype == torch.float64 else net.float()
        own = bool(registered_by(folder.arch))
        set_memory_format(net, torch.contiguous_format if own else images.layout)
        net = processes.accelerator.prepare_model(net, evaluation_mode=True).eval()
        teachers.append(Teacher(name, folder, net, normalisation))
    return teachers
