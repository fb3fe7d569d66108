"""Divergences: what a peer minimises towards a teacher, as pure functions of log-posteriors.

A divergence is two functions. ``teach`` returns what a teacher contributes, a constant; ``learn``
returns the divergence of a peer from what it was taught. Three kinds go through them:

    linear        learn(own, mean of taught) is the mean of learn(own, taught): several teachers are
                  one, so a step costs O(K), and processes can exchange a sum (kl, jeffreys)
    not linear    every teacher is compared with every peer (renyi, jsd)
    with labels   both functions use the label of the row (dkd, nkd)

p is the posterior of a teacher, q that of the peer that learns, both at the temperature of the run.
``learn`` of zeros is zero for linear divergences: a teacher that is left out contributes nothing.

Shape letters: B rows, C classes, W numbers that are taught; ``...`` stands for peers, teachers or
both, which broadcast.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.lessons import DIVERGENCES


class Divergence(ABC):
    """A divergence D(p || q), or any other function of two posteriors.

    Users derive their own from it; see ``dml_accel.register_divergence``.

    Args:
        arguments: numbers that it takes, by name; see ``core.lessons``.

    Attributes:
        linear: see the module.
        needs_labels: whether it depends on the label of the row.
        defaults: the numbers that one of the user's own takes, and their defaults.
        arguments: see above.
    """

    linear = True
    needs_labels = False
    defaults: ClassVar[Mapping[str, float]] = {}

    def __init__(self, **arguments: float) -> None:
        self.arguments = arguments

    @abstractmethod
    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return what teachers contribute, [..., B, W], from log p [..., B, C], labels [B]."""

    @abstractmethod
    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """Return the divergence in nats, [..., B].

        Args:
            log_q: of the peers that learn, [..., B, C].
            taught: what they were taught, [..., B, W].
            labels: classes, int64, [B]; a row whose label must not be used has any class.
        """


def make_divergence(name: str, arguments: Mapping[str, float] | None = None) -> Divergence:
    """Return a divergence by the name that ``--divergence`` has for it.

    Args:
        name: see above.
        arguments: those that are not the default.

    Raises:
        UsageError: an argument is unknown or out of its range.
    """
    given = [f"{key}={value}" for key, value in (arguments or {}).items()]
    return MAKERS[name](**DIVERGENCES[name].values(given))


# ---------------------------------------------------------------- of posteriors


class KL(Divergence):
    """KL(p || q) = sum p log p - sum p log q (Zhang et al., CVPR 2018, equation 3)."""

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return the posterior and its negative entropy, [..., B, C + 1]."""
        return _with_entropy(log_p)

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        return _kl(taught, log_q)

    @staticmethod
    def of_posterior(p: Tensor) -> Tensor:
        """Return the same as ``teach`` from a posterior, which may have zeros."""
        return torch.cat([p, torch.special.xlogy(p, p).sum(-1, keepdim=True)], dim=-1)


class ReverseKL(Divergence):
    """KL(q || p) = sum q log q - sum q log p."""

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return the log-posterior, and 1 to count the teacher, [..., B, C + 1]."""
        return _with_one(log_p)

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        return _reverse_kl(taught, log_q)


class Jeffreys(Divergence):
    """(KL(p || q) + KL(q || p)) / 2, as in PaddleClas, but with constant teachers.

    With teachers that are not constant, as there, the gradient is the same: each of the two terms
    then pulls on both peers.
    """

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return what both directions need, [..., B, 2 C + 2]."""
        return torch.cat([_with_entropy(log_p), _with_one(log_p)], dim=-1)

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        forward, reverse = taught.chunk(2, dim=-1)
        return (_kl(forward, log_q) + _reverse_kl(reverse, log_q)) / 2


class JSD(Divergence):
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q (arXiv 2306.13649, GKD)."""

    linear = False

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return the log-posterior, [..., B, C]."""
        return log_p

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        b = self.arguments["beta"]
        p, q = taught.exp(), log_q.exp()
        # Where both are 0 in this precision, so is their share of both sums.
        log_m = (b * p + (1 - b) * q).clamp(min=torch.finfo(q.dtype).tiny).log()
        return b * (p * (taught - log_m)).sum(-1) + (1 - b) * (q * (log_q - log_m)).sum(-1)


class Renyi(Divergence):
    """1 / (a - 1) log sum p^a q^(1 - a) (arXiv 2209.05732); its limit at a = 1 is KL(p || q)."""

    linear = False

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return the log-posterior, [..., B, C]."""
        return log_p

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        a = self.arguments["alpha"]
        return (a * taught + (1 - a) * log_q).logsumexp(-1) / (a - 1)


# ---------------------------------------------------------------- with the label


class DKD(Divergence):
    """a KL(b_p || b_q) + c KL(r_p || r_q), decoupled distillation (arXiv 2203.08679).

    b is the pair of the label's posterior and that of all other classes, r the posterior of these
    others among themselves. At a = 1 and c = 1 - p_t it is KL(p || q).
    """

    needs_labels = True

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return b and r, each with its negative entropy, [..., B, C + 4]."""
        label, others = self._parts(log_p, labels)
        # The entropy of r leaves out the label, whose posterior among the others is 0.
        rest = others.exp().masked_fill(_is_label(others, labels), 0.0)
        entropy = (rest * others).sum(-1, keepdim=True)
        return torch.cat([_with_entropy(label), rest, entropy], dim=-1)

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        label, others = self._parts(log_q, labels)
        pair, rest = _kl(taught[..., :3], label), _kl(taught[..., 3:], others)
        return self.arguments["alpha"] * pair + self.arguments["beta"] * rest

    @staticmethod
    def _parts(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log b, [..., B, 2], and log r, [..., B, C], which is 0 at the label."""
        others, rest = _among_others(log_p, labels)
        return torch.cat([of_label(log_p, labels), rest], dim=-1), others


class NKD(Divergence):
    """-p_t log q_t - g L^2 sum over the others of r_p log r_q (arXiv 2303.13005).

    p_t and q_t are posteriors of the label at temperature 1, r those of the others among themselves
    at temperature L. A cross-entropy: it is not 0 where the two peers are equal.
    """

    needs_labels = True

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return p_t and r, [..., B, C + 1]."""
        p = of_label(log_p, labels).exp()
        others, _ = _among_others(log_p / self.arguments["temperature"], labels)
        rest = others.exp().masked_fill(_is_label(others, labels), 0.0)
        return torch.cat([rest, p], dim=-1)

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        temperature = self.arguments["temperature"]
        q = of_label(log_q, labels)
        others, _ = _among_others(log_q / temperature, labels)
        rest = (taught[..., :-1] * others).sum(-1)
        gamma = self.arguments["gamma"] * temperature**2
        return -taught[..., -1] * q[..., 0] - gamma * rest


# ---------------------------------------------------------------- of the teacher's power


class TTM(Divergence):
    """KL(p^g, normalised || q) with q at temperature 1 (arXiv 2402.11148)."""

    weighted = False

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return the powered posterior and its negative entropy, [..., B, C + 1]."""
        gamma = self.arguments["gamma"]
        taught = _with_entropy(F.log_softmax(gamma * log_p, dim=-1))
        if self.weighted:
            sums = (gamma * log_p).logsumexp(-1, keepdim=True)
            taught = taught * sums.exp()
        return taught

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        return _kl(taught, log_q)


class WTTM(TTM):
    """The same times sum p^g, which is large for an even posterior."""

    weighted = True


PairFunction = Callable[[Tensor, Tensor, Tensor, Mapping[str, float]], Tensor]


class OfPairs(Divergence):
    """A divergence that is one function of a teacher and a peer, [N, C] each: the user's own.

    Args:
        function: of log p and log q, [N, C], labels [N], and the arguments; returns [N].
        needs_labels: whether it uses the labels.
        arguments: see ``Divergence``.
    """

    linear = False

    def __init__(self, function: PairFunction, needs_labels: bool, **arguments: float) -> None:
        super().__init__(**arguments)
        self._function, self.needs_labels = function, needs_labels

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Return the log-posterior, [..., B, C]."""
        return log_p

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """See ``Divergence``."""
        # Zeros stand for a teacher that does not count. They are no posterior, of which the
        # function may make infinity, and 0 times that is not a number.
        is_left_out = (taught == 0).all(-1, keepdim=True)
        log_p = torch.where(is_left_out, -math.log(taught.shape[-1]), taught)
        log_p, log_q = torch.broadcast_tensors(log_p, log_q)
        shape = log_q.shape
        flat = labels.expand(shape[:-1]).reshape(-1)
        pairs = log_p.reshape(-1, shape[-1]), log_q.reshape(-1, shape[-1])
        return self._function(*pairs, flat, self.arguments).reshape(shape[:-1])


# How each is made from its arguments; users add their own.
MAKERS: dict[str, Callable[..., Divergence]] = {
    "kl": KL,
    "reverse-kl": ReverseKL,
    "jeffreys": Jeffreys,
    "jsd": JSD,
    "renyi": Renyi,
    "dkd": DKD,
    "nkd": NKD,
    "ttm": TTM,
    "wttm": WTTM,
}


# ---------------------------------------------------------------- parts


def _with_entropy(log_p: Tensor) -> Tensor:
    """Return posteriors and, behind them, their negative entropies."""
    p = log_p.exp()
    return torch.cat([p, (p * log_p).sum(-1, keepdim=True)], dim=-1)


def _with_one(log_p: Tensor) -> Tensor:
    """Return log-posteriors and, behind them, 1: how much of a teacher the mean has."""
    return torch.cat([log_p, torch.ones_like(log_p[..., :1])], dim=-1)


def _kl(taught: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) from what ``_with_entropy`` returns."""
    return taught[..., -1] - (taught[..., :-1] * log_q).sum(-1)


def _reverse_kl(taught: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p) from what ``_with_one`` returns."""
    q = log_q.exp()
    return taught[..., -1] * (q * log_q).sum(-1) - (q * taught[..., :-1]).sum(-1)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Return the values of the labels, [..., B, 1], of values [..., B, C]."""
    return values.gather(-1, labels[:, None].expand(*values.shape[:-1], 1))


def _is_label(values: Tensor, labels: Tensor) -> Tensor:
    """Return a mask [B, C] of the labels."""
    return torch.arange(values.shape[-1], device=values.device) == labels[:, None]


def _among_others(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-posteriors of the classes but the label among themselves, and their logsumexp.

    Returns:
        [..., B, C], 0 at the label; and [..., B, 1].
    """
    label = _is_label(log_p, labels)
    sums = log_p.masked_fill(label, -math.inf).logsumexp(-1, keepdim=True)
    # Not minus infinity at the label, because 0 times that is not a number.
    return (log_p - sums).masked_fill(label, 0.0), sums
