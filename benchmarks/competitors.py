"""Who is measured beside whom: tables of names and options, part by part."""

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.measuring import BATCH, MEMORY_KEPT

THREADS = 2  # of all processes of one competitor together

# Our modes: flags of train.py, as fields of its configuration.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "channels_last": {"memory_format": "channels_last"},
    "low memory": {"low_memory": True},
    "bf16": {"mixed_precision": "bf16"},
    "compiled": {"compile": "on"},
    "compiled, bf16": {"compile": "on", "mixed_precision": "bf16"},
}
# Modes that are measured in two processes of one thread as well, a network in each.
IN_TWO_PROCESSES = ("default", "compiled, bf16")
# ... and with memory that the C library keeps instead of returning it after each step.
WITH_MEMORY_KEPT = ("default", "compiled, bf16")
# What pytorch-dml's trainer can be given, and what its fastest is the fastest of.
TUNED: dict[str, dict[str, bool]] = {
    "channels_last": {"channels_last": True},
    "channels_last, bf16": {"channels_last": True, "bf16": True},
    "compiled": {"channels_last": True, "compiled": True},
    "compiled, bf16": {"channels_last": True, "compiled": True, "bf16": True},
}
TUNED_WITH_MEMORY_KEPT = tuple(TUNED)
FASTEST_TUNED = "channels_last, bf16"  # as measured
# Each of our modes, and the networks' own step in the same way, which is its limit.
LIMITS: dict[str, tuple[str, dict[str, bool]]] = {
    "default": ("contiguous", {}),
    "channels_last": ("channels_last", {"channels_last": True}),
    "bf16": ("channels_last, bf16", {"channels_last": True, "bf16": True}),
    "compiled": ("compiled", {"compiled": True}),
    "compiled, bf16": (
        "compiled, bf16",
        {"channels_last": True, "compiled": True, "bf16": True},
    ),
}
# Changes of the configuration under which the memory of few and many peers is measured too.
MEMORY_MODES: dict[str, dict[str, Any]] = {"low memory": {"low_memory": True}}


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


def _ours(mode: str, processes: int = 1, kept: bool = False) -> Competitor:
    name = f"ours, {mode}"
    name += ", 2 processes" if processes > 1 else ""
    name += ", memory kept" if kept else ""
    return Competitor(
        name,
        "training",
        MODES[mode],
        {"whose": "ours", "bf16": "bf16" in mode},
        processes,
        MEMORY_KEPT if kept else {},
    )


def _tuned(how: str, kept: bool = False) -> Competitor:
    return Competitor(
        f"pytorch-dml, tuned: {how}" + (", memory kept" if kept else ""),
        "pytorch-dml",
        {"tuned": True, **TUNED[how]},
        {"whose": "pytorch-dml", "tuned": True},
        environment=MEMORY_KEPT if kept else {},
    )


def others() -> list[Competitor]:
    """Whole steps with their input: others' and ours."""
    return [
        Competitor("pytorch-dml, as its README", "pytorch-dml", {}, {"whose": "pytorch-dml"}),
        *map(_tuned, TUNED),
        *(_tuned(how, kept=True) for how in TUNED_WITH_MEMORY_KEPT),
        Competitor("plain loop", "plain", {}, {"whose": "plain"}),
        *map(_ours, MODES),
        *(_ours(mode, kept=True) for mode in WITH_MEMORY_KEPT),
        *(_ours(mode, processes=2) for mode in IN_TWO_PROCESSES),
        _ours("compiled, bf16", processes=2, kept=True),
    ]


def limits() -> list[Competitor]:
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


def growth() -> list[Competitor]:
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


def profiles() -> list[Competitor]:
    """Where the time of whole steps goes: the two rivals, and ours in the modes to set beside."""
    readme, fastest = others()[0], _tuned(FASTEST_TUNED)
    measured = [readme, fastest, *map(_ours, ("default", "bf16", "compiled, bf16"))]
    return [replace(one, profiled=True) for one in measured]


PARTS = {"others": others, "limits": limits, "growth": growth, "profile": profiles}
