"""Divergences, targets and methods of one's own, registered by name.

What is registered is taken by the flags of the command line, which the same file starts, by
``Config`` and by ``mutual_loss``. A run records its name and a hash of its source.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dml_accel.analysis.methods import ALL, METHODS, Method, settable
from dml_accel.core.config import typed
from dml_accel.core.flags import refuse
from dml_accel.core.lessons import (
    DIVERGENCES,
    TARGETS,
    DivergenceFacts,
    TargetFacts,
    refuse_name,
)
from dml_accel.core.method import MethodConfig
from dml_accel.core.source_code import file_of, remember
from dml_accel.mutual.divergences import MAKERS
from dml_accel.mutual.losses import forget_lessons
from dml_accel.mutual.own import own_divergence, own_target
from dml_accel.mutual.targets import OWN_TARGETS

F = TypeVar("F", bound=Callable[..., object])

# Methods that registering a divergence or target has made, by name: what it was.
_IMPLIED: dict[str, str] = {}


def register_divergence(name: str) -> Callable[[F], F]:
    """Return a decorator that registers a divergence: ``--divergence NAME``, and a method NAME.

    It takes one of two forms, whose docstring's first line is the text for tables and ``--help``:

    - a function of ``log_p`` and ``log_q``, [N, C] each, the log-posteriors of teachers and of the
      peers that learn from them, and if it wants them of ``labels``, [N] int64; it returns [N].
      Every teacher is compared with every peer. Further parameters with numbers as defaults are
      set by ``--divergence-args``.
    - a subclass of ``Divergence`` with two functions, whose attribute ``linear`` says whether the
      mean over teachers is the divergence from the mean of what they teach, so that a step costs
      O(K). ``defaults`` has the numbers that it takes.

    Registering a name again from the same file replaces what it had.

    Args:
        name: letters, digits, - and _.

    Raises:
        UsageError: the name is taken, or the function fails, is not finite, has no gradient,
            depends on other rows of the batch, or is not linear though it says so.
    """
    kind = "divergence"
    refuse_name(kind, name, [one.name for one in DIVERGENCES.values() if _is_ours(one)])

    def register(thing: F) -> F:
        _refuse_other_file(kind, DIVERGENCES.get(name), thing)
        facts, make = own_divergence(name, _text(thing), thing)
        remember(thing)
        DIVERGENCES[name], MAKERS[name] = facts, make
        _add_method(kind, facts)
        return thing

    return register


def register_target(name: str, *, shared: bool = False) -> Callable[[F], F]:
    """Return a decorator that registers a target: ``--target NAME``, and a method NAME.

    It takes one of two forms, whose docstring's first line is the text for tables and ``--help``:

    - a function of ``logits``, [L, B, C], those of all teachers over T, ``weights``, [L, B], which
      are 0 where one does not count, as the learner itself does not, and if it wants them of
      ``labels``, [B] int64; it returns the logits over T of the target, [B, C].
    - a subclass of ``Target`` with two functions, for a target that can be made of a sum over the
      teachers, so that a step costs O(K).

    Parameters may have their shape behind, as ``logits_LBC``. Registering a name again from the
    same file replaces what it had.

    Args:
        name: letters, digits, - and _.
        shared: whether a function makes one target for all peers, of which they are part
            themselves; a class says so by its attribute ``shared``.

    Raises:
        UsageError: as for ``register_divergence``; or a teacher counts although its weight is 0.
    """
    kind = "target"
    refuse_name(kind, name, [one.name for one in TARGETS.values() if _is_ours(one)])

    def register(thing: F) -> F:
        _refuse_other_file(kind, TARGETS.get(name), thing)
        facts, made = own_target(name, _text(thing), thing, shared)
        remember(thing)
        TARGETS[name], OWN_TARGETS[name] = facts, made
        _add_method(kind, facts)
        return thing

    return register


def register_method(name: str, text: str, **flags: Any) -> None:
    """Register a method, which ``compare --methods NAME`` takes: flags under one name.

    Registering a name again replaces what it had.

    Args:
        name: letters, digits, - and _.
        text: what it is, in one line, for tables and ``--help``.
        flags: what it changes, as keywords of ``Config``: ``divergence="dkd", temperature=2``.

    Raises:
        UsageError: the name is taken, a flag is not one that methods set, or has no such value.
    """
    ours = [one for one, method in METHODS.items() if not method.is_own]
    refuse_name("method", name, [*ours, ALL])
    refuse(not isinstance(text, str) or not text.strip(), f"method {name!r} needs a text, one line")
    refuse(not flags, f"method {name!r} sets no flag: it would be mutual")
    others = sorted(flags.keys() - settable())
    refuse(
        bool(others),
        f"method {name!r} cannot set {', '.join(others)}; a method sets "
        f"{', '.join(sorted(settable()))}",
    )
    values = {flag: typed(flag, value) for flag, value in flags.items()}
    MethodConfig(**values)  # refuses what excludes each other
    _IMPLIED.pop(name, None)
    METHODS[name] = _own_method(text, values)


def _own_method(text: str, values: dict[str, Any]) -> Method:
    # As a configuration is written, with which it is compared.
    plain = {flag: list(one) if isinstance(one, tuple) else one for flag, one in values.items()}
    return Method(" ".join(text.split()), changes=plain, is_own=True)


def _add_method(kind: str, facts: DivergenceFacts | TargetFacts) -> None:
    """Make a method of a divergence or target alone, unless the name is that of another method."""
    if facts.name not in METHODS or _IMPLIED.get(facts.name) == kind:
        _IMPLIED[facts.name] = kind
        METHODS[facts.name] = _own_method(facts.text, {kind: facts.name})
    forget_lessons()


def _is_ours(facts: DivergenceFacts | TargetFacts) -> bool:
    return facts.own is None and not facts.missing


def _refuse_other_file(
    kind: str, before: DivergenceFacts | TargetFacts | None, thing: Callable[..., object]
) -> None:
    """Refuse a name that another file has registered; cells of a notebook are one module."""
    if before is None or before.own is None:
        return
    places = [(one.__module__, file_of(one)) for one in (before.own, thing)]
    same = any(one == other for one, other in zip(*places, strict=True))
    refuse(
        not same,
        f"{kind} {before.name!r} is registered by {places[0][1]} already, and now by "
        f"{places[1][1]}: choose another name",
    )


def _text(thing: Callable[..., object]) -> str:
    """Return the first line of a docstring, not of one that is inherited."""
    lines = inspect.cleandoc(getattr(thing, "__doc__", None) or "").splitlines()
    return lines[0] if lines else f"of {Path(file_of(thing)).name}"
