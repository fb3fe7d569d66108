"""``--recipe``: how the literature trains, by name. A recipe is a function that returns flags.

A flag that is given overrides a recipe's. What makes sense only with the recipe's own value of
that flag is then left out as well (``_GO_WITH``), so that it has its default again.

A recipe says how networks are trained, not what they learn from each other: no method is in it.
"""

import difflib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dml_accel.core.assignments import peer_settings, peer_text
from dml_accel.core.cohort import words_of
from dml_accel.core.config import Config, flag_types, same_family
from dml_accel.core.errors import UsageError

Flags = dict[str, Any]
LIST = "list"
# Networks that the code of CRD and of its successors trains at a lower rate.
_SLOWER = ("mobilenet", "shufflenet")
# A flag that is given another value than a recipe's takes these of the recipe with it; an optimizer
# of the same family takes none.
_GO_WITH = {
    "lr": ("peer_opt",),
    "lr_schedule": ("lr_gamma", "lr_milestones", "lr_min", "lr_power", "lr_step", "lr_every"),
    "optimizer": ("lr", "momentum", "opt_args", "peer_opt", "weight_decay"),
}
_WIDTH = 96  # characters of a line of the list
_INDENTED: Any = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}


@dataclass(frozen=True)
class Recipe:
    """A named recipe.

    Attributes:
        text: who trains so, and what must be known.
        flags: returns the flags that it sets, from those that are given beside it.
    """

    text: str
    flags: Callable[[Mapping[str, Any]], Flags]


def _paper(_: Mapping[str, Any]) -> Flags:
    return _sgd(epochs=200, batch_size=64, lr=0.1) | _steps(60, 0.1)


def _one(_: Mapping[str, Any]) -> Flags:
    return _sgd(epochs=300, batch_size=128, lr=0.1) | _milestones(150, 225)


def _mcl(_: Mapping[str, Any]) -> Flags:
    cosine = {"lr_schedule": "cosine", "lr_every": "epoch"}
    return _sgd(epochs=300, batch_size=128, lr=0.1) | cosine


def _crd(given: Mapping[str, Any]) -> Flags:
    found = _sgd(epochs=240, batch_size=64, lr=0.05) | _milestones(150, 180, 210)
    found["optimizer"] = "momentum"  # without Nesterov's
    words = words_of(given.get("cohort", Config().cohort))
    peers = [name for word in words for name in word.peers if _is_slower(word.net)]
    return found | ({"peer_opt": tuple(f"{name}:lr=0.01" for name in peers)} if peers else {})


def _is_slower(net: str) -> bool:
    return any(name in net.lower().replace("_", "") for name in _SLOWER)


def _renyi(_: Mapping[str, Any]) -> Flags:
    return _sgd(epochs=200, batch_size=128, lr=0.1) | _steps(60, 0.2)


def _imagenet(_: Mapping[str, Any]) -> Flags:
    return _sgd(epochs=100, batch_size=128, lr=0.4) | {
        "optimizer": "momentum",
        "lr_schedule": "cosine",
        "warmup": 5.0,
        "weight_decay": 4e-5,
        "augment": ("random-resized-crop", "flip"),
        "image_size": 224,
    }


def _modern(given: Mapping[str, Any]) -> Flags:
    digits = given.get("dataset") == "digits"  # a mirrored digit is not a digit
    return {
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_schedule": "cosine",
        "warmup": 5.0,
        "weight_decay": 0.05,
        "wd_exclude_norm_bias": True,
        "augment": ("crop" if digits else "crop-flip", "randaugment"),
        "mixup": 0.2,
        "label_smoothing": 0.1,
        "ema": 0.999,
    }


def _sgd(**flags: Any) -> Flags:
    return {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4} | flags


def _steps(epochs: int, gamma: float) -> Flags:
    return {"lr_schedule": "step", "lr_step": epochs, "lr_gamma": gamma}


def _milestones(*epochs: float) -> Flags:
    return {"lr_schedule": "milestones", "lr_milestones": epochs, "lr_gamma": 0.1}


_CRD = "with a rate of 0.01 for each MobileNet and ShuffleNet"
RECIPES = {
    "paper": Recipe("Zhang et al., Deep Mutual Learning, CVPR 2018", _paper),
    "one": Recipe("Lan et al., Knowledge Distillation by On-the-Fly Native Ensemble, 2018", _one),
    "okddip": Recipe("Chen et al., Online KD with Diverse Peers, AAAI 2020", _one),
    "mcl": Recipe("Yang et al., Mutual Contrastive Learning, AAAI 2022", _mcl),
    "crd": Recipe(f"Tian et al., Contrastive Representation Distillation, 2020; {_CRD}", _crd),
    "dkd": Recipe(f"Zhao et al., Decoupled Knowledge Distillation, CVPR 2022; {_CRD}", _crd),
    "logit-standardisation": Recipe(
        f"Sun et al., Logit Standardization in KD, CVPR 2024; {_CRD}", _crd
    ),
    "renyi": Recipe("Divergence of Renyi for mutual learning, arXiv 2209.05732", _renyi),
    "imagenet": Recipe(
        "PaddleClas, mutual learning on ImageNet, with 128 images on each GPU: --batch-size counts "
        "those of all processes, so give 128 times their number",
        _imagenet,
    ),
    "modern": Recipe(
        "none of the above: AdamW, cosine, RandAugment, mixup, smoothing and averages, for as many "
        "epochs as you say",
        _modern,
    ),
}


def flags_of(name: str, given: Mapping[str, Any]) -> Flags:
    """Return the flags that a recipe sets, without those that are given or go with them.

    ``peer_opt`` is what it sets of peers beside the ``peer_opt`` that is given.

    Args:
        name: of the recipe.
        given: the flags that are given beside it.

    Raises:
        UsageError: there is no such recipe; the text names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)};"
        said = name or repr(name)
        raise UsageError(f"--recipe {said} is unknown: {hint} --recipe {LIST} shows what each sets")
    found = RECIPES[name].flags(given)
    for flag, others in _GO_WITH.items():
        if flag in given and not _is_kept(flag, given[flag], found.get(flag)):
            for other in others:
                found.pop(other, None)
    rest = {flag: value for flag, value in found.items() if flag not in given}
    if "peer_opt" in found and (of_peers := _beside(found, given.get("peer_opt"))):
        rest["peer_opt"] = of_peers
    return rest


def _is_kept(flag: str, value: Any, own: Any) -> bool:
    return value == own or (flag == "optimizer" and same_family(value, own))


def _beside(found: Flags, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return a recipe's settings of peers without those that are given; none if they are off."""
    if not given:
        return found["peer_opt"] if given is None else ()
    own: dict[str, dict[str, str]] = {}
    for peer, settings in map(peer_settings, given):
        own.setdefault(peer, {}).update(settings)
    texts = []
    for peer, settings in map(peer_settings, found["peer_opt"]):
        said, usual = own.get(peer, {}), str(found["optimizer"])
        others = not same_family(said.get("optimizer", usual), usual)
        left = {k: v for k, v in settings.items() if k not in said and not (others and k == "lr")}
        if left:
            texts.append(peer_text(peer, left))
    return tuple(texts)


def listed(given: Mapping[str, Any]) -> str:
    """Return all recipes with the flags that each sets, beside those that are given."""

    def lines() -> Iterator[str]:
        for name, recipe in RECIPES.items():
            yield name
            for text in (recipe.text, in_words(flags_of(name, given))):
                yield from textwrap.wrap(text, _WIDTH, **_INDENTED)

    return "\n".join(lines())


def in_words(flags: Mapping[str, Any]) -> str:
    """Return flags as a command line has them, in the order of ``--help``."""
    order = list(flag_types())
    return " ".join(_word(name, flags[name]) for name in sorted(flags, key=order.index))


def _word(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    values = value if isinstance(value, (list, tuple)) else (value,)
    return " ".join([flag, *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)])
