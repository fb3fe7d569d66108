"""What peers learn from their teachers: targets, from the logits of all.

Every teacher makes a *contribution* per image. What a peer learns is made of the contributions of
its teachers: of their sum, where that is enough, so that the sum over all peers serves every peer,
which subtracts its own. Where it is not, of every one by itself.

Shape letters: K peers that learn, L teachers, B rows of the batch, C classes, W numbers that are
taught (see ``divergences``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.flags import refuse
from dml_accel.core.lessons import TARGETS
from dml_accel.core.method import MethodConfig
from dml_accel.mutual.divergences import KL, Divergence, make_divergence, of_label

_EPSILON = 1e-7  # of arXiv 2403.01427, added to the deviation


class Targets(NamedTuple):
    """What every peer learns from its teachers, row by row: constants.

    Attributes:
        taught: the mean of what its teachers teach each peer, [K, B, W]; with ``shares``, what
            each teacher teaches, [L, B, W].
        teachers: number of teachers, or sum of the weights of their links, [K, B].
        shares: of every teacher in the mean of each peer, [K, L, B]; None if a mean is enough.
        behind: what the schedule ``switch`` compares, [K, B, 2]; see ``Teaching``. Else None.
    """

    taught: Tensor
    teachers: Tensor
    shares: Tensor | None = None
    behind: Tensor | None = None

    def of(self, place: int) -> "Targets":
        """Return those of one peer, [1, ...]."""
        one = slice(place, place + 1)
        return Targets(
            self.taught[one] if self.shares is None else self.taught,
            self.teachers[one],
            None if self.shares is None else self.shares[one],
            None if self.behind is None else self.behind[one],
        )


class Target(ABC):
    """A target of the user's own that is made of a sum over the teachers.

    See ``dml_accel.register_target``. Logits are those of the run over T; none have gradients.

    Attributes:
        shared: whether all peers have the same target, of which they are part themselves.
        needs_labels: whether it depends on the label of the row.
    """

    shared = False
    needs_labels = False

    @abstractmethod
    def contribute(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what teachers contribute, [..., B, W], from logits [..., B, C] and labels [B]."""

    @abstractmethod
    def combine(self, mean: Tensor, labels: Tensor) -> Tensor:
        """Return the logits over T of targets, [..., B, C].

        Args:
            mean: of what the teachers of each peer contribute, [..., B, W]. It is a difference of
                sums, known up to their rounding: one of positive numbers may be just below 0.
            labels: classes, int64, [B]; a row whose label must not be used has any class.
        """


# Of the logits over T of all teachers, [L, B, C], their weights, [L, B], which are 0 where a
# teacher does not count, and labels, [B]: the logits over T of a target, [B, C].
TargetFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
OWN_TARGETS: dict[str, Target | TargetFunction] = {}  # of users, by name


class Lesson:
    """How peers learn: a target, a divergence from it, and what is done to logits before.

    Args:
        target: a name in ``core.lessons.TARGETS``.
        divergence: which the peers minimise (default: KL).
        temperature: T.
        standardize: whether logits get a mean of 0 and a deviation of 1 over the classes.
        gate: ``correct``, or ``none``: which predictions teach.
    """

    def __init__(
        self,
        target: str = "peers",
        divergence: Divergence | None = None,
        temperature: float = 1.0,
        *,
        standardize: bool = False,
        gate: str = "none",
    ) -> None:
        self.target, self.divergence = TARGETS[target], divergence or KL()
        self._own = OWN_TARGETS.get(target)
        self.temperature, self.standardize, self.gated = temperature, standardize, gate == "correct"

    @classmethod
    def of(cls, method: MethodConfig) -> "Lesson":
        """Return the lesson that a configuration asks for.

        Raises:
            UsageError: its divergence or target is not registered.
        """
        method.refuse_missing()
        return cls(
            method.target,
            make_divergence(method.divergence, method.facts.values(method.divergence_args)),
            method.temperature,
            standardize=method.standardize,
            gate=method.gate,
        )

    @property
    def by_pairs(self) -> bool:
        """Whether every teacher is compared with every peer."""
        return not (self.target.is_single or self.divergence.linear)

    @property
    def weighs_each(self) -> bool:
        """Whether the weight of every teacher for every peer must be known, not only a sum."""
        makes_each = self.target.needs_pairs and not self.target.is_shared
        return self.by_pairs or makes_each

    def refuse_mixed(self) -> None:
        """Refuse images that were mixed with others, if a label decides what is learned.

        Raises:
            UsageError: the text says what needs it.
        """
        needs = self.target.needs_labels or self.divergence.needs_labels or self.gated
        refuse(needs, "what is learned depends on the label, and mixed images have two each")

    # ------------------------------------------------------------ teaching

    @torch.no_grad()
    def contributions(self, logits_LBC: Tensor, labels_B: Tensor) -> Tensor:
        """Return what each teacher contributes to the targets of those it teaches.

        Args:
            logits_LBC: logits of some peers for the same B images.
            labels_B: classes, int64; -1 where there is none.

        Returns:
            [L, B, ...], at least in single precision; the last number is 1 to count the teacher.
            All are 0 where the logits are not finite: such a row would spoil the sum that all other
            peers learn from.
        """
        scaled = self._scaled(at_least_single(logits_LBC))
        log_p = F.log_softmax(scaled, dim=-1)
        finite = log_p.isfinite().all(-1, keepdim=True)  # [L, B, 1]
        found = torch.where(finite, self._contributed(logits_LBC, scaled, log_p, labels_B), 0.0)
        return torch.cat([found, finite.to(found.dtype)], dim=-1)

    def _contributed(self, logits: Tensor, scaled: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self._own, Target):
            return self._own.contribute(scaled, self._known(labels))
        if self.target.name == "best":
            log_1 = F.log_softmax(at_least_single(logits), dim=-1)
            return torch.cat([scaled, -of_label(log_1, self._known(labels))], dim=-1)
        if self.target.name == "min-logit":
            return scaled - of_label(scaled, self._known(labels))
        if self.target.name == "mean-prob":
            return log_p.exp()
        if self.target.is_single:
            return scaled
        taught = self.divergence.teach(log_p, self._known(labels))
        if not self.gated:
            return taught
        gate = (logits.argmax(-1) == labels).to(taught.dtype)[..., None]
        # Multiplied here where that is the same; else it is part of the teacher's share.
        return torch.cat([taught, gate], dim=-1) if self.by_pairs else taught * gate

    # ------------------------------------------------------------ targets

    @torch.no_grad()
    def targets(
        self,
        everyone_LBW: Tensor,
        own_KBW: Tensor,
        labels_B: Tensor,
        links_KL: Tensor | None = None,
    ) -> Targets:
        """Return the targets of K peers.

        Args:
            everyone_LBW: ``contributions`` of all peers and frozen ones; where sums are enough, it
                may be their sum, with L = 1.
            own_KBW: those of the peers that learn; without links, a peer does not learn from itself
                but from all others alike.
            labels_B: as for ``contributions``.
            links_KL: weight of every teacher for every peer; None if all teach all alike. Not for
                targets that all peers share.
        """
        if self.target.is_shared:
            one = self._single(*self._shared(everyone_LBW, labels_B), labels_B)
            learners = len(own_KBW)
            return Targets(one.taught.expand(learners, -1, -1), one.teachers.expand(learners, -1))
        if self.weighs_each:
            if links_KL is None:
                links_KL = 1 - torch.eye(len(own_KBW), dtype=own_KBW.dtype, device=own_KBW.device)
            if self.by_pairs:
                return self._pairs(everyone_LBW, links_KL)
            return self._single(*self._each(everyone_LBW, links_KL, labels_B), labels_B)
        if links_KL is None:
            # O(K): one sum serves every peer, each subtracts itself.
            mean, teachers = _mean(everyone_LBW.sum(0) - own_KBW)
        else:
            mean, teachers = _mean(torch.einsum("kl,lbw->kbw", links_KL, everyone_LBW))
        if self.target.is_single:
            return self._single(mean, teachers, labels_B)
        return Targets(mean, teachers)

    def _pairs(self, everyone: Tensor, links: Tensor) -> Targets:
        """Return targets that hold what every teacher teaches, and its share for every peer."""
        taught, weights = everyone[..., :-1], links[..., None] * everyone[..., -1]  # [K, L, B]
        teachers = weights.sum(1)
        shares = weights / torch.where(teachers > 0, teachers, 1.0)[:, None]
        if self.gated:
            taught, gates = taught[..., :-1], taught[..., -1]
            shares = shares * gates
        return Targets(taught, teachers, shares)

    def _each(self, everyone: Tensor, links: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets made by a function, as logits over T, [K, B, C], and weights [K, B]."""
        assert callable(self._own)
        logits, known = everyone[..., :-1], self._known(labels)
        weights = links[..., None] * everyone[..., -1]  # [K, L, B]
        found = [self._own(logits, one, known) for one in weights]
        return torch.stack(found), weights.sum(1)

    def _shared(self, everyone: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the one target of all peers as logits over T, [1, B, C], and how many made it."""
        if not self.target.needs_pairs:
            return _mean(everyone.sum(0, keepdim=True))
        if self._own is not None:
            return self._each(everyone, everyone.new_ones(1, len(everyone)), labels)
        content, counts = everyone[..., :-1], everyone[..., -1]  # [L, B, W], [L, B]
        # A teacher that does not count is never the smallest.
        content = content.masked_fill((counts == 0)[..., None], torch.inf)
        teachers = counts.sum(0, keepdim=True)
        if self.target.name == "min-logit":
            found = content.amin(0, keepdim=True)
        else:
            best = content[..., -1:].argmin(0, keepdim=True)  # the first in name order on a tie
            found = content[..., :-1].gather(0, best.expand(-1, -1, content.shape[-1] - 1))
        return torch.where(teachers[..., None] > 0, found, 0.0), teachers

    def _single(self, mean: Tensor, teachers: Tensor, labels: Tensor) -> Targets:
        """Return the targets of peers that have one each, [K, B, C]: a posterior, or logits / T."""
        if isinstance(self._own, Target):
            mean = self._own.combine(mean, self._known(labels))
        if type(self.divergence) is KL:  # not one that a user derives from it
            # A difference of sums may be just below 0.
            by_posterior = self.target.name == "mean-prob"
            p = mean.clamp(min=0) if by_posterior else F.softmax(mean, dim=-1)
            taught = self.divergence.of_posterior(p)
        else:
            taught = self.divergence.teach(F.log_softmax(mean, dim=-1), self._known(labels))
        return Targets(torch.where(teachers[..., None] > 0, taught, 0.0), teachers)

    # ------------------------------------------------------------ learning

    def learn(
        self, logits_KBC: Tensor, log_p_KBC: Tensor, targets: Targets, labels_B: Tensor
    ) -> Tensor:
        """Return the divergence of K peers from their targets times T^2, [K, B], in nats.

        Args:
            logits_KBC: of these peers, at least in single precision.
            log_p_KBC: their log-posteriors at temperature 1.
            targets: of these peers.
            labels_B: as for ``contributions``.
        """
        same = self.temperature == 1 and not self.standardize  # one softmax serves both terms
        log_q = log_p_KBC if same else F.log_softmax(self._scaled(logits_KBC), dim=-1)
        known = self._known(labels_B)
        if targets.shares is not None:
            each = self.divergence.learn(log_q[:, None], targets.taught, known)  # [K, L, B]
            found = (each * targets.shares).sum(1)
        else:
            found = self.divergence.learn(log_q, targets.taught, known)
            if not self.divergence.linear:
                found = found * (targets.teachers > 0)  # of a linear one, it is 0 already
        return found * self.temperature**2  # gradients shrink by 1 / T^2

    def _known(self, labels: Tensor) -> Tensor:
        """Return labels with any class where there is none: the row is multiplied by 0 later."""
        needed = self.divergence.needs_labels or self.target.needs_labels
        return labels.clamp(min=0) if needed else labels

    def _scaled(self, logits: Tensor) -> Tensor:
        """Return logits, standardised if that is asked for, over T."""
        if self.standardize:
            # The deviation of equal logits is 0, and so is its gradient: not 0 / 0.
            centred = logits - logits.mean(-1, keepdim=True)
            logits = centred / (_deviation(centred) + _EPSILON)
        return logits / self.temperature


def _mean(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return means over teachers, and how many they are, from sums of contributions."""
    content, teachers = sums[..., :-1], sums[..., -1]
    return content / torch.where(teachers > 0, teachers, 1.0)[..., None], teachers  # of none: 0


def _deviation(centred: Tensor) -> Tensor:
    """Return the unbiased standard deviation over the classes, [..., 1]."""
    variance = centred.square().sum(-1, keepdim=True) / (centred.shape[-1] - 1)
    is_even = variance == 0
    return torch.where(is_even, 0.0, torch.where(is_even, 1.0, variance).sqrt())


def at_least_single(logits: Tensor) -> Tensor:
    """Return logits in single precision, or in double if they are double."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
