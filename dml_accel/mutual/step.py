"""One optimizer step of the cohort, by each update schedule.

    simultaneous   forward of all peers, exchange, backward of all, update of all (with
                   --low-memory: all predict, exchange, forward and backward of one at a time)
    sequential     all predict; each peer in turn is updated and predicts the same batch again
                   (the paper's Algorithm 1: 2K - 1 forward passes)
    official       each peer in turn is updated on a batch of its own that all predict (the authors'
                   code: K batches per step, KL terms summed)
    switch         as simultaneous, but the better of two peers pauses while the other is too far
                   behind it (SwitOKD)

A step returns the named parts of every peer's loss; nothing above it knows the method. Nothing here
reads a value back from the device, because that would make the host wait for it.

Shape letters: K peers, k of them in this process, F frozen ones, B rows of our slice, C classes, P
parts of a loss, R requests, W numbers of a contribution.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dml_accel.core.config import OptimConfig
from dml_accel.core.rng import key
from dml_accel.core.updates import UPDATE_SCHEDULES
from dml_accel.data.batches import ImageSet, slices
from dml_accel.data.mixing import Mixed
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.losses import Losses
from dml_accel.mutual.pausing import is_paused
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.snapshots import Snapshots
from dml_accel.mutual.targets import Targets
from dml_accel.mutual.teachers import Teacher
from dml_accel.mutual.teaching import Teaching

PARTS = ("loss", "cross_entropy", "kl")
Requests = Callable[[], Sequence[bool]]
Rates = float | Mapping[str, float]


class Labels(NamedTuple):
    """What some rows of a batch are labelled with.

    Attributes:
        classes: [B] int64; -1 marks a label that must not be used.
        mixed: what the images were mixed with; None if with nothing.
    """

    classes: Tensor
    mixed: Mixed | None


@dataclass(frozen=True)
class Cohort:
    """The peers of this process and what they are trained with, the same in every step.

    Attributes:
        peers: those that are trained here, in name order.
        teachers: the frozen peers.
        images: the training images.
        placement: which peers and rows are ours.
        teaching: who learns what from whom.
        optim: batch, micro-batches and gradient norm.
        update: the update schedule.
        seed: keys dropout.
        low_memory: whether to keep one network's activations at a time.
        label_smoothing: share of each label that is spread over all classes.
        class_weights: factor of the cross-entropy with a label of each class, [C] on the device;
            None for 1.
        snapshots: the weights that teach, with ``--exchange-every``; None where those of the step
            do.
    """

    peers: Sequence[Peer]
    teachers: Sequence[Teacher]
    images: ImageSet
    placement: Placement
    teaching: Teaching
    optim: OptimConfig
    update: str = "simultaneous"
    seed: int = 0
    low_memory: bool = False
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    snapshots: Snapshots | None = None

    @property
    def one_at_a_time(self) -> bool:
        """Whether one network's activations at a time are kept.

        Without a KL term nothing has to be predicted first: less memory for the same work.
        """
        return self.low_memory or not self.teaching.is_on

    @property
    def largest_weight(self) -> float:
        """The largest of the class weights; reading it waits for the device."""
        return 1.0 if self.class_weights is None else float(self.class_weights.max())

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.optim.batch_size


class Step:
    """One optimizer step: its number, and what follows from it.

    Args:
        cohort: what is trained.
        number: optimizer steps taken before.
        lr: learning rate, of all peers or by name.

    Attributes:
        has_kl: whether there is a KL term in this step.
    """

    def __init__(self, cohort: Cohort, number: int, lr: Rates) -> None:
        self.cohort, self.number, self.lr = cohort, number, lr
        self.peers, self.placement, self.teaching = cohort.peers, cohort.placement, cohort.teaching
        self.has_kl = self.teaching.is_on_in(number)
        self.micro_batches = slices(cohort.optim.batch_size, cohort.optim.grad_accum)
        self._taken: dict[str, Tensor] = {}  # bools on the device

    def rows(self, batch: int, part: tuple[int, int]) -> tuple[Tensor, Labels]:
        """Return our images and labels of rows ``part`` of a batch."""
        lo, hi = _our_rows(self.placement, part)
        size, images = self.cohort.optim.batch_size, self.cohort.images
        x, classes = images.batch(batch, size, lo, hi)
        return x, Labels(classes, images.mixed(batch, size, lo, hi))

    def dropout_key(self, peer: Peer, part: int) -> int:
        """Return what keys dropout: the step and the peer, never what was drawn before."""
        # With the slice: processes of one peer see other rows and must not draw the same masks.
        index = self.placement.index
        return key("dropout", self.cohort.seed, self.number, part, peer.name, index)

    def forward(self, peer: Peer, x: Tensor, part: int) -> Tensor:
        """Predict with a graph for the backward pass, [B, C]."""
        return peer.forward(x, self.dropout_key(peer, part))

    def predict(self, peer: Peer, x: Tensor, part: int) -> Tensor:
        """Predict as in training but without a graph, [B, C]."""
        return peer.predict(x, self.dropout_key(peer, part))

    def logits_of_others(self, x: Tensor) -> Tensor | None:
        """Return the logits that teach, where those of the trained weights do not; else None.

        By averages of weights they are those of our peers, [k, B, C]; by the weights of the last
        exchange those of all peers, [K, B, C].
        """
        if not self.has_kl:
            return None
        if self.cohort.snapshots is not None:
            return self.cohort.snapshots.predict(x)
        if not self.teaching.by_averages:
            return None
        averages = [peer.average for peer in self.peers]
        return torch.stack([one.predict(x) for one in averages if one is not None])

    def frozen_contributions(self, x: Tensor, y: Labels) -> Tensor | None:
        """Return what the frozen peers contribute on our rows, [F, B, W]; None without any."""
        teachers = self.cohort.teachers
        if not (teachers and self.has_kl):
            return None
        logits = torch.stack([one.predict(x) for one in teachers])
        return self.teaching.contributions(logits, y.classes)

    def targets(self, logits: Tensor, x: Tensor, y: Labels, count: int) -> Targets | None:
        """Return our peers' targets on our rows of a micro-batch of ``count`` rows.

        None without a KL term. For ``logits`` see ``Teaching.targets``.
        """
        if not self.has_kl:
            return None
        frozen = self.frozen_contributions(x, y)
        return self.teaching.targets(logits, y.classes, count, self.placement, frozen)

    def losses(
        self, logits: Tensor, labels: Labels, targets: Targets | None, batch: int
    ) -> tuple[Losses, Tensor]:
        """Return the losses of some peers on our rows, and their detached sums, [k, P].

        Behind those of the ``PARTS`` stand the sums of what the schedule compares, if it does.
        """
        cohort = self.cohort
        # The weights are the same on every process: both follow from the step, not from our rows.
        losses = self.teaching.losses(
            logits,
            labels.classes,
            targets,
            kl_weight=self.teaching.kl_weight(self.number, cohort.steps_per_epoch),
            label_weight=cohort.images.label_weight(batch, cohort.optim.batch_size),
            mixed=labels.mixed,
            label_smoothing=cohort.label_smoothing,
            class_weights=cohort.class_weights,
        )
        sums = torch.stack([part.detach().sum(1) for part in losses], 1)
        if targets is not None and targets.behind is not None:
            sums = torch.cat([sums, targets.behind.sum(1)], 1)
        return losses, sums

    def backward(self, losses: Losses, peers: Sequence[Peer]) -> None:
        """Add the gradients of our rows' share of the mean over the whole batch."""
        # A sum over our rows divided by the whole batch, so that slices may be uneven.
        scale = self.placement.gradient_scale / self.cohort.optim.batch_size
        mean = losses.total.sum(1) * scale  # [k]
        # A loss that is not finite must give gradients that are not, or the loss scaler of fp16
        # would not notice that the step has to be skipped.
        ones = torch.where(mean.detach().isfinite(), 1.0, math.nan)
        scaled = [peer.scaler.scale(one) for peer, one in zip(peers, ones, strict=True)]
        mean.backward(torch.stack(scaled))

    def begin(self, peer: Peer) -> None:
        """Let a peer begin the step, at its learning rate."""
        peer.begin_step(self.lr[peer.name] if isinstance(self.lr, Mapping) else self.lr)

    def update(self, peer: Peer, finite: Tensor) -> None:
        """Let a peer take its step, if its loss is ``finite``, a bool on the device."""
        self._taken[peer.name] = peer.update(finite, self.cohort.optim.clip_norm)

    def move_averages(self) -> None:
        """Move the averages of those peers that have taken their step, at the end of the step."""
        for peer in self.peers:
            if peer.average is not None:
                peer.average.update(self._taken[peer.name], self.number)


def _our_rows(placement: Placement, part: tuple[int, int]) -> tuple[int, int]:
    """Return our slice of a micro-batch, in rows of the whole batch."""
    lo, hi = placement.rows(part[1] - part[0])
    return part[0] + lo, part[0] + hi


def reads(cohort: Cohort, steps: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield batch, first and last row of all that this process reads in some steps, in order."""
    parts = slices(cohort.optim.batch_size, cohort.optim.grad_accum)
    schedule = UPDATE_SCHEDULES[cohort.update]
    batches = schedule.batches_per_step(len(cohort.placement.names))
    for number in steps:
        for batch in range(number * batches, (number + 1) * batches):
            for part in parts:
                yield (batch, *_our_rows(cohort.placement, part))


def train_step(
    cohort: Cohort, number: int, lr: Rates, requests: Requests = list
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step.

    Args:
        cohort: what is trained.
        number: optimizer steps taken before.
        lr: learning rate, of all peers or by name.
        requests: called at the end of the step: what this process requests of all others.

    Returns:
        The mean over the whole batch of the ``PARTS`` of all peers' losses, [K, P], detached; a
        peer whose loss is not finite is left as it was. And how many processes have each request,
        [R].
    """
    if cohort.snapshots is not None:
        cohort.snapshots.begin_step(number)
    step = Step(cohort, number, lr)
    found = _STEPS[cohort.update](step, requests)
    step.move_averages()
    return found


# ---------------------------------------------------------------- simultaneous


def _simultaneous(step: Step, requests: Requests) -> tuple[Tensor, Tensor]:
    placement, parts = step.placement, step.micro_batches
    for peer in step.peers:
        step.begin(peer)
    learn = _in_turn if step.cohort.one_at_a_time or not step.has_kl else _together
    sums = []
    for number, part in enumerate(parts):
        x, y = step.rows(step.number, part)  # [B, 3, S, S], [B]
        with placement.micro_batch([peer.net for peer in step.peers], part is parts[-1]):
            sums.append(learn(step, x, y, number, part[1] - part[0]))
    ours = torch.stack(sums).sum(0)  # [k, P]
    # One collective for losses and requests: a second one would cost its latency in every step.
    means, requested = placement.end_of_step(ours, torch.tensor(requests()))
    means /= step.cohort.optim.batch_size  # [K, P]
    # Every process of a peer sees the same mean, so all of them skip a step, or none does.
    updates = means[:, 0].isfinite()  # [K]
    means, behind = means[:, : len(PARTS)], means[:, len(PARTS) :]
    if behind.numel():
        updates &= ~is_paused(behind)
    for peer in step.peers:
        step.update(peer, updates[placement.names.index(peer.name)])
    return means, requested


def _together(step: Step, x: Tensor, y: Labels, part: int, count: int) -> Tensor:
    """Forward of all peers, then backward of all; return sums of their losses' parts, [k, P]."""
    logits = torch.stack([step.forward(peer, x, part) for peer in step.peers])  # [k, B, C]
    taught = step.logits_of_others(x)
    targets = step.targets(logits if taught is None else taught, x, y, count)
    losses, sums = step.losses(logits, y, targets, step.number)
    # A single backward pass for all peers: their graphs do not meet, because targets are constants.
    step.backward(losses, step.peers)
    return sums


def _in_turn(step: Step, x: Tensor, y: Labels, part: int, count: int) -> Tensor:
    """As ``_together``, but with one peer's activations at a time: targets are made first."""
    targets = None
    if step.has_kl:
        looks = step.logits_of_others(x)
        if looks is None:
            looks = torch.stack([_look(step, peer, x, part) for peer in step.peers])
        targets = step.targets(looks, x, y, count)
    sums = []
    for place, peer in enumerate(step.peers):
        # With the key of the first look, dropout draws the same masks as when the peer taught.
        logits = step.forward(peer, x, part)[None]  # [1, B, C]
        own = targets.of(place) if targets else None
        losses, found = step.losses(logits, y, own, step.number)
        step.backward(losses, [peer])
        sums.append(found)
        del logits, losses  # or their activations would live on beside the next peer's
    return torch.cat(sums)


def _look(step: Step, peer: Peer, x: Tensor, part: int) -> Tensor:
    # The batch is seen again in the forward pass: running statistics must move once.
    with peer.keeping_buffers():
        return step.predict(peer, x, part)


# ---------------------------------------------------------------- one peer after the other


def _sequential(step: Step, requests: Requests) -> tuple[Tensor, Tensor]:
    peers, teaching = step.peers, step.teaching
    for peer in peers:
        step.begin(peer)
    (part,) = step.micro_batches  # Config refuses more
    x, y = step.rows(step.number, part)
    logits = [step.forward(peer, x, 0) for peer in peers]
    everyone = frozen = None
    if step.has_kl:
        everyone = teaching.contributions(torch.stack(logits), y.classes)  # [K, B, W]
        frozen = step.frozen_contributions(x, y)
    means, turns = [], _turns(step)
    for place in turns:
        targets = None
        if everyone is not None:
            targets = teaching.targets_of(place, everyone, y.classes, frozen)
        losses, sums = step.losses(logits[place][None], y, targets, step.number)
        step.backward(losses, [peers[place]])
        means.append(_update(step, place, sums))
        if everyone is not None and place != turns[-1]:  # nobody learns from the last one again
            # Those after it learn from the updated peer: Algorithm 1 of the paper.
            again = _look(step, peers[place], x, 0)
            everyone[place] = teaching.contributions(again[None], y.classes)[0]
    return _in_name_order(step, means), _reduce_requests(step, requests)


def _official(step: Step, requests: Requests) -> tuple[Tensor, Tensor]:
    peers, parts, means = step.peers, step.micro_batches, []
    for turn, place in enumerate(_turns(step)):
        step.begin(peers[place])
        batch = step.number * len(peers) + turn  # K batches per step
        sums = []
        for number, part in enumerate(parts):
            x, y = step.rows(batch, part)
            with step.placement.micro_batch([peers[place].net], part is parts[-1]):
                own = step.forward(peers[place], x, number)
                targets = _official_targets(step, place, own, x, y, number)
                losses, found = step.losses(own[None], y, targets, batch)
                step.backward(losses, [peers[place]])
            sums.append(found)
        means.append(_update(step, place, torch.stack(sums).sum(0)))
    return _in_name_order(step, means), _reduce_requests(step, requests)


def _official_targets(
    step: Step, place: int, own: Tensor, x: Tensor, y: Labels, part: int
) -> Targets | None:
    """Return the targets of the peer at ``place``: all others predict its batch."""
    if not step.has_kl:
        return None
    logits = [
        own if at == place else step.predict(peer, x, part) for at, peer in enumerate(step.peers)
    ]
    everyone = step.teaching.contributions(torch.stack(logits), y.classes)
    frozen = step.frozen_contributions(x, y)
    return step.teaching.targets_of(place, everyone, y.classes, frozen)


def _turns(step: Step) -> list[int]:
    """Return the positions, in name order, of the peers in the order in which they take turns."""
    # Tensors are in name order, but who is first is the user's choice on the command line.
    names = [peer.name for peer in step.peers]
    return [names.index(name) for name in step.teaching.turns]


def _update(step: Step, place: int, sums: Tensor) -> Tensor:
    """Let one peer take its step; return the means over the whole batch of its parts, [P]."""
    means = step.placement.sum_over_rows(sums)[0] / step.cohort.optim.batch_size
    step.update(step.peers[place], means[0].isfinite())
    return means


def _in_name_order(step: Step, means: list[Tensor]) -> Tensor:
    """Return the parts of all peers, [K, P], from those in the order of turns."""
    found = dict(zip(_turns(step), means, strict=True))
    return torch.stack([found[place] for place in sorted(found)])


def _reduce_requests(step: Step, requests: Requests) -> Tensor:
    """Return how many processes have each request, [R]."""
    placement, ours = step.placement, torch.tensor(requests(), dtype=torch.float32)
    if placement.processes.world_size == 1:
        return ours  # left on the CPU: reading it back from a device would wait
    return placement.sum_over_rows(ours.to(placement.device, non_blocking=True))


_STEPS = {
    "simultaneous": _simultaneous,
    "sequential": _sequential,
    "official": _official,
    "switch": _simultaneous,
}
