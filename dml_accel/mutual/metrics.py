"""Metrics of a cohort as sums and counts: added over batches and processes, divided once.

Shape letters: K peers, B rows, C classes. Rows 0 ... K-1 of every table are the peers in order,
row K is the ensemble (their mean posterior).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15


def no_sums(peers: int, device: torch.device) -> Tensor:
    """Return the sums of ``batch_sums`` over zero rows, for ``peers`` peers."""
    length = 1 + (peers + 1) * (3 + ECE_BINS) + 2 * peers**2
    return torch.zeros(length, dtype=_wide(device), device=device)


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
        labels_B: classes, int64.
    """
    wide = _wide(logits_KBC.device)
    peers, rows, _ = logits_KBC.shape
    everyone = log_posteriors(logits_KBC)
    label = labels_B.expand(peers + 1, -1)[..., None]
    nll = -everyone.gather(2, label)[..., 0]
    log_confidence, guesses = best_five(everyone)
    hits = guesses == label
    confidence = log_confidence[..., 0].exp()
    flat = everyone[:peers].reshape(peers, -1)
    p = flat.exp()
    cross = -(p @ flat.T)  # [K, K]: H(p_l, p_k), so that KL(p_l || p_k) = cross[l, k] - cross[l, l]
    best = guesses[:peers, :, 0]
    same = (best[:, None] == best[None]).to(wide).sum(-1)
    return torch.cat(
        [
            torch.full((1,), rows, dtype=wide, device=logits_KBC.device),
            hits[..., 0].to(wide).sum(1),
            hits.any(-1).to(wide).sum(1),
            nll.sum(1),
            _calibration_sums(confidence, hits[..., 0]).flatten(),
            cross.flatten(),
            same.flatten(),
        ]
    )


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


def finish(sums: Tensor, peers: list[str], classes: int) -> dict[str, Any]:
    """Divide the sums by the rows, once, and name the results.

    Returns:
        ``peers``: {name: {n, top1, top5, nll, ece}}; ``ensemble``: the same; ``agreement``: share
        of rows on which two peers predict the same class, mean over pairs, None for one peer;
        ``entropy``: {name: mean entropy of the posterior}; ``kl``: {l: {k: mean KL(p_l || p_k)}}.
        Fractions in [0, 1]; nll, entropy and kl in nats; top5 None below 5 classes.
    """
    k = len(peers)
    sizes = [1, k + 1, k + 1, k + 1, (k + 1) * ECE_BINS, k * k, k * k]
    rows, top1, top5, nll, calibration, cross, same = sums.cpu().double().split(sizes)
    n = int(rows)
    ece = calibration.view(k + 1, ECE_BINS).abs().sum(1)
    table = [
        {
            "n": n,
            "top1": top1[i].item() / n,
            "top5": top5[i].item() / n if classes >= 5 else None,
            "nll": finite(nll[i].item() / n),
            "ece": finite(ece[i].item() / n),
        }
        for i in range(k + 1)
    ]
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
    }


def finite(value: float) -> float | None:
    """Return ``value``, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None
