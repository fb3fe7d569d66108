"""Who teaches whom, and what: one object that every update schedule uses.

A peer's target is made from the *contributions* of its teachers (``targets.Lesson``): W numbers per
image. Where it can be made of their sum, every peer's sum is the sum over all less its own.

Shape letters: K peers that are trained, k of them in this process, F frozen ones, B rows of a
micro-batch, C classes, W numbers of a contribution.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dml_accel.core.method import MethodConfig
from dml_accel.data.mixing import Mixed
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.links import LinkWeights
from dml_accel.mutual.losses import Losses, mutual_losses
from dml_accel.mutual.pausing import behind
from dml_accel.mutual.targets import Lesson, Targets, at_least_single


class Teaching:
    """What the peers of a run learn from each other.

    Args:
        method: target, temperature, KL weight and links.
        peers: names of the peers that are trained, in the order of the command line, in which they
            take turns.
        frozen: names of the frozen peers.
        links: weights by name, from ``links.read_links``; None if all teach all alike.
        exchange: ``--exchange``.
        exchange_dtype: ``--exchange-dtype``.

    Attributes:
        is_on: whether there is a KL term in any step; at weight 0 it is not computed.
        lesson: the target, the divergence and what is done to logits before.
        by_averages: whether the averages of the peers' weights teach, not the weights themselves.
        by_snapshots: whether their weights at the last exchange do.
        turns: names of the peers that are trained, in the order in which they take turns.
    """

    def __init__(
        self,
        method: MethodConfig,
        peers: Sequence[str],
        frozen: Sequence[str] = (),
        links: LinkWeights | None = None,
        *,
        exchange: str = "logits",
        exchange_dtype: str | None = None,
    ) -> None:
        self._method, self._exchange = method, exchange
        self.turns, names = list(peers), sorted(peers)
        self.is_on = method.kl_weight > 0 and len(names) + len(frozen) > 1
        self.by_averages = method.teach_with == "ema"
        self.by_snapshots = self.is_on and method.exchange_every > 1
        self._exchange_dtype = torch.bfloat16 if exchange_dtype == "bf16" else None
        self._teachers = [*names, *frozen]
        self.lesson = Lesson.of(method)
        if links is None and self.lesson.weighs_each:
            # Each teacher has a share of its own, so that all weights are written out.
            links = {k: {one: 1.0 for one in self._teachers if one != k} for k in names}
        self._links: Tensor | None = None
        self._rows: dict[tuple[int, ...], Tensor] = {}  # of the links, on the device
        if links is not None:
            rows = [[links[k].get(teacher, 0.0) for teacher in self._teachers] for k in names]
            self._links = torch.tensor(rows, dtype=torch.float64)

    def is_on_in(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 0) has a KL term."""
        return self.is_on and step >= self._method.burn_in

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        """Return the KL weight of a step that has a KL term; never 0 during warm-up."""
        steps = self._method.kl_warmup * steps_per_epoch
        weight = self._method.kl_weight
        if not steps:
            return weight
        done = min(1.0, (step - self._method.burn_in + 1) / steps)
        if self._method.kl_ramp == "sigmoid":  # of Laine and Aila, arXiv 1610.02242
            done = math.exp(-5 * (1 - done) ** 2)
        return weight * done

    def teachers_of(self, peer: str) -> list[str]:
        """Return the names of a peer's teachers, in name order, frozen ones last."""
        if not self.is_on:
            return []
        if self._links is None:
            return [name for name in self._teachers if name != peer]
        row = self._links[sorted(self.turns).index(peer)].tolist()
        return [name for name, weight in zip(self._teachers, row, strict=True) if weight > 0]

    # ------------------------------------------------------------ contributions and targets

    def contributions(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what peers with these logits [K, B, C] contribute to targets, [K, B, W].

        Args:
            logits: of some peers.
            labels: classes, [B]; -1 where there is none.
        """
        return self.lesson.contributions(self._rounded(logits), labels)

    def _rounded(self, logits: Tensor) -> Tensor:
        """Return logits as they teach, under every placement: at least in single precision."""
        logits = at_least_single(logits.detach())
        if self._exchange_dtype is None:
            return logits
        return logits.to(self._exchange_dtype).to(logits.dtype)

    def targets(
        self,
        logits: Tensor,
        labels: Tensor,
        count: int,
        placement: Placement,
        frozen: Tensor | None = None,
    ) -> Targets:
        """Return the targets of our peers on our rows, exchanged between processes if needed.

        Args:
            logits: of our peers for our rows, [k, B, C]; or of all peers, [K, B, C], where they are
                here already, so that none are exchanged.
            labels: classes of our rows, [B]; -1 where there is none.
            count: rows of the whole micro-batch, over all slices.
            placement: which peers and rows are ours.
            frozen: contributions of the frozen peers for our rows, [F, B, W].
        """
        logits = self._rounded(logits)
        own = self.lesson.contributions(logits, labels)
        gathered, places = logits, [placement.names.index(name) for name in placement.mine]
        if placement.holds_all:
            everyone = own
        elif len(logits) == len(placement.names):
            everyone, own = own, torch.stack([own[place] for place in places])
        elif self._exchange == "sum":
            everyone = placement.sum_over_peers(own, count)[None]
        else:
            gathered = placement.gather(logits, count, self._exchange_dtype)
            everyone = self.lesson.contributions(gathered, labels)  # [K, B, W]
        found = self._make_targets(everyone, own, labels, places, frozen)
        if self._method.schedule.pauses:
            found = found._replace(behind=behind(gathered, labels)[places[0] : places[-1] + 1])
        return found

    def targets_of(
        self, place: int, everyone: Tensor, labels: Tensor, frozen: Tensor | None
    ) -> Targets:
        """Return the targets of one peer, where this process holds all peers.

        Args:
            place: of the peer, in name order.
            everyone: contributions of all peers, [K, B, W].
            labels: classes, [B]; -1 where there is none.
            frozen: of the frozen peers, [F, B, W].
        """
        return self._make_targets(everyone, everyone[place][None], labels, [place], frozen)

    def _make_targets(
        self,
        everyone: Tensor,
        own: Tensor,
        labels: Tensor,
        places: Sequence[int],
        frozen: Tensor | None,
    ) -> Targets:
        """Return the targets of the peers at ``places``, from contributions [., B, W]."""
        if frozen is not None:
            everyone = torch.cat([everyone, frozen])
        links = None
        if self._links is not None:
            links = self._rows_of(self._links, tuple(places), everyone)
        return self.lesson.targets(everyone, own, labels, links)

    def _rows_of(self, links: Tensor, places: tuple[int, ...], like: Tensor) -> Tensor:
        """Return some rows of the links on the device and in the dtype of ``like``."""
        rows = self._rows.get(places)
        if rows is None or (rows.device, rows.dtype) != (like.device, like.dtype):
            # Copied once, so that no step waits for a copy to the device.
            rows = self._rows[places] = links[list(places)].to(like, non_blocking=like.is_cuda)
        return rows

    # ------------------------------------------------------------ losses

    def losses(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: Targets | None,
        *,
        kl_weight: float,
        label_weight: Tensor | None,
        mixed: Mixed | None = None,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> Losses:
        """Return the losses of peers with logits [K, B, C] on B rows; see ``mutual_losses``."""
        return mutual_losses(
            logits,
            labels,
            targets,
            self.lesson,
            kl_weight=kl_weight,
            ce_weight=self._method.ce_weight,
            sums_kl=self._method.sums_kl,
            label_weight=label_weight,
            kl_on_labelled=self._method.kl_images == "labelled",
            mixed=mixed,
            label_smoothing=label_smoothing,
            class_weights_C=class_weights,
        )
