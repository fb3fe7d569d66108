"""Named methods, and presets of comparisons. No torch here.

A method is a set of flags: what it changes in the configuration that all methods share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from dml_accel.analysis.published import all_published
from dml_accel.core.cohort import words_of
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.flags import own_hint
from dml_accel.core.method import MethodConfig


@dataclass(frozen=True)
class Method:
    """A named method: what it changes in the configuration that all methods share.

    Attributes:
        text: what it is, in one line.
        source: who proposed it; empty where it has no source of its own.
        changes: the flags that it sets, by name, with the defaults of its source.
        warmup: the share of the epochs over which the KL weight grows; None if the flags say it.
        least: the fewest networks with which it is a method of its own.
        is_own: whether a user has registered it.
    """

    text: str
    source: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    warmup: Fraction | None = None
    least: int = 2
    is_own: bool = False

    def flags(self, epochs: int) -> dict[str, Any]:
        """Return the flags that it sets in runs of so many epochs."""
        found = dict(self.changes)
        if self.warmup is not None:
            if grows := round(self.warmup * epochs):
                found["kl_warmup"] = grows
            else:  # too short for a warm-up
                found.pop("kl_ramp", None)
        return found


# With few labels, all methods but ``semi`` learn from the labelled images only. Users add their own
# behind these.
METHODS = {
    "independent": Method(
        "the same networks, each alone",
        changes={"kl_weight": 0.0, "ce_weight": 1.0},
        least=1,
    ),
    "mutual": Method("each learns from the posteriors of all others", "arXiv 1706.00384 (DML)"),
    "sequential": Method(
        "peers are updated one after the other, on the same batch",
        "arXiv 1706.00384, Algorithm 1",
        {"update": "sequential"},
    ),
    "official": Method(
        "peers are updated one after the other, each on a batch of its own",
        "arXiv 1706.00384, its code",
        {"update": "official"},
    ),
    "mean-prob": Method(
        "one target: the mean of the others' posteriors",
        "arXiv 1706.00384, DML_e",
        {"target": "mean-prob"},
    ),
    "mean-logit": Method(
        "one target: the posterior of the others' mean logits",
        changes={"target": "mean-logit"},
    ),
    "mean-logit-all": Method(
        "one target: the posterior of the mean logits of all, the learner's too; temperature 3",
        "MCL, its logit term",
        {"target": "mean-logit-all", "temperature": 3.0},
    ),
    "reverse-kl": Method(
        "KL from the learner to its teachers, not from them to it",
        changes={"divergence": "reverse-kl"},
    ),
    "jeffreys": Method(
        "half the sum of KL in both directions",
        "PaddleClas, DMLLoss",
        {"divergence": "jeffreys"},
    ),
    "jsd": Method(
        "the Jensen-Shannon divergence from each teacher",
        "arXiv 2306.13649 (GKD)",
        {"divergence": "jsd"},
    ),
    "renyi": Method(
        "the Renyi divergence of order 2 from each teacher",
        "arXiv 2209.05732 (Renyi DML)",
        {"divergence": "renyi"},
    ),
    "kdcl-naive": Method(
        "image by image, the peer with the smallest cross-entropy teaches all",
        "KDCL, CVPR 2020",
        {"target": "best", "temperature": 2.0},
    ),
    "kdcl-minlogit": Method(
        "class by class, the smallest logit of all peers, counted from the label's",
        "KDCL, CVPR 2020",
        {"target": "min-logit", "temperature": 2.0},
    ),
    "dkd": Method(
        "decoupled: KL of label against rest, and 8 times that among the rest; temperature 4",
        "arXiv 2203.08679 (DKD)",
        {"divergence": "dkd", "temperature": 4.0},
        warmup=Fraction(1, 12),
    ),
    "nkd": Method(
        "normalised KL: gamma 1.5, temperature 1 (its source on CIFAR: 3.5 and 3)",
        "arXiv 2303.13005 (NKD)",
        {"divergence": "nkd", "temperature": 1.0},
    ),
    "ttm": Method(
        "teachers' posteriors to the power of 0.1, the learner's as it is; KL weight 45",
        "arXiv 2402.11148 (TTM)",
        {"divergence": "ttm", "temperature": 1.0, "kl_weight": 45.0},
    ),
    "wttm": Method(
        "as ttm, but the surer a teacher is of an image, the less it weighs there",
        "arXiv 2402.11148 (WTTM)",
        {"divergence": "wttm", "temperature": 1.0, "kl_weight": 45.0},
    ),
    "standardized": Method(
        "logits of mean 0 and deviation 1; temperature 2, KL weight 9, cross-entropy 0.1",
        "arXiv 2403.01427",
        {"standardize": True, "temperature": 2.0, "kl_weight": 9.0, "ce_weight": 0.1},
    ),
    "correct-gate": Method(
        "a peer teaches the images that it gets right",
        "arXiv 1909.04286 (knowledge transfer graph)",
        {"gate": "correct"},
    ),
    "okddip-leader": Method(
        "the last network learns from the others' mean logits and teaches nobody",
        "OKDDip, AAAI 2020",
        {"links": "leader", "target": "mean-logit", "temperature": 3.0, "kl_ramp": "sigmoid"},
        warmup=Fraction(80, 300),
        least=3,
    ),
    "switokd": Method(
        "the better of two networks pauses while the other is too far behind it",
        "SwitOKD, ECCV 2022",
        {"update": "switch"},
    ),
    "codistillation": Method(
        "each learns from the others' weights of the last exchange, 0 to 49 steps old",
        "arXiv 1804.03235",
        {"exchange_every": 50},
    ),
    "distill": Method(
        "pupils of --frozen-peers, which belong to this method only",
        changes={"links": "frozen"},
        least=1,
    ),
    "semi": Method(
        "with --labelled-fraction: KL on all images; the other methods see the labelled ones only",
        "arXiv 1706.00384",
    ),
    "ensemble-distill": Method(
        "all alone, then the first again, from their frozen ensemble, at equal compute",
        "the objection of Anil et al. 2018",
        {"links": "frozen", "target": "mean-prob"},
        least=1,
    ),
}
BASELINE = "independent"
DEFAULT_METHODS = (BASELINE, "mutual")
ALL = "all"  # what ``--methods`` takes for every one that can be had
# A method of two stages, and what its runs are.
IN_STAGES = "ensemble-distill"
TEACHERS, PUPIL = "teachers", "pupil"
# Flags that only methods set, so that a comparison does not take them.
SET_BY_METHODS = (
    *("update", "target", "kl_images", "divergence", "divergence_args"),
    *("standardize", "gate", "kl_ramp", "exchange_every"),
)
# How runs of one comparison may differ.
MAY_DIFFER = frozenset({"cohort", "seed", *MethodConfig.names()})
# Of these, what is not part of a method's name: it is named elsewhere.
_NAMED_ELSEWHERE = frozenset({"cohort", "seed", "frozen_peers"})


def settable() -> set[str]:
    """Return the flags that a method of a user's own may set: those of its section.

    Not the frozen peers, which belong to ``distill``, and not ``kl_images``, which ``semi`` sets.
    """
    return {*MethodConfig.names()} - {"frozen_peers", "kl_images"}


# ---------------------------------------------------------------- the method of a run


def method_of(
    config: Config, peers: int, teachers: Mapping[str, Mapping[str, str]], made_as: str = ""
) -> str:
    """Return the method of a run, followed by all other unusual settings of its method.

    It is the one with the most flags, all of which the run has.

    Args:
        config: of the run.
        peers: how many are trained.
        teachers: ``arch`` and ``sha256`` of the frozen peers, by name.
        made_as: the method of two stages that the run is a part of; empty for none.
    """
    method, few_labels = config.method, config.data.labelled_fraction < 1
    alone = method.kl_weight == 0 or (peers == 1 and not teachers)
    if alone and not made_as:
        # Even without KL, a step of several batches trains on more images; nobody pauses.
        other = method.schedule.batches_per_step(peers) > 1
        weight = f"ce weight {method.ce_weight}" if method.ce_weight != 1 else ""
        return ", ".join(filter(None, (BASELINE, method.update if other else "", weight)))
    mine, usual = config.as_dict(), Config().as_dict()
    flags = {name: one.flags(config.optim.epochs) for name, one in METHODS.items()}
    if peers == 1 and teachers:
        flags["distill"] = {"links": method.links}  # as there is nobody else to learn from
    if few_labels:
        flags["semi"] = {"kl_images": "all"}
    candidates = {
        name: found
        for name, found in flags.items()
        if name not in (BASELINE, IN_STAGES) and all(mine[one] == found[one] for one in found)
    }
    name = made_as or max(candidates, key=lambda one: len(candidates[one]))
    implied = {*_NAMED_ELSEWHERE, *flags[name]}
    if not few_labels or method.kl_images == "labelled":
        implied.add("kl_images")
    unusual = [
        _in_words(flag, mine[flag])
        for flag in sorted(MAY_DIFFER - implied)
        if mine[flag] != usual[flag] or flag == "kl_images"
    ]
    if teachers and not made_as:
        names = (f"{one['arch']} ({one['sha256'][:8]})" for one in teachers.values())
        unusual.append("of " + " and ".join(names))
    return ", ".join([name, *unusual])


def _in_words(flag: str, value: Any) -> str:
    words = [flag.replace("_", " ")]
    if value is not True:
        words += map(str, value) if isinstance(value, list) else [str(value)]
    return " ".join(words)


def peers_of(config: Config) -> int:
    """Return how many networks a cohort has."""
    return sum(len(word.peers) for word in words_of(config.cohort))


def changes_of(config: Config, method: str) -> dict[str, Any]:
    """Return what a method changes in the configuration.

    For the method of two stages that is without its teachers, who have yet to be trained.
    """
    changes = METHODS[method].flags(config.optim.epochs)
    if method != "distill":
        changes["frozen_peers"] = ()
    if method == IN_STAGES:
        changes["links"] = "full"
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
        tuple(
            row.nets for row in all_published() if (row.source, row.method) == ("paper", "mutual")
        ),
        {},
    ),
    "laptop": Preset(
        "a pair of resnet8 on 10,000 images for 20 epochs: under an hour on two cores",
        (("resnet8*2",),),
        {"train_limit": 10_000, "epochs": 20, "lr_step": 6, "eval_every": "5ep"},
    ),
}


def refuse_unknown(asked: Sequence[str]) -> None:
    """Refuse names that are none of ``METHODS``, nor ``all``.

    Raises:
        UsageError: the text names those that there are.
    """
    for name in asked:
        if name not in (ALL, *METHODS):
            raise UsageError(
                f"--methods {name} is unknown; known are: {', '.join((ALL, *METHODS))}"
                f"{own_hint('methods')}"
            )
