"""Which of two peers pauses in a step of the schedule ``switch`` (SwitOKD, ECCV 2022).

The better one pauses while the two are too far apart, so that the other can catch up. Everything is
a mean over the whole batch, on the device, so that all processes decide alike and none waits.

Shape letters: B rows of the batch, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.mutual.divergences import of_label


def behind(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what is compared, row by row, of two peers' logits [2, B, C].

    Args:
        logits: see above.
        labels: classes, [B]; -1 where there is none.

    Returns:
        [2, B, 2]: the distance sum |p - y| of each peer's posterior from the label, and the
        distance sum |p_0 - p_1| of the two from each other; 0 where there is no label.
    """
    p = F.softmax(logits, dim=-1)
    apart = (p[0] - p[1]).abs().sum(-1)  # [B]
    distances = 2 - 2 * of_label(p, labels.clamp(min=0))[..., 0]  # [2, B]
    # Who pauses does not depend on how many rows have a label: all means shrink alike.
    return torch.stack([distances, apart.expand(2, -1)], dim=-1) * (labels >= 0)[:, None]


def is_paused(means: Tensor) -> Tensor:
    """Return which of the two pauses, bools [2] on the device.

    With d_t and d_s the distances of the better and of the other peer from the labels, the better
    one pauses while the two are further apart than d_s - exp(-d_t / (d_s + d_t)) d_t.

    Args:
        means: of ``behind`` over the whole batch, [2, 2]. If one is not finite, nobody pauses.
    """
    distances, apart = means[:, 0], means[0, 1]
    better, other = distances.amin(), distances.amax()
    threshold = other - (-better / (other + better)).exp() * better
    places = torch.arange(2, device=means.device)
    return (places == distances.argmin()) & (apart > threshold)
