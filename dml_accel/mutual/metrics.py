"""Metrics of a cohort as sums and counts: added over batches and processes, divided once.

Shape letters: K peers, B rows, C classes. Rows 0 ... K-1 of every table are the peers in order,
row K is the ensemble (their mean posterior). A row whose label is -1 is counted nowhere: its image
could not be read.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.errors import UsageError

ECE_BINS = 15


def no_sums(peers: int, classes: int, device: torch.device) -> Tensor:
    """Return the sums of ``batch_sums`` over zero rows, for ``peers`` peers."""
    return torch.zeros(sum(_sizes(peers, classes)), dtype=_wide(device), device=device)


def _sizes(peers: int, classes: int) -> list[int]:
    """Return how many sums of each kind there are, in the order of ``batch_sums``."""
    everyone = peers + 1
    return [
        *(1, everyone, everyone, everyone, everyone * ECE_BINS, peers**2, peers**2),
        *(everyone * classes, everyone * classes, classes),
    ]


def _wide(device: torch.device) -> torch.dtype:
    # Double precision holds counts exactly and sums of many small terms well; MPS has none.
    return torch.float32 if device.type == "mps" else torch.float64


def log_posteriors(logits_KBC: Tensor) -> Tensor:
    """Return the log posterior of every peer and, last, of the ensemble, [K + 1, B, C]."""
    log_p = F.log_softmax(logits_KBC.to(_wide(logits_KBC.device)), dim=-1)
    ensemble = log_p.logsumexp(0, keepdim=True) - math.log(len(logits_KBC))
    return torch.cat([log_p, ensemble])


def best_five(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest values [..., 5] of the last dimension and their indices, best first.

    Fewer than five if there are fewer classes. Ties are broken in the same way everywhere.
    """
    found = log_p.topk(min(5, log_p.shape[-1]), dim=-1)
    return found.values, found.indices


def batch_sums(logits_KBC: Tensor, labels_B: Tensor) -> Tensor:
    """Return one flat vector of sums over rows; ``finish`` turns their total into metrics.

    Args:
        logits_KBC: logits of every peer for the same rows.
        labels_B: classes, int64; rows with -1 are not counted.
    """
    wide = _wide(logits_KBC.device)
    peers, _, classes = logits_KBC.shape
    counted = labels_B >= 0  # [B]
    # Masked, not left out: the host would have to wait to learn how many rows are left.
    everyone = torch.where(counted[:, None], log_posteriors(logits_KBC), 0.0)
    label = labels_B.expand(peers + 1, -1)[..., None]
    nll = -everyone.gather(2, label.clamp(min=0))[..., 0]
    log_confidence, guesses = best_five(everyone)
    hits = guesses == label
    confidence = torch.where(counted, log_confidence[..., 0].exp(), 0.0)
    flat = everyone[:peers].reshape(peers, -1)
    p = flat.exp()
    cross = -(p @ flat.T)  # [K, K]: H(p_l, p_k), so that KL(p_l || p_k) = cross[l, k] - cross[l, l]
    best = guesses[:peers, :, 0]
    same = ((best[:, None] == best[None]) & counted).to(wide).sum(-1)
    return torch.cat(
        [
            counted.to(wide).sum(0, keepdim=True),
            hits[..., 0].to(wide).sum(1),
            hits.any(-1).to(wide).sum(1),
            nll.sum(1),
            _calibration_sums(confidence, hits[..., 0]).flatten(),
            cross.flatten(),
            same.flatten(),
            *_class_counts(guesses[..., 0], hits[..., 0], labels_B, classes, wide),
        ]
    )


def _class_counts(
    guesses: Tensor, hits: Tensor, labels_B: Tensor, classes: int, wide: torch.dtype
) -> list[Tensor]:
    """Return the hits of each class and its predictions, by everyone and flat, and its rows.

    Args:
        guesses: the most likely classes, [K + 1, B].
        hits: whether they are right, [K + 1, B].
        labels_B: -1 for rows that are not counted.
        classes: how many there are.
        wide: dtype of the sums.
    """
    everyone, device = len(guesses), labels_B.device
    counted = (labels_B >= 0).to(wide)
    first = torch.arange(0, everyone * classes, classes, device=device)[:, None]
    places = (guesses + first).flatten()
    none = torch.zeros(everyone * classes, dtype=wide, device=device)
    return [
        # Whole numbers: exact in any order.
        none.index_add(0, places, hits.to(wide).flatten()),
        none.index_add(0, places, counted.expand(everyone, -1).flatten()),
        none[:classes].index_add(0, labels_B.clamp(min=0), counted),
    ]


def _calibration_sums(confidence: Tensor, hit: Tensor) -> Tensor:
    """Return sum over rows of (hit - confidence) in each confidence bin, [K + 1, bins]."""
    bins = calibration_bin(confidence)
    gap = hit.to(confidence.dtype) - confidence
    if gap.device.type != "cpu":
        return sum_in_bins(gap, bins)
    return torch.zeros(len(gap), ECE_BINS, dtype=gap.dtype).scatter_add_(1, bins, gap)


def sum_in_bins(values: Tensor, bins: Tensor) -> Tensor:
    """Return the sum of the values [K, B] in each bin, [K, ``ECE_BINS``], in a fixed order.

    A GPU's ``scatter_add_`` adds in any order, so that equal runs would differ in the last bits.
    """
    places = torch.arange(ECE_BINS, device=bins.device)
    return torch.where(bins[..., None] == places, values[..., None], 0.0).sum(1)


def calibration_bin(confidence: Tensor) -> Tensor:
    """Return the bin, 0 to ``ECE_BINS`` - 1, of each confidence; bin b holds (b, b + 1] / bins."""
    return (confidence * ECE_BINS).ceil().long().sub_(1).clamp_(0, ECE_BINS - 1)


def finish(
    sums: Tensor, peers: list[str], classes: int, split: str = "evaluated"
) -> dict[str, Any]:
    """Divide the sums by the rows, once, and name the results.

    Args:
        sums: total of ``batch_sums``.
        peers: names, in the order of the rows.
        classes: how many there are.
        split: its name, for messages.

    Returns:
        ``peers``: {name: {n, top1, top5, nll, ece, macro_f1}}; ``ensemble``: the same;
        ``agreement``: share of rows on which two peers predict the same class, mean over pairs,
        None for one peer; ``entropy``: {name: mean entropy of the posterior}; ``kl``: {l: {k: mean
        KL(p_l || p_k)}}; ``imbalance``: rows of the largest class over those of the smallest that
        has any. Fractions in [0, 1]; nll, entropy and kl in nats; top5 None below 5 classes.

    Raises:
        UsageError: no row was counted.
    """
    k = len(peers)
    parts = sums.cpu().double().split(_sizes(k, classes))
    rows, top1, top5, nll, calibration, cross, same, hits, guesses, actual = parts
    n = int(rows)
    if not n:
        raise UsageError(
            f"none of the images of the {split} split could be read, so that there is nothing to "
            "report on; see --bad-images"
        )
    ece = calibration.view(k + 1, ECE_BINS).abs().sum(1)
    macro_f1 = _macro_f1(hits.view(k + 1, -1), guesses.view(k + 1, -1), actual)
    table = [
        {
            "n": n,
            "top1": top1[i].item() / n,
            "top5": top5[i].item() / n if classes >= 5 else None,
            "nll": finite(nll[i].item() / n),
            "ece": finite(ece[i].item() / n),
            "macro_f1": macro_f1[i].item(),
        }
        for i in range(k + 1)
    ]
    present = actual[actual > 0]
    cross = cross.view(k, k) / n
    kl = cross - cross.diagonal()[:, None]
    pairs = k * (k - 1)
    return {
        "peers": dict(zip(peers, table[:k], strict=True)),
        "ensemble": table[k],
        "agreement": (same.sum().item() - n * k) / (n * pairs) if pairs else None,
        "entropy": {name: finite(cross[i, i].item()) for i, name in enumerate(peers)},
        "kl": {
            taught_by: {name: finite(value) for name, value in zip(peers, row, strict=True)}
            for taught_by, row in zip(peers, kl.tolist(), strict=True)
        },
        "imbalance": (present.max() / present.min()).item(),
    }


def _macro_f1(hits: Tensor, guesses: Tensor, actual: Tensor) -> Tensor:
    """Return the mean of F1 over the classes that have rows, [K + 1].

    F1 = 2 hits / (predictions + rows) is the harmonic mean of precision and recall; it is 0 for a
    class that is never predicted. A class without rows has no recall and is left out; predictions
    of it lower the F1 of the classes that they miss.

    Args:
        hits: rows that are rightly predicted, by class, [K + 1, C].
        guesses: rows for which a class is predicted, [K + 1, C].
        actual: rows of each class, [C].
    """
    present = actual > 0
    return (2 * hits[:, present] / (guesses + actual)[:, present]).mean(1)


def finite(value: float) -> float | None:
    """Return ``value``, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None
