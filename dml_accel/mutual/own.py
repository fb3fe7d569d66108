"""Divergences and targets of the user's own: made from functions and classes, and checked once.

The check calls them with a small random example. What it refuses would train something else than
what was meant, or would train it differently in several processes: rows that depend on each other,
inputs that are changed in place, draws, a teacher that counts although its weight is 0.

Shape letters: K peers that learn, L teachers, B rows, C classes, W numbers that are taught, N rows
of pairs.
"""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.flags import Range, refuse
from dml_accel.core.lessons import Argument, DivergenceFacts, TargetFacts
from dml_accel.mutual.divergences import Divergence, OfPairs
from dml_accel.mutual.targets import Target, TargetFunction

_K, _L, _B, _C = 3, 4, 6, 5  # of the example
_CLOSE = 1e-9


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a function of the user's.

    Attributes:
        names: the tensors that it takes: its own name for each, by ours.
        numbers: the others, with their defaults.
    """

    names: dict[str, str]
    numbers: dict[str, float]

    def call(
        self, function: Callable[..., Any], tensors: Mapping[str, Tensor], **numbers: float
    ) -> Any:
        """Call the function with those of the tensors that it takes."""
        return function(**{name: tensors[one] for one, name in self.names.items()}, **numbers)


def _parameters(
    what: str, function: Any, required: Sequence[str], optional: Sequence[str], numbers: bool
) -> _Parameters:
    """Read what a function takes: tensors by name, perhaps with their shape behind (labels_B)."""
    names: dict[str, str] = {}
    found: dict[str, float] = {}
    known = [*required, *optional]
    allowed = " and ".join([*required, *(f"perhaps {one}" for one in optional)])
    for one in inspect.signature(function).parameters.values():
        ours = re.sub(r"_[A-Z]+$", "", one.name)
        refuse(
            one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY),
            f"{what}: its parameter {one.name} cannot be given by name; it takes {allowed}",
        )
        if ours in known:
            names[ours] = one.name
            continue
        refuse(not numbers, f"{what}: its parameter {one.name} is unknown; it takes {allowed}")
        found[one.name] = _number(what, one.name, one.default)
    missing = [one for one in required if one not in names]
    refuse(bool(missing), f"{what}: it has no parameter {', '.join(missing)}; it takes {allowed}")
    return _Parameters(names, found)


def _number(what: str, name: str, value: Any) -> float:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    refuse(
        not (is_one and math.isfinite(value)),
        f"{what}: {name} needs a finite number as its default, which --divergence-args changes",
    )
    return float(value)


# ---------------------------------------------------------------- divergences


def own_divergence(
    name: str, text: str, thing: Any
) -> tuple[DivergenceFacts, Callable[..., Divergence]]:
    """Return the facts of a divergence, and what makes it from its arguments.

    Args:
        name: of ``--divergence``.
        text: for ``--help``.
        thing: a function, or a subclass of ``Divergence``.

    Raises:
        UsageError: it cannot be used; the text says why.
    """
    what = f"divergence {name!r}"
    make: Callable[..., Divergence]
    if isinstance(thing, type):
        if not issubclass(thing, Divergence):
            raise UsageError(
                f"{what}: the class {thing.__name__} is not a subclass of dml_accel.Divergence"
            )
        make = thing
        numbers = {key: _number(what, key, one) for key, one in thing.defaults.items()}
    else:
        refuse(not inspect.isfunction(thing), f"{what}: register a function or a class")
        taken = _parameters(what, thing, ("log_p", "log_q"), ("labels",), numbers=True)
        numbers = taken.numbers

        def of_pairs(log_p: Tensor, log_q: Tensor, labels: Tensor, given: Any) -> Tensor:
            tensors = {"log_p": log_p, "log_q": log_q, "labels": labels}
            found: Tensor = taken.call(thing, tensors, **given)
            return found

        def make(**arguments: float) -> Divergence:
            return OfPairs(of_pairs, "labels" in taken.names, **arguments)

        _checked(
            what,
            "it",
            lambda p, q, labels: of_pairs(p, q, labels, numbers),
            [(one, -2) for one in _log_posteriors(2)] + [(_labels(), -1)],
            (_B,),
        )
    with _explaining(what, "its class cannot be made"):
        made = make(**numbers)
    _check_divergence(what, made)

    def taught(classes: int) -> int:
        example = torch.full((1, classes), -math.log(classes))
        return made.teach(example, torch.zeros(1, dtype=torch.int64)).shape[-1]

    facts = DivergenceFacts(
        name,
        text,
        linear=made.linear,
        needs_labels=made.needs_labels,
        taught=taught,
        arguments={key: Argument(one, Range()) for key, one in numbers.items()},
        own=thing,
    )
    return facts, make


def _check_divergence(what: str, made: Divergence) -> None:
    log_p, labels = _log_posteriors(_L), _labels()
    taught = _checked(what, "teach", made.teach, [(log_p, -2), (labels, -1)], (_L, _B, None), -2)
    leaf = _log_posteriors(_K, seed=1).requires_grad_()
    log_q, other = leaf * 1, (labels + 1) % _C
    cases: list[tuple[Tensor, Tensor, tuple[int, ...]]] = [(log_q, taught[:_K], (_K, _B))]
    if not made.linear:  # every teacher is compared with every peer
        cases.append((log_q[:, None], taught, (_K, _L, _B)))
    for q, one, shape in cases:
        found = _checked(what, "learn", made.learn, [(q, -2), (one, -2), (labels, -1)], shape)
        _check_gradient(what, found, leaf)
        if not made.needs_labels:
            again = made.learn(q, made.teach(log_p, other)[: len(one)], other)
            refuse(not _close(found, again), f"{what} depends on labels: set needs_labels = True")
    nothing = made.learn(log_q, torch.zeros_like(taught[:_K]), labels)
    refuse(
        not nothing.isfinite().all(),
        f"{what}: learn of zeros, which stand for a teacher that does not count, is not finite",
    )
    if made.linear:
        _check_linear(what, made, log_q, taught, labels, nothing)


def _check_linear(
    what: str, made: Divergence, log_q: Tensor, taught: Tensor, labels: Tensor, nothing: Tensor
) -> None:
    """Refuse the claim that the mean over teachers is the divergence from what they teach."""
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).view(-1, 1, 1)
    mean = (shares * taught).sum(0).expand(_K, -1, -1)
    of_mean = made.learn(log_q, mean, labels)
    each = torch.stack([made.learn(log_q, one.expand(_K, -1, -1), labels) for one in taught])
    mean_of = (shares * each).sum(0)
    how = "set linear = False, or teach what learn is linear in"
    refuse(
        not _close(of_mean, mean_of),
        f"{what}: linear is True, but learn of the mean of what 4 teachers teach is "
        f"{of_mean[0, 0]:.6g}, and the mean of learn is {mean_of[0, 0]:.6g}: {how}",
    )
    refuse(
        not _close(nothing, torch.zeros_like(nothing)),
        f"{what}: linear is True, but learn of zeros is {nothing[0, 0]:.6g}, not 0, so a teacher "
        "that does not count would count: teach a 1 as well, and multiply by it",
    )


def _check_gradient(what: str, found: Tensor, leaf: Tensor) -> None:
    gradient = None
    if found.requires_grad:
        (gradient,) = torch.autograd.grad(found.sum(), leaf, allow_unused=True, retain_graph=True)
    refuse(
        gradient is None or not gradient.any(),
        f"{what}: no gradient reaches log_q, so nothing would be learned",
    )
    assert gradient is not None
    refuse(not gradient.isfinite().all(), f"{what}: the gradient of log_q is not finite")


# ---------------------------------------------------------------- targets


def own_target(
    name: str, text: str, thing: Any, shared: bool
) -> tuple[TargetFacts, Target | TargetFunction]:
    """Return the facts of a target, and what makes it.

    Args:
        name: of ``--target``.
        text: for ``--help``.
        thing: a function, or a subclass of ``Target``.
        shared: whether all peers have the same one, of which they are part themselves.

    Raises:
        UsageError: it cannot be used; the text says why.
    """
    what = f"target {name!r}"
    if isinstance(thing, type):
        refuse(
            not issubclass(thing, Target),
            f"{what}: the class {thing.__name__} is not a subclass of dml_accel.Target",
        )
        refuse(shared, f"{what}: say shared = True in its class")
        with _explaining(what, "its class cannot be made"):
            made: Target = thing()
        _check_target(what, made)

        def contributed(classes: int) -> int:
            labels = torch.zeros(1, dtype=torch.int64)
            return made.contribute(torch.zeros(1, classes), labels).shape[-1]

        facts = TargetFacts(
            name,
            text,
            is_shared=made.shared,
            needs_labels=made.needs_labels,
            contributed=contributed,
            own=thing,
        )
        return facts, made
    refuse(not inspect.isfunction(thing), f"{what}: register a function or a class")
    taken = _parameters(what, thing, ("logits", "weights"), ("labels",), numbers=False)

    def of_all(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = taken.call(thing, {"logits": logits, "weights": weights, "labels": labels})
        return found

    _check_function(what, of_all)
    facts = TargetFacts(
        name,
        text,
        is_shared=shared,
        needs_pairs=True,
        needs_labels="labels" in taken.names,
        own=thing,
    )
    return facts, of_all


def _check_target(what: str, made: Target) -> None:
    logits, labels = _logits(_L), _labels()
    said = [(logits, -2), (labels, -1)]
    found = _checked(what, "contribute", made.contribute, said, (_L, _B, None), -2)
    for peers in (1, _K):
        mean = torch.stack([found.roll(one, 0)[:2].mean(0) for one in range(peers)])
        shape = (peers, _B, _C)
        one = _checked(what, "combine", made.combine, [(mean, -2), (labels, -1)], shape, -2)
    if not made.needs_labels:
        other = (labels + 1) % _C
        same = _close(found, made.contribute(logits, other))
        same = same and _close(one, made.combine(mean, other))
        refuse(not same, f"{what} depends on labels: set needs_labels = True")


def _check_function(what: str, function: TargetFunction) -> None:
    labels = _labels()
    for teachers in (2, _L):  # each with the weight 0 somewhere, as the learner has it
        logits, weights = _logits(teachers), torch.ones(teachers, _B, dtype=torch.float64)
        weights[0], weights[-1] = 0.0, 0.5
        inputs = [(logits, -2), (weights, -1), (labels, -1)]
        found = _checked(what, "it", function, inputs, (_B, _C), -2)
        others = torch.where(weights[..., None] > 0, logits, 7 * logits.flip(-1) + 1)
        refuse(
            not _close(found, function(others, weights, labels)),
            f"{what} depends on logits of a teacher whose weight is 0, such as the learner itself: "
            "leave those out",
        )


# ---------------------------------------------------------------- the example, and what holds


def _logits(count: int, seed: int = 0) -> Tensor:
    # Its own generator, so that nothing else is drawn differently.
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, _B, _C, generator=generator, dtype=torch.float64)


def _log_posteriors(count: int, seed: int = 0) -> Tensor:
    return F.log_softmax(_logits(count, seed), -1)


def _labels() -> Tensor:
    return torch.arange(_B) % _C


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, _CLOSE, _CLOSE)


def _checked(
    what: str,
    said: str,
    function: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor, int]],
    shape: tuple[int | None, ...],
    rows: int = -1,
) -> Tensor:
    """Return what a function makes of an example; refuse it if that does not hold what it must.

    Args:
        what: is registered, for messages.
        said: the name of the function there.
        function: see above.
        inputs: each with the dimension in which it has the rows of the batch.
        shape: of the result; None for any number but 0.
        rows: the dimension in which it has the rows of the batch.
    """
    values = [one for one, _ in inputs]
    before = [one.detach().clone() for one in values]
    shown = ", ".join(str([*one.shape]) for one in values)
    # A function that draws must not change what a script draws after it.
    with torch.random.fork_rng(devices=[]), _explaining(what, f"{said} of {shown} fails"):
        found = function(*values)
        again = function(*values)
        first = function(*(one.narrow(at, 0, 2) for one, at in inputs))
        single = function(*(one.float() if one.is_floating_point() else one for one in values))
    if not isinstance(found, Tensor):
        raise UsageError(f"{what}: {said} returns {type(found).__name__}, not a tensor")
    fits = len(found.shape) == len(shape) and all(
        length == right if right is not None else length > 0
        for length, right in zip(found.shape, shape, strict=True)
    )
    wanted = str([*shape]).replace("None", "W")
    refuse(not fits, f"{what}: {said} returns {[*found.shape]} for {shown}, not {wanted}")
    for fails, why in (
        (
            (found.dtype, single.dtype) != (torch.float64, torch.float32),
            "does not keep the precision of what it is given",
        ),
        (
            any(not torch.equal(a.detach(), b) for a, b in zip(values, before, strict=True)),
            "changes what it is given, which others use: copy it before changing it in place",
        ),
        (not found.isfinite().all(), f"returns what is not finite for {shown}"),
        (not torch.equal(found, again), "returns another result each time"),
        (
            not _close(found.narrow(rows, 0, 2), first),
            "makes a row depend on the other rows of the batch, which processes share",
        ),
    ):
        refuse(bool(fails), f"{what}: {said} {why}")
    return found


@contextlib.contextmanager
def _explaining(what: str, how: str) -> Iterator[None]:
    """Say what was called when the user's code raises an error.

    Raises:
        UsageError: in place of it.
    """
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{what}: {how}: {said}") from error
