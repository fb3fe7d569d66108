"""The ways to learn together that have a name: what each changes, what tables call it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dml_accel.core.config import Config, UsageError


@dataclass(frozen=True)
class Method:
    """What a method is called in tables, and what it changes in the shared configuration."""

    title: str
    changes: dict[str, Any] = field(default_factory=dict)


# Where labels are few, all but ``semi`` learn from the labelled images alone.
METHODS = {
    "independent": Method("Ind.", {"kl_weight": 0.0}),
    "mutual": Method("DML"),
    "sequential": Method("DML, Algorithm 1", {"update": "sequential"}),
    "official": Method("DML, authors' code", {"update": "official"}),
    "mean-prob": Method("DML_e", {"target": "mean-prob"}),
    "mean-logit": Method("DML, mean logits", {"target": "mean-logit"}),
    "distill": Method("Distilled", {"links": "frozen"}),
    "semi": Method("DML, semi-supervised"),
}
BASELINE = "independent"
DEFAULT_METHODS = (BASELINE, "mutual")
# Flags that methods alone set, so that a comparison does not take them.
SET_BY_METHODS = ("update", "target", "kl_images")


# What tells runs of one comparison apart: who is trained how, and where.
MAY_DIFFER = frozenset(
    {
        "cohort",
        "seed",
        "kl_weight",
        "kl_reduction",
        "kl_warmup",
        "temperature",
        "update",
        "target",
        "links",
        "frozen_peers",
        "kl_images",
    }
)


# Of these, what no method's name has to say: who learns, and what is said by other words.
_BESIDE = frozenset({"cohort", "seed", "frozen_peers"})


def method_of(config: Config, peers: int, teachers: Mapping[str, Mapping[str, str]]) -> str:
    """Name the way in which peers are trained, and all that is unusual about it.

    Args:
        config: the run's.
        peers: how many learn.
        teachers: ``arch`` and ``sha256`` of those that only teach, by name.
    """
    if config.kl_weight == 0 or (peers == 1 and not teachers):
        by_turns = config.update == "official" and peers > 1  # K batches a step all the same
        return "independent, official" if by_turns else "independent"
    name, implied = "mutual", set(_BESIDE)
    for other, flag, is_it in (
        (config.update, "update", config.update != "simultaneous"),
        (config.target, "target", config.target != "peers"),
        ("distill", "links", config.links == "frozen" or (peers == 1 and bool(teachers))),
        ("semi", "kl_images", config.labelled_fraction < 1 and config.kl_images == "all"),
    ):
        if is_it:
            name, implied = other, {*_BESIDE, flag}
            break
    if config.labelled_fraction == 1 or config.kl_images == "labelled":
        implied.add("kl_images")
    mine, usual = config.as_dict(), Config()
    unusual = [
        f"{name.replace('_', ' ')} {mine[name]}"
        for name in sorted(MAY_DIFFER - implied)
        if mine[name] != getattr(usual, name) or name == "kl_images"
    ]
    if teachers:
        known = [f"{one['arch']} ({one['sha256'][:8]})" for one in teachers.values()]
        unusual.append("of " + " and ".join(known))
    return ", ".join([name, *unusual])


def refuse(config: Config, methods: Sequence[str]) -> None:
    """Refuse methods that the configuration does not go with.

    Raises:
        UsageError: the flag is named.
    """
    if config.kl_weight == 0 and set(methods) - {"independent"}:
        raise UsageError("--kl-weight 0 makes every method independent; leave it out")
    if ("distill" in methods) != bool(config.frozen_peers):
        raise UsageError(
            "--frozen-peers are the teachers of the method distill: give both or neither"
        )
    if "semi" in methods and config.labelled_fraction == 1:
        raise UsageError("the method semi needs --labelled-fraction below 1")
    if config.placement == "split" and {"sequential", "official"} & set(methods):
        raise UsageError(
            "the methods sequential and official take turns, which leaves processes of "
            "--placement split idle; use auto, which replicates those"
        )


def changes_of(config: Config, method: str) -> dict[str, Any]:
    """Return what a method changes in the configuration."""
    changes = dict(METHODS[method].changes)
    if method != "distill":
        changes["frozen_peers"] = ()
    if config.labelled_fraction < 1 and method not in ("independent", "semi"):
        changes["kl_images"] = "labelled"
    return changes
