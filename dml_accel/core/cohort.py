"""The words of ``--cohort``: which peers they ask for. Networks are unknown here."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dml_accel.core.errors import UsageError

DEFAULT_NET = "resnet32"


@dataclass(frozen=True)
class Word:
    """One word of a cohort.

    Attributes:
        text: as it was given.
        net: the network, without ``timm:``.
        from_timm: whether ``timm:`` stands before it.
        arguments: what stands in brackets.
        peers: names of the peers, ``<net>-<index>``; the index counts the peers of that net.
    """

    text: str
    net: str
    from_timm: bool
    arguments: str
    peers: tuple[str, ...]


def words_of(cohort: Sequence[str]) -> list[Word]:
    """Return the words of a cohort: a number K, or ``name``, ``name*N``, ``timm:name[key=value]``.

    Raises:
        UsageError: a word is none of these, or asks for no peer.
    """
    if len(cohort) == 1 and re.fullmatch(r"[+-]?\d+", cohort[0]):
        cohort = [f"{DEFAULT_NET}*{int(cohort[0])}"]
    found: list[Word] = []
    count: Counter[str] = Counter()
    for text in cohort:
        match = re.fullmatch(r"(timm:)?([^\s\[\]*:]+)(?:\[([^\[\]]*)\])?(?:\*(-?\d+))?", text)
        if not match:
            raise UsageError(
                f"--cohort {text!r} cannot be parsed: write a single number K, or name, name*N or "
                "'timm:name[key=value,...]*N'"
            )
        prefix, net, arguments, times = match.groups(default="")
        if int(times or 1) < 1:
            raise UsageError(f"--cohort {text!r} asks for {times} peers; at least 1 is needed")
        first = count[net]
        count[net] += int(times or 1)
        names = tuple(f"{net}-{index}" for index in range(first, count[net]))
        found.append(Word(text, net, bool(prefix), arguments, names))
    return found
