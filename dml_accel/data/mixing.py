"""Mixup and CutMix: a batch mixed with itself in another order, the same for every peer.

    mixup    x = share x_i + (1 - share) x_j          Zhang et al., ICLR 2018
    CutMix   a box of x_j replaces that of x_i         Yun et al., ICCV 2019

In both the label is that of i with ``share`` and that of j with ``1 - share``. All draws of an
epoch are keyed by seed, epoch and batch size; shares and boxes are numbers on the host, so that no
step waits for a device.

Shape letters: B rows of a batch or of a slice of it, C channels, H and W pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dml_accel.core.config import DataConfig
from dml_accel.core.rng import key


class Mixed(NamedTuple):
    """The labels that a batch's images were mixed in with.

    Attributes:
        labels: class of each row's partner, [B] int64.
        share: of a row's own label, from 0 to 1; the rest is its partner's.
    """

    labels: Tensor
    share: float


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.

    Attributes:
        partners: the row of the batch that is mixed into each row, [B] int64.
        share: what stays of a row.
        box: of CutMix: first row, row after the last, first column, column after the last; None
            for mixup.
    """

    partners: Tensor
    share: float
    box: tuple[int, int, int, int] | None

    def apply(self, images: Tensor, partners: Tensor) -> Tensor:
        """Mix ``partners`` into ``images`` of the same shape, both changed in place."""
        if self.box is None:
            # Three operations that round once each: a fused one may round otherwise at the end of
            # a tensor, and then a slice of a batch would differ from the whole.
            return images.mul_(self.share).add_(partners.mul_(1 - self.share))
        top, bottom, left, right = self.box
        images[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return images


@dataclass(frozen=True)
class Mixing:
    """What is drawn for every batch.

    Attributes:
        mixup: alpha of the beta distribution of its shares; 0 turns it off.
        cutmix: the same; with both on, each batch has one of the two, with equal probability.
    """

    mixup: float
    cutmix: float

    @classmethod
    def of(cls, data: DataConfig) -> "Mixing | None":
        """Return what a configuration asks for; None if batches are not mixed."""
        return cls(data.mixup, data.cutmix) if data.mixup or data.cutmix else None

    def draw(
        self, seed: int, epoch: int, batches: int, batch_size: int, sides: tuple[int, int]
    ) -> tuple[Tensor, list[tuple[float, tuple[int, int, int, int] | None]]]:
        """Draw an epoch.

        Args:
            seed: of the run.
            epoch: from 0.
            batches: in an epoch.
            batch_size: rows of a whole batch.
            sides: H and W, for CutMix.

        Returns:
            Partners of all rows, [batches, B] int64; and share and box of each batch, see ``Mix``.
            A share of 1 leaves a batch as it is.
        """
        generate = np.random.Generator(np.random.PCG64(key("mixing", seed, epoch, batch_size)))
        order = np.tile(np.arange(batch_size), (batches, 1))
        partners = torch.from_numpy(generate.permuted(order, axis=1))
        cuts = generate.random(batches) < (0.5 if self.mixup else 1.0)
        cuts &= self.cutmix > 0
        alpha = np.where(cuts, self.cutmix, self.mixup)
        shares = generate.beta(alpha, alpha).tolist()
        centres = generate.integers(0, sides, (batches, 2)).tolist()
        drawn = zip(cuts.tolist(), shares, centres, strict=True)
        return partners, [
            _cut(share, centre, sides) if cut else (share, None) for cut, share, centre in drawn
        ]


def _cut(
    share: float, centre: tuple[int, int], sides: tuple[int, int]
) -> tuple[float, tuple[int, int, int, int]]:
    """Return the share that stays outside of a box, and the box, cut off at the image's edges."""
    box: list[int] = []
    for middle, side in zip(centre, sides, strict=True):
        half = int((1 - share) ** 0.5 * side) // 2
        box += [max(middle - half, 0), min(middle + half, side)]
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (sides[0] * sides[1]), (top, bottom, left, right)
