"""Named methods, and presets of comparisons. No torch here.

A method is a set of flags: what it changes in the configuration that all methods share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dml_accel.analysis.published import all_published
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.method import MethodConfig
from dml_accel.core.updates import UPDATE_SCHEDULES


@dataclass(frozen=True)
class Method:
    """A method's title in tables, and what it changes in the shared configuration."""

    title: str
    changes: dict[str, Any] = field(default_factory=dict)


# With few labels, all methods but ``semi`` learn from the labelled images only.
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
# Flags that only methods set, so that a comparison does not take them.
SET_BY_METHODS = ("update", "target", "kl_images")
# How runs of one comparison may differ.
MAY_DIFFER = frozenset({"cohort", "seed", *MethodConfig.names()})
# Of these, what is not part of a method's name: it is named elsewhere.
_NAMED_ELSEWHERE = frozenset({"cohort", "seed", "frozen_peers"})


def method_of(config: Config, peers: int, teachers: Mapping[str, Mapping[str, str]]) -> str:
    """Return the method of a run, followed by all other unusual settings of its method.

    Args:
        config: of the run.
        peers: how many are trained.
        teachers: ``arch`` and ``sha256`` of the frozen peers, by name.
    """
    method, few_labels = config.method, config.data.labelled_fraction < 1
    if method.kl_weight == 0 or (peers == 1 and not teachers):
        # Even without KL, a step of several batches trains on more images.
        several = method.schedule.batches_per_step(peers) > 1
        return f"{BASELINE}, {method.update}" if several else BASELINE
    name, implied = "mutual", set(_NAMED_ELSEWHERE)
    for candidate, flag, applies in (
        (method.update, "update", method.update != "simultaneous"),
        (method.target, "target", method.target != "peers"),
        ("distill", "links", method.links == "frozen" or (peers == 1 and bool(teachers))),
        ("semi", "kl_images", few_labels and method.kl_images == "all"),
    ):
        if applies:
            name = candidate
            implied.add(flag)
            break
    if not few_labels or method.kl_images == "labelled":
        implied.add("kl_images")
    mine, usual = config.as_dict(), Config().as_dict()
    unusual = [
        f"{flag.replace('_', ' ')} {mine[flag]}"
        for flag in sorted(MAY_DIFFER - implied)
        if mine[flag] != usual[flag] or flag == "kl_images"
    ]
    if teachers:
        names = (f"{one['arch']} ({one['sha256'][:8]})" for one in teachers.values())
        unusual.append("of " + " and ".join(names))
    return ", ".join([name, *unusual])


def refuse(config: Config, methods: Sequence[str]) -> None:
    """Refuse methods that contradict the configuration.

    Raises:
        UsageError: the text names the flag.
    """
    method, asked = config.method, set(methods)
    if method.kl_weight == 0 and asked - {BASELINE}:
        raise UsageError("--kl-weight 0 makes every method independent; drop it")
    if ("distill" in asked) != bool(method.frozen_peers):
        raise UsageError(
            "--frozen-peers are the teachers of the method distill: give both or neither"
        )
    if "semi" in asked and config.data.labelled_fraction == 1:
        raise UsageError("the method semi needs --labelled-fraction below 1")
    by_turns = [one for one, schedule in UPDATE_SCHEDULES.items() if schedule.takes_turns]
    if method.teach_with == "ema" and asked & set(by_turns):
        raise UsageError(
            f"the methods {' and '.join(by_turns)} update peers in turn, so that peers learn from "
            "weights that were updated within the step: drop them, or --teach-with ema"
        )
    if config.compute.placement == "split" and asked & set(by_turns):
        raise UsageError(
            f"the methods {' and '.join(by_turns)} update peers in turn, which leaves processes of "
            "--placement split idle: use auto, which replicates those"
        )


def changes_of(config: Config, method: str) -> dict[str, Any]:
    """Return what a method changes in the configuration."""
    changes = dict(METHODS[method].changes)
    if method != "distill":
        changes["frozen_peers"] = ()
    if config.data.labelled_fraction < 1 and method not in (BASELINE, "semi"):
        changes["kl_images"] = "labelled"
    return changes


# ---------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """A named comparison: its cohorts, and what it changes in the default configuration."""

    text: str
    cohorts: tuple[tuple[str, ...], ...]
    changes: dict[str, Any]


PRESETS = {
    "paper-table2": Preset(
        "the six pairs of the paper's Table 2, by its recipe",
        tuple(row.nets for row in all_published() if (row.source, row.method) == ("paper", "mutual")),
        {},
    ),
    "laptop": Preset(
        "a pair of resnet8 on 10,000 images for 20 epochs: under an hour on two cores",
        (("resnet8*2",),),
        {"train_limit": 10_000, "epochs": 20, "lr_step": 6, "eval_every": "5ep"},
    ),
}
