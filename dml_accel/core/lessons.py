"""Targets and divergences: what is known of them without torch, for checking and for --help.

``mutual.divergences`` and ``mutual.targets`` have the mathematics.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dml_accel.core.assignments import assignment, number_of, refuse_repeated
from dml_accel.core.errors import UsageError
from dml_accel.core.flags import Range, refuse

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_NEAR = 1e-3  # a Renyi divergence of an order so near to 1 is lost in the rounding of float32


@dataclass(frozen=True)
class Argument:
    """A number that a divergence takes: its default, and what is allowed."""

    default: float
    allowed: Range


@dataclass(frozen=True)
class DivergenceFacts:
    """One divergence.

    Attributes:
        name: the value of ``--divergence``.
        text: what it is, for ``--help``.
        linear: the mean over several teachers is the divergence from the mean of what they teach,
            so that a step costs O(K), and peers can exchange sums.
        needs_labels: it depends on the label of the image.
        own_temperature: it does not use ``--temperature``.
        taught: how many numbers a teacher contributes per image of C classes.
        arguments: the numbers that it takes, by name.
        own: the function or class that a user has registered; None for those of the package.
        missing: only the record of a run names it: nothing can be trained with it here.
    """

    name: str
    text: str
    linear: bool = True
    needs_labels: bool = False
    own_temperature: bool = False
    taught: Callable[[int], int] = lambda classes: classes + 1
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    own: Callable[..., Any] | None = None
    missing: bool = False

    @property
    def usual(self) -> str:
        """The arguments with their defaults, as they are given."""
        return " ".join(f"{name}={one.default:g}" for name, one in self.arguments.items())

    def values(self, given: Sequence[str]) -> dict[str, float]:
        """Return the value of every argument, from those that are given as ``key=value``.

        Raises:
            UsageError: one is unknown, given twice, no number or out of its range.
        """
        pairs = [assignment("--divergence-args", text) for text in given]
        refuse_repeated("--divergence-args", [name for name, _ in pairs])
        if self.missing:  # they were checked when it was trained
            return {name: number_of("--divergence-args", name, text) for name, text in pairs}
        found = {name: one.default for name, one in self.arguments.items()}
        for name, text in pairs:
            if name not in found:
                known = " ".join(self.arguments) or "none"
                raise UsageError(
                    f"--divergence-args {name}: --divergence {self.name} has no such argument; "
                    f"it takes {known}"
                )
            value = number_of("--divergence-args", name, text)
            allowed = self.arguments[name].allowed
            if not math.isfinite(value):
                raise UsageError(f"--divergence-args {name} is {text}; it must be a finite number")
            if value not in allowed:
                raise UsageError(f"--divergence-args {name} is {text}; it must be {allowed}")
            found[name] = value
        if self.name == "renyi" and abs(found["alpha"] - 1) < _NEAR:
            raise UsageError(
                f"--divergence-args alpha={found['alpha']:g} is within {_NEAR:g} of 1, the limit "
                "that --divergence kl is: single precision cannot tell them apart"
            )
        return found


_SHARE = Range(above=0, below=1)
_POSITIVE = Range(above=0)
_WEIGHT = Range(at_least=0)
_DIVERGENCES = (
    DivergenceFacts("kl", "KL(p || q)"),
    DivergenceFacts("reverse-kl", "KL(q || p)"),
    DivergenceFacts("jeffreys", "half the sum of both", taught=lambda classes: 2 * (classes + 1)),
    DivergenceFacts(
        "jsd",
        "beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q",
        linear=False,
        arguments={"beta": Argument(0.5, _SHARE)},
    ),
    DivergenceFacts(
        "renyi",
        "the Renyi divergence of order alpha",
        linear=False,
        arguments={"alpha": Argument(2.0, _POSITIVE)},
    ),
    DivergenceFacts(
        "dkd",
        "decoupled: alpha times the KL of label against the rest, beta times that among the rest",
        needs_labels=True,
        taught=lambda classes: classes + 4,
        arguments={"alpha": Argument(1.0, _WEIGHT), "beta": Argument(8.0, _WEIGHT)},
    ),
    DivergenceFacts(
        "nkd",
        "p of the label times -log q of the label, and gamma L^2 times the cross-entropy among the "
        "rest at temperature L",
        needs_labels=True,
        own_temperature=True,
        arguments={"gamma": Argument(1.5, _WEIGHT), "temperature": Argument(1.0, _POSITIVE)},
    ),
    DivergenceFacts(
        "ttm",
        "KL(p^gamma, normalised || q)",
        own_temperature=True,
        arguments={"gamma": Argument(0.1, _POSITIVE)},
    ),
    DivergenceFacts(
        "wttm",
        "the same times the sum of p^gamma",
        own_temperature=True,
        arguments={"gamma": Argument(0.1, _POSITIVE)},
    ),
)
DIVERGENCES = {one.name: one for one in _DIVERGENCES}


@dataclass(frozen=True)
class TargetFacts:
    """One target.

    Attributes:
        name: the value of ``--target``.
        text: what it is, for ``--help``.
        is_single: a peer has one KL term, not one for each of its teachers.
        is_shared: all peers have the same one, which they are part of themselves.
        needs_pairs: a sum over the peers is not enough to make it.
        needs_labels: it depends on the label of the image.
        contributed: how many numbers a peer contributes per image of C classes; not for ``peers``.
        own, missing: as for a divergence.
    """

    name: str
    text: str
    is_single: bool = True
    is_shared: bool = False
    needs_pairs: bool = False
    needs_labels: bool = False
    contributed: Callable[[int], int] = lambda classes: classes
    own: Callable[..., Any] | None = None
    missing: bool = False


_TARGETS = (
    TargetFacts("peers", "the posterior of every other peer", is_single=False),
    TargetFacts("mean-prob", "their mean (the paper's DML_e: the same gradients)"),
    TargetFacts("mean-logit", "the posterior of their mean logits"),
    TargetFacts(
        "mean-logit-all",
        "that of the mean logits of all peers, the learner among them",
        is_shared=True,
    ),
    TargetFacts(
        "best",
        "the posterior of the peer with the smallest cross-entropy on the image, perhaps the "
        "learner (KDCL-Naive)",
        is_shared=True,
        needs_pairs=True,
        needs_labels=True,
    ),
    TargetFacts(
        "min-logit",
        "that of the smallest logit of any peer for each class, counted from the label's "
        "(KDCL-MinLogit)",
        is_shared=True,
        needs_pairs=True,
        needs_labels=True,
    ),
)
TARGETS = {one.name: one for one in _TARGETS}


# ---------------------------------------------------------------- of the user's own


def refuse_name(kind: str, name: object, ours: Collection[str]) -> None:
    """Refuse a name that cannot be registered.

    Args:
        kind: what is registered, for the message: ``divergence``.
        name: see above.
        ours: names that are taken.
    """
    allowed = isinstance(name, str) and _NAME.fullmatch(name)
    refuse(
        not allowed,
        f"{kind} {name!r}: a name has letters, digits, - and _, at most 40, and begins with a "
        "letter",
    )
    taken = {one.lower() for one in ours}
    refuse(
        str(name).lower() in taken,
        f"{kind} {name!r} is one of the package: choose another name",
    )


def allow_recorded(record: object) -> None:
    """Let configurations have what the record of a run names, though nobody has registered it here.

    Such a run can be read, evaluated and reported; ``MethodConfig.refuse_missing`` is for training.

    Args:
        record: ``registered`` of a file of a run, which anybody may have written.
    """
    for flag in ("divergence", "target"):
        one = record.get(flag) if isinstance(record, dict) else None
        name = one.get("name") if isinstance(one, dict) else None
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            continue
        if flag == "divergence":
            DIVERGENCES.setdefault(name, DivergenceFacts(name, "not registered here", missing=True))
        else:
            TARGETS.setdefault(name, TargetFacts(name, "not registered here", missing=True))
