"""One optimizer step, by three update schedules. Each returns named parts; none knows the method.

    simultaneous   forward all, exchange, backward all, step all (with --low-memory: predict all,
                   exchange, then each forward and backward, step all)
    sequential     predict all; each peer in turn is updated and predicts the same batch again
                   (Algorithm 1 of the paper: 2K - 1 forward passes)
    official       each peer in turn is updated on a batch of its own, predicted by all (the
                   authors' code: K batches, KLs summed)

Nothing here reads a number back from the device.

Shape letters: K peers, F frozen ones, B rows of a batch, C classes, P parts of a loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_accel.core.config import Config
from dml_accel.core.rng import bounds, key
from dml_accel.data.batches import ImageSet
from dml_accel.distributed.placement import Placement
from dml_accel.models.peer_folder import Frozen
from dml_accel.models.spec import Peer
from dml_accel.mutual.losses import Losses, Targets, mutual_losses
from dml_accel.mutual.teaching import Teaching

PARTS = ("loss", "cross_entropy", "kl")


@dataclass(frozen=True)
class Step:
    """What one optimizer step works with.

    Attributes:
        peers: those trained here, in name order.
        frozen: those that only teach.
        images: the training images.
        number: optimizer steps taken before.
        lr: learning rate.
        config: the run's.
        placement: which rows are ours, and how gradients of several processes meet.
        teaching: who learns what from whom.
    """

    peers: Sequence[Peer]
    frozen: Sequence[Frozen]
    images: ImageSet
    number: int
    lr: float
    config: Config
    placement: Placement
    teaching: Teaching

    def batches(self) -> list[tuple[int, int]]:
        """Return the parts of a batch, first row and one past the last."""
        return list(bounds(self.config.batch_size, self.config.grad_accum))

    def rows(self, batch: int, part: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return our images and labels of a part of a batch of the endless stream."""
        lo, hi = self.placement.rows(part[1] - part[0])
        return self.images.batch(batch, self.config.batch_size, part[0] + lo, part[0] + hi)

    def losses(
        self, logits: Tensor, y: Tensor, targets: Targets | None, batch: int
    ) -> tuple[Losses, Tensor]:
        """Return the losses of some peers on our rows, and their sums by part, [k, P]."""
        config = self.config
        losses = mutual_losses(
            logits,
            y,
            targets,
            kl_weight=self.teaching.weight(self.number, len(self.images) // self.config.batch_size),
            temperature=config.temperature,
            kl_is_summed=config.kl_is_summed,
            label_weight=self.images.label_weight(batch, config.batch_size),
            kl_on_labelled=config.kl_images == "labelled",
        )
        return losses, torch.stack([part.detach().sum(1) for part in losses], 1)

    def backward(self, losses: Losses, peers: Sequence[Peer]) -> None:
        """Add the gradients of our rows' share of the mean over the whole batch."""
        # A sum over our rows divided by the whole batch, so that slices may be uneven.
        scale = self.placement.gradient_scale / self.config.batch_size
        mean = losses.total.sum(1) * scale
        # The scaler of half precision, too, must find nothing finite in what is skipped.
        ones = torch.where(mean.detach().isfinite(), 1.0, math.nan)
        scaled = [peer.scaler.scale(one) for peer, one in zip(peers, ones, strict=True)]
        mean.backward(torch.stack(scaled))

    def forward(self, peer: Peer, x: Tensor, part: int) -> Tensor:
        """Predict for training, with dropout keyed by what it is for."""
        self._key_dropout(peer, part)
        return peer.net(x)

    @torch.no_grad()
    def predict(self, peer: Peer, x: Tensor, part: int) -> Tensor:
        """Predict as in training, without a graph: by the bare network, as DDP wants a backward."""
        self._key_dropout(peer, part)
        return peer.module(x)

    def _key_dropout(self, peer: Peer, part: int) -> None:
        index = self.placement.index
        torch.manual_seed(key("dropout", self.config.seed, self.number, part, peer.name, index))

    def targets(self, logits: Tensor, x: Tensor, count: int) -> Targets | None:
        """Return what our peers are taught on our rows of a part of ``count`` rows; None for 0."""
        if not self.teaching.is_on:
            return None
        return self.placement.targets(logits, count, self.teaching, self.frozen_lessons(x))

    def frozen_lessons(self, x: Tensor) -> Tensor | None:
        """Return what the frozen peers teach on our rows, [F, B, C + 2]; None without any."""
        if not (self.frozen and self.teaching.is_on):
            return None
        logits = torch.stack([one.predict(x) for one in self.frozen])
        return self.teaching.lessons(self.teaching.rounded(logits))


def train_step(step: Step, asks: Callable[[], Sequence[bool]] = list) -> tuple[Tensor, Tensor]:
    """Take one optimizer step.

    Args:
        step: what it works with.
        asks: says at the end of the step what this process asks all others for.

    Returns:
        The mean over the whole batch of loss, cross-entropy and KL of all peers, [K, 3], detached;
        a peer whose loss is not finite stays as it is. And how many processes ask for each thing.
    """
    schedule = _SCHEDULES[step.config.update]
    return schedule(step, asks)


def _simultaneous(step: Step, asks: Callable[[], Sequence[bool]]) -> tuple[Tensor, Tensor]:
    peers, placement = step.peers, step.placement
    for peer in peers:
        peer.begin(step.lr)
    sums = []
    parts = step.batches()
    for number, part in enumerate(parts):
        x, y = step.rows(step.number, part)
        with placement.micro_batch([peer.net for peer in peers], part is parts[-1]):
            learn = _in_turn if one_at_a_time(step.config, step.teaching) else _together
            sums.append(learn(step, x, y, number, part[1] - part[0]))
    means, asked = placement.of_all_peers(torch.stack(sums).sum(0), torch.tensor(asks()))
    means /= step.config.batch_size
    finite = means[:, 0].isfinite()
    for peer in peers:
        peer.update(finite[placement.names.index(peer.name)], step.config.clip_norm)
    return means, asked


def one_at_a_time(config: Config, teaching: Teaching) -> bool:
    """Whether one network's activations are held at a time.

    Where nobody teaches, nothing has to be predicted first: less memory for the same work.
    """
    return config.low_memory or not teaching.is_on


def _together(step: Step, x: Tensor, y: Tensor, part: int, count: int) -> Tensor:
    """Forward all, then backward all; return sums of the parts of all peers' losses, [k, P]."""
    logits = torch.stack([step.forward(peer, x, part) for peer in step.peers])
    targets = step.targets(logits, x, count)
    losses, sums = step.losses(logits, y, targets, step.number)
    step.backward(losses, step.peers)
    return sums


def _in_turn(step: Step, x: Tensor, y: Tensor, part: int, count: int) -> Tensor:
    """As ``_together``, with the activations of one peer at a time: targets come first."""
    targets = None
    if step.teaching.is_on:
        targets = step.targets(torch.stack([_look(step, p, x, part) for p in step.peers]), x, count)
    sums = []
    for place, peer in enumerate(step.peers):
        logits = step.forward(peer, x, part)[None]
        its_own = Targets(*(taught[place : place + 1] for taught in targets)) if targets else None
        losses, found = step.losses(logits, y, its_own, step.number)
        step.backward(losses, [peer])
        sums.append(found)
        del logits, losses  # or they would live on beside the next peer's
    return torch.cat(sums)


def _look(step: Step, peer: Peer, x: Tensor, part: int) -> Tensor:
    with peer.keeping_buffers():
        return step.predict(peer, x, part)


def _sequential(step: Step, asks: Callable[[], Sequence[bool]]) -> tuple[Tensor, Tensor]:
    peers, teaching = step.peers, step.teaching
    for peer in peers:
        peer.begin(step.lr)
    (part,) = step.batches()
    x, y = step.rows(step.number, part)
    logits = [step.forward(peer, x, 0) for peer in peers]
    lessons = frozen = None
    if teaching.is_on:
        lessons = teaching.lessons(teaching.rounded(torch.stack(logits)))
        frozen = step.frozen_lessons(x)
    means, turns = [], _turns(step)
    for place in turns:
        targets = None if lessons is None else _targets_of(place, lessons, frozen, teaching)
        losses, found = step.losses(logits[place][None], y, targets, step.number)
        step.backward(losses, [peers[place]])
        means.append(_update(step, place, found))
        if lessons is not None and place != turns[-1]:  # nobody learns from the last again
            with peers[place].keeping_buffers():
                again = step.predict(peers[place], x, 0)
            lessons[place] = teaching.lessons(teaching.rounded(again[None]))[0]
    return _in_name_order(step, means), _asked(step, asks)


def _official(step: Step, asks: Callable[[], Sequence[bool]]) -> tuple[Tensor, Tensor]:
    peers, teaching = step.peers, step.teaching
    means, parts = [], step.batches()
    for turn, place in enumerate(_turns(step)):
        peers[place].begin(step.lr)
        batch, sums = step.number * len(peers) + turn, []
        for number, part in enumerate(parts):
            x, y = step.rows(batch, part)
            with step.placement.micro_batch([peers[place].net], part is parts[-1]):
                own = step.forward(peers[place], x, number)
                targets = None
                if teaching.is_on:
                    logits = [
                        own if at == place else step.predict(peer, x, number)
                        for at, peer in enumerate(peers)
                    ]
                    lessons = teaching.lessons(teaching.rounded(torch.stack(logits)))
                    targets = _targets_of(place, lessons, step.frozen_lessons(x), teaching)
                losses, found = step.losses(own[None], y, targets, batch)
                step.backward(losses, [peers[place]])
            sums.append(found)
        means.append(_update(step, place, torch.stack(sums).sum(0)))
    return _in_name_order(step, means), _asked(step, asks)


def _turns(step: Step) -> list[int]:
    """Return the places, in name order, of the peers in the order that they take turns in."""
    names = [peer.name for peer in step.peers]
    return [names.index(name) for name in step.teaching.turns]


def _targets_of(place: int, lessons: Tensor, frozen: Tensor | None, teaching: Teaching) -> Targets:
    """Return what one peer learns from all others, where all are here."""
    everyone = lessons if frozen is None else torch.cat([lessons, frozen])
    if teaching.takes_each_alone:
        return teaching.by_links(everyone, [place])
    return teaching.from_the_others(everyone.sum(0), lessons[place][None])


def _update(step: Step, place: int, sums: Tensor) -> Tensor:
    """Let one peer take its step; return the means over the whole batch of its parts, [P]."""
    means = step.placement.sum_over_rows(sums)[0] / step.config.batch_size
    step.peers[place].update(means[0].isfinite(), step.config.clip_norm)
    return means


def _asked(step: Step, asks: Callable[[], Sequence[bool]]) -> Tensor:
    placement, asked = step.placement, torch.tensor(asks(), dtype=torch.float32)
    if placement.processes.world_size == 1:
        return asked  # where it is: to read it back from a device would wait
    return placement.sum_over_rows(asked.to(placement.device, non_blocking=True))


def _in_name_order(step: Step, means: list[Tensor]) -> Tensor:
    """Return the parts of all peers, [K, P], from those in the order of turns."""
    found = dict(zip(_turns(step), means, strict=True))
    return torch.stack([found[place] for place in sorted(found)])


_SCHEDULES = {
    "simultaneous": _simultaneous,
    "sequential": _sequential,
    "official": _official,
}
