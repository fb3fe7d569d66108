"""The losses of Deep Mutual Learning (Zhang et al., CVPR 2018, section 2): pure functions.

    L_k = CE(z_k, y) + w T^2 mean_{l != k} KL(p_l || p_k),    p_k = softmax(z_k / T)

The peers' posteriors p_l are constants: no gradient of L_k reaches peer l. Cross-entropy is linear
in its target posterior, so

    mean_l KL(p_l || p_k) = CE(mean_l p_l, p_k) - mean_l H(p_l)

and one sum over all peers serves every peer, which subtracts its own term: O(K) work, not O(K^2).
A peer whose logits for an image are not finite teaches nobody on that image. Other targets and
divergences stand in the place of the KL term: see ``targets`` and ``divergences``.

Shape letters: K peers, B rows of the batch, C classes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.errors import UsageError
from dml_accel.core.flags import require
from dml_accel.core.method import MethodConfig
from dml_accel.data.mixing import Mixed
from dml_accel.mutual.targets import Lesson, Targets, at_least_single


class Losses(NamedTuple):
    """The named parts of every peer's loss, one value per row, all [K, B], in nats."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor

    @property
    def loss(self) -> Tensor:
        """What to go backward from, a scalar: the mean over the rows, summed over the peers.

        The sum gives every network the gradient of its own mean, because none reaches another.
        """
        return self.total.mean(1).sum()


def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    kl_reduction: str = "mean",
    target: str = "peers",
    divergence: str = "kl",
    divergence_args: Mapping[str, float] | None = None,
    standardize: bool = False,
    gate: str = "none",
    mixed: Mixed | None = None,
    label_smoothing: float = 0.0,
    class_weights_C: Tensor | None = None,
) -> Losses:
    """Return the loss of K peers that all learn from each other, on every row.

    In a training loop of your own::

        logits = [net(images) for net in nets]
        mutual_loss(logits, labels).loss.backward()

    gives every network the gradient of its own loss and of no other: what a peer teaches is a
    constant. Where each process has another network, ``gather_logits`` comes between the two.

    Args:
        logits: of K peers for the same B images: one [B, C] each, or [K, B, C]. Half precision is
            converted to single.
        labels: classes, [B], whole numbers.
        kl_weight: w; at 0 the KL term is not computed.
        ce_weight: of the cross-entropy.
        temperature: T.
        kl_reduction: ``mean`` or ``sum`` over the K - 1 other peers.
        target, divergence, standardize, gate: as the flags of these names.
        divergence_args: numbers of the divergence, by name, where they are not the default.
        mixed, label_smoothing, class_weights_C: see ``mutual_losses``.

    Raises:
        UsageError: logits and labels do not fit each other, a value is unknown or out of its range,
            or values exclude each other.
    """
    logits_KBC, labels_B = _stacked(logits), _checked(labels)
    if labels_B.shape != logits_KBC.shape[1:2]:
        raise UsageError(
            f"mutual_loss: logits are {list(logits_KBC.shape)} (peers, images, classes), but "
            f"labels {list(labels_B.shape)}: each image needs one label"
        )
    _refuse_classes(labels_B, logits_KBC.shape[2])
    if divergence_args is not None and not isinstance(divergence_args, Mapping):
        raise UsageError(
            f"divergence_args is {divergence_args!r}; it must map names to numbers, as "
            '{"alpha": 2.0} does'
        )
    for name, weight in (("kl_weight", kl_weight), ("ce_weight", ce_weight)):
        require(weight >= 0, name, weight, "at least 0")
    given = tuple(f"{name}={value}" for name, value in (divergence_args or {}).items())
    lesson = _lesson(target, divergence, given, temperature, standardize, gate, kl_reduction)
    if mixed is not None:
        lesson.refuse_mixed()
    learned = None
    if kl_weight and len(logits_KBC) > 1:
        # Detached: what a peer teaches is a constant, or its loss would pull on its teachers too.
        own = lesson.contributions(logits_KBC.detach(), labels_B)
        learned = lesson.targets(own, own, labels_B)
    return mutual_losses(
        logits_KBC,
        labels_B,
        learned,
        lesson,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        sums_kl=kl_reduction == "sum",
        mixed=mixed,
        label_smoothing=label_smoothing,
        class_weights_C=class_weights_C,
    )


def _stacked(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Return logits [K, B, C], from those of each peer.

    Raises:
        UsageError: their shapes differ, or are none of logits.
    """
    if not isinstance(logits, Tensor):
        shapes = [list(one.shape) for one in logits]
        if not shapes or any(shape != shapes[0] for shape in shapes):
            raise UsageError(
                f"mutual_loss: the peers' logits are {shapes}; all must be [images, classes] of "
                "the same batch"
            )
        logits = torch.stack(list(logits))
    if logits.dim() != 3:
        raise UsageError(
            f"mutual_loss: logits are {list(logits.shape)}; give one [images, classes] per peer, "
            "or [peers, images, classes]"
        )
    return logits


def _checked(labels: Tensor) -> Tensor:
    """Return labels as int64.

    Raises:
        UsageError: they are no class numbers.
    """
    if not isinstance(labels, Tensor):
        raise UsageError(
            f"mutual_loss: labels are a {type(labels).__name__}; give a tensor of class numbers, "
            "as torch.as_tensor(labels)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(
            f"mutual_loss: labels are {list(labels.shape)} of {labels.dtype}; they must be class "
            "numbers [images]: of one-hot labels, labels.argmax(1)"
        )
    return labels.long()


def _refuse_classes(labels: Tensor, classes: int) -> None:
    """Refuse classes that do not exist, where looking at them does not wait for a device."""
    if labels.device.type != "cpu" or not len(labels):
        return
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise UsageError(
            f"mutual_loss: labels are from {least} to {most}, but the logits have {classes} "
            f"classes, 0 to {classes - 1}"
        )


@functools.lru_cache  # because it is asked for in every step of a loop
def _lesson(
    target: str,
    divergence: str,
    arguments: tuple[str, ...],
    temperature: float,
    standardize: bool,
    gate: str,
    kl_reduction: str,
) -> Lesson:
    return Lesson.of(
        MethodConfig(
            target=target,
            divergence=divergence,
            divergence_args=arguments,
            temperature=temperature,
            standardize=standardize,
            gate=gate,
            kl_reduction=kl_reduction,
        )
    )


def forget_lessons() -> None:
    """Forget lessons that were made, because a divergence or target is registered."""
    _lesson.cache_clear()


_KL = Lesson()


def mutual_losses(
    logits_KBC: Tensor,
    labels_B: Tensor,
    targets: Targets | None,
    lesson: Lesson = _KL,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    sums_kl: bool = False,
    label_weight: Tensor | None = None,
    kl_on_labelled: bool = False,
    mixed: Mixed | None = None,
    label_smoothing: float = 0.0,
    class_weights_C: Tensor | None = None,
) -> Losses:
    """Return the loss of K peers on every row.

    Args:
        logits_KBC: logits of K peers for the same B images; converted to at least single precision.
        labels_B: classes, int64; -1 marks a label that must not be used.
        targets: of these peers, made by ``lesson``; None without a KL term, which is then not
            computed at all, because 0 times a peer's NaN is NaN.
        lesson: how they learn from the targets.
        kl_weight: w.
        ce_weight: of the cross-entropy.
        sums_kl: sum the KL over the teachers instead of averaging it.
        label_weight: weight of a labelled row, with which the mean over the whole batch becomes the
            mean over its labelled rows (CVPR 2018, section 3.4). None if all rows are labelled.
        kl_on_labelled: whether rows without a label have no KL term either.
        mixed: what the images were mixed with: the cross-entropy is the sum of those with both
            labels, each times its share. All rows must be labelled.
        label_smoothing: share of each label that is spread evenly over all classes, as in
            ``torch.nn.functional.cross_entropy``.
        class_weights_C: factor of the cross-entropy with a label of each class, smoothed or not; of
            a mixed row, of each of its two. The KL term has none. None for 1.

    Returns:
        ``total`` carries gradients: its row k into the logits of peer k and nowhere else.
        ``cross_entropy`` includes ``mixed``, ``label_smoothing``, ``label_weight`` and
        ``class_weights_C``, not ``ce_weight``. ``kl`` is the term of the formula above before w,
        with T^2, by whatever divergence; 0 if it was not computed.
    """
    # Half precision has too few digits for the sums over classes and over rows.
    logits_KBC = at_least_single(logits_KBC)
    log_p = F.log_softmax(logits_KBC, dim=-1)  # [K, B, C]
    # gather needs a valid class; what it picks for an unused label is multiplied by 0 below.
    known_B = labels_B if label_weight is None else labels_B.clamp(min=0)
    cross_entropy = _cross_entropy(log_p, known_B, class_weights_C)
    if mixed is not None:
        theirs = _cross_entropy(log_p, mixed.labels, class_weights_C)
        cross_entropy = mixed.share * cross_entropy + (1 - mixed.share) * theirs
    if label_smoothing:
        evenly = -log_p.mean(-1)  # [K, B]: the cross-entropy with every class alike
        if class_weights_C is not None:
            evenly = evenly * _weights_of_rows(class_weights_C, known_B, mixed)
        cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * evenly
    weight_B = None
    if label_weight is not None:
        # Multiplied, not left out: what is not finite must stay so, for the step to be skipped.
        weight_B = (labels_B >= 0).to(log_p.dtype) * label_weight
        cross_entropy = cross_entropy * weight_B
    weighted = cross_entropy if ce_weight == 1 else ce_weight * cross_entropy
    if targets is None:
        return Losses(weighted, cross_entropy, torch.zeros_like(cross_entropy))
    kl = lesson.learn(logits_KBC, log_p, targets, labels_B)  # [K, B]
    if sums_kl:
        kl = kl * targets.teachers
    if kl_on_labelled and weight_B is not None:
        kl = kl * weight_B
    # Parts are returned apart from the total: they are what the records and the display show.
    return Losses(weighted + kl_weight * kl, cross_entropy, kl)


def _cross_entropy(log_p_KBC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
    """Return the cross-entropy of every peer with each row's class, [K, B], in nats."""
    found = -log_p_KBC.gather(2, labels_B.expand(len(log_p_KBC), -1)[..., None])[..., 0]
    return found if weights_C is None else found * weights_C[labels_B]


def _weights_of_rows(weights_C: Tensor, labels_B: Tensor, mixed: Mixed | None) -> Tensor:
    """Return the weight of each row's label, or the mean of those that it is mixed of, [B]."""
    own = weights_C[labels_B]
    return own if mixed is None else mixed.share * own + (1 - mixed.share) * weights_C[mixed.labels]


def balanced_weights(counts_C: Tensor) -> Tensor:
    """Return the inverse frequency of each class, with a mean of 1 over all images, [C] float64.

    That is N / (C n_c) for n_c of N images, where C counts the classes that have any; the others
    have the weight 0.

    Args:
        counts_C: images of each class.
    """
    counts = counts_C.double()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)
