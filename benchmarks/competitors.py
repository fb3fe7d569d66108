"""Who is measured beside whom: tables of names and options, part by part."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring import BATCH, MEMORY_KEPT

THREADS = 2  # of all processes of one competitor together
COUNTS = (1, 2)  # of processes


@dataclass(frozen=True)
class Mode:
    """A way in which we train a cohort; every part of it can also be asked for by a flag.

    Attributes:
        bf16: whether networks compute in half precision.
        compiled: whether ``torch.compile`` compiles them.
        channels_last: the layout of images and weights; otherwise contiguous.
        processes: how many train it, each some of the peers.
    """

    bf16: bool = False
    compiled: bool = False
    channels_last: bool = False
    processes: int = 1

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of train.py, as fields of its configuration; nothing is left to ``auto``."""
        return {
            "mixed_precision": "bf16" if self.bf16 else "no",
            "compile": "on" if self.compiled else "off",
            "memory_format": "channels_last" if self.channels_last else "contiguous",
        }

    def __str__(self) -> str:
        words = ["compiled" if self.compiled else "eager"]
        words += ["channels_last" if self.channels_last else "contiguous"]
        words += ["bf16"] * self.bf16
        words += [f"{self.processes} processes"] * (self.processes > 1)
        return ", ".join(words)


# What the plain command did before anything was chosen for it.
EAGER = Mode()
# Modes that are set beside the networks' own step, and profiled. In half precision channels_last
# is the default.
BF16 = Mode(bf16=True, channels_last=True)
COMPILED = Mode(compiled=True)
COMPILED_BF16 = Mode(bf16=True, compiled=True, channels_last=True)

# What pytorch-dml's trainer can be given, and what its fastest is the fastest of.
TUNED: dict[str, dict[str, bool]] = {
    "channels_last": {"channels_last": True},
    "channels_last, bf16": {"channels_last": True, "bf16": True},
    "compiled": {"channels_last": True, "compiled": True},
    "compiled, bf16": {"channels_last": True, "compiled": True, "bf16": True},
}
FASTEST_TUNED = "channels_last, bf16"  # as measured
# Each of our modes, and the networks' own step in the same way, which is its limit.
LIMITS: dict[Mode, tuple[str, dict[str, bool]]] = {
    EAGER: ("contiguous", {}),
    replace(EAGER, channels_last=True): ("channels_last", {"channels_last": True}),
    BF16: ("channels_last, bf16", TUNED["channels_last, bf16"]),
    COMPILED: ("compiled", {"compiled": True}),
    COMPILED_BF16: ("compiled, bf16", TUNED["compiled, bf16"]),
}
# Changes of the configuration under which the memory of few and many peers is measured too.
MEMORY_MODES: dict[str, dict[str, Any]] = {"low memory": {"low_memory": True}}


@dataclass(frozen=True)
class Asked:
    """What the competitors depend on.

    Attributes:
        plain: what the plain command chooses by itself.
        half: what it chooses with ``--mixed-precision bf16``.
        before: the folder of an older checkout, whose default is measured as well.
    """

    plain: Mode = EAGER
    half: Mode = BF16
    before: Path | None = None


@dataclass(frozen=True)
class Competitor:
    """One thing that is measured, in processes of its own.

    Attributes:
        name: in tables; unique in its part.
        kind: of ``worker.KINDS``.
        options: of that kind.
        about: what the report reads: whose it is, what it is the limit of, its place in a series.
        processes: how many share the threads.
        environment: variables of its processes.
        share: its steps for each step of the others.
        profiled: whether the seconds in torch's operations are taken, too.
        beside: what the same process does in turn with it, where both must have the same memory:
            two processes alike can differ by some percent.
        by_accelerate: whether ``accelerate launch`` starts its processes, instead of ``torchrun``.
        checkout: folder of the code that is measured, if it is not this one.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    profiled: bool = False
    beside: "Competitor | None" = None
    by_accelerate: bool = False
    checkout: Path | None = None


def _ours(mode: Mode, command: str = "") -> Competitor:
    """Return one of our modes, and which command chooses it."""
    about = {"whose": "ours", "bf16": mode.bf16, "command": command}
    name = f"ours, {command}: {mode}" if command else f"ours, {mode}"
    return Competitor(name, "training", mode.flags, about, mode.processes)


def _modes(asked: Asked) -> list[Competitor]:
    """Return our modes, those that a command chooses by itself among them and first."""
    commands = {asked.plain: "plain command", asked.half: "--mixed-precision bf16"}
    grid = [
        Mode(bf16, compiled, channels_last, processes)
        for bf16, compiled, channels_last, processes in itertools.product(
            (False, True), (False, True), (False, True), COUNTS
        )
        if channels_last or not bf16
    ]
    ordered = dict.fromkeys([*commands, *grid])
    return [_ours(mode, commands.get(mode, "")) for mode in ordered]


def _before(checkout: Path) -> list[Competitor]:
    return [
        Competitor(
            f"before, {command}",
            "training",
            # Said, because older code does not make noise of a size that it chooses itself.
            {"image_size": 32, "mixed_precision": "bf16" if bf16 else "no"},
            {"whose": "before", "bf16": bf16, "command": command},
            checkout=checkout,
        )
        for command, bf16 in (("plain command", False), ("--mixed-precision bf16", True))
    ]


def _tuned(how: str) -> Competitor:
    """Return pytorch-dml made fast, with memory kept as we keep it: that made none slower."""
    about = {"whose": "pytorch-dml", "tuned": True, "bf16": "bf16" in how}
    options = {"tuned": True, **TUNED[how]}
    return Competitor(f"pytorch-dml, tuned: {how}", "pytorch-dml", options, about, 1, MEMORY_KEPT)


def _plain_loop(how: str) -> Competitor:
    """Return a plain loop made fast in two processes, where pytorch-dml's trainer has only one."""
    name = f"plain loop, tuned: {how}, 2 processes (DDP)"
    about = {"whose": "plain", "tuned": True, "bf16": "bf16" in how}
    options = {"tuned": True, **TUNED[how]}
    return Competitor(name, "plain", options, about, 2, MEMORY_KEPT)


def others(asked: Asked) -> list[Competitor]:
    """Whole steps with their input: others' and ours."""
    about = {"whose": "plain", "bf16": False}
    launched = "plain loop, accelerate launch, 2 processes (DDP)"
    return [
        Competitor(
            "pytorch-dml, as its README",
            "pytorch-dml",
            {},
            {"whose": "pytorch-dml", "bf16": False},
        ),
        *map(_tuned, TUNED),
        Competitor("plain loop", "plain", {}, about),
        Competitor(launched, "accelerate", {}, about, 2, by_accelerate=True),
        *map(_plain_loop, ("compiled", "channels_last, bf16", "compiled, bf16")),
        *(_before(asked.before) if asked.before else []),
        *_modes(asked),
    ]


def single(asked: Asked) -> list[Competitor]:
    """Our step of one network, and timm's in the same process and in turns with it."""
    ways = [(mode, True) for mode in (EAGER, replace(EAGER, channels_last=True), BF16)]
    found = []
    for mode, ready in [*ways, (EAGER, False)]:
        name = f"{mode}, {'a ready batch' if ready else 'own input'}"
        fast = {"channels_last": mode.channels_last, "bf16": mode.bf16, "ready": ready}
        theirs = Competitor(f"timm, {name}", "timm", fast, {"whose": "timm"})
        options = {"cohort": ["resnet32"], "ready": ready, **mode.flags}
        about = {"whose": "ours", "way": name, "beside": theirs.name}
        found.append(Competitor(f"ours, {name}", "training", options, about, beside=theirs))
    return found


def limits(asked: Asked) -> list[Competitor]:
    """Our whole steps beside what they cannot beat."""
    found = []
    for mode, (name, options) in LIMITS.items():
        ours, limit = _ours(mode), f"networks alone, {name}"
        about = {"whose": "limit", "bf16": options.get("bf16", False)}
        alone = Competitor(limit, "networks", options, about)
        found.append(replace(ours, about=ours.about | {"limit": limit}, beside=alone))
    for name, bf16 in (("single precision", False), ("bf16", True)):
        about = {"whose": "products", "bf16": bf16}
        found.append(Competitor(f"torch.mm, {name}", "products", {"bf16": bf16}, about))
    return found


def _small(
    series: str, x: int, processes: int = 1, share: float = 1.0, **options: Any
) -> Competitor:
    about = {"series": series, "x": x}
    return Competitor(f"{series}: {x}", "training", options, about, processes, share=share)


def growth(asked: Asked) -> list[Competitor]:
    """ResNet-8 cohorts: more peers, more classes, larger batches; the losses' own share."""
    peers, many = (1, 2, 4, 8), 8
    found = [_small("peers", k, 1, many / k, cohort=[f"resnet8*{k}"]) for k in peers]
    found += [
        _small("peers in 2 processes", k, 2, many / k, cohort=[f"resnet8*{k}"]) for k in peers[1:]
    ]
    for mode, changes in MEMORY_MODES.items():
        found += [
            _small(f"peers, {mode}", k, 1, many / k, cohort=[f"resnet8*{k}"], **changes)
            for k in (peers[0], peers[-1])
        ]
    found += [
        _small("classes", c, 1, 2.0, cohort=["resnet8*4"], classes=c) for c in (100, 1000, 10_000)
    ]
    for series, variables in (("batch", {}), ("batch, memory kept", MEMORY_KEPT)):
        for size in (BATCH, 256, 1024):
            options = {"cohort": ["resnet8*2"], "batch_size": size}
            one = _small(series, size, 1, 4 * BATCH / size, **options)
            found.append(replace(one, environment=variables))
    options, about = {"peers": many, "classes": 100}, {"whose": "losses", "of": f"peers: {many}"}
    found.append(Competitor(f"losses of {many} peers", "losses", options, about, share=100.0))
    return found


def profiles(asked: Asked) -> list[Competitor]:
    """Where the time of whole steps goes: the two rivals, and ours in the modes to set beside."""
    readme, fastest = others(asked)[0], _tuned(FASTEST_TUNED)
    measured = [readme, fastest, *map(_ours, (EAGER, BF16, COMPILED_BF16))]
    return [replace(one, profiled=True) for one in measured]


PARTS: dict[str, Callable[[Asked], list[Competitor]]] = {
    "others": others,
    "single": single,
    "limits": limits,
    "growth": growth,
    "profile": profiles,
}
