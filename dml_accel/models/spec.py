"""The cohort as the command line names it: one specification per peer.

A peer's initial weights and dropout are keyed by the seed and the peer's name, never by its
position in the cohort: permuting the cohort permutes the results, and no two peers start equal.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm

from dml_accel.core.assignments import literal
from dml_accel.core.cohort import words_of
from dml_accel.core.errors import UsageError
from dml_accel.models import networks
from dml_accel.models.stems import with_cifar_stem

SHORT_NAMES = tuple(name.removesuffix("_cifar") for name in networks.default_cfgs)
HUB = ""  # ``PeerSpec.start`` for the weights that timm knows on the hub
# Parts of argument names with which timm would read another file or a pickle, or build elsewhere.
_OPENS_FILES = ("pretrained", "checkpoint", "cache_dir", "url", "file", "device", "dtype")


@dataclass(frozen=True)
class PeerSpec:
    """A peer before its network is built.

    Attributes:
        name: in this cohort, ``<net>-<index>``.
        arch: timm's name of the network.
        arguments: what timm builds it with.
        start: trained weights to start from: ``HUB``, a folder or a file; None for none.
    """

    name: str
    arch: str
    arguments: dict[str, Any] = field(default_factory=dict)
    start: str | None = None


def parse_cohort(cohort: Sequence[str]) -> list[PeerSpec]:
    """Parse ``--cohort``: a number K, or ``name``, ``name*N`` and ``timm:name[key=value]``.

    Returns:
        The peers in the order given, each named ``<net>-<index>``; the index counts the peers of
        that net.

    Raises:
        UsageError: there is no peer, a net is unknown (the text lists the nearest names), or
            arguments cannot be parsed.
    """
    specs: list[PeerSpec] = []
    for word in words_of(cohort):
        arch = word.net if word.from_timm else f"{word.net}_cifar"
        _require_known(arch, word.net, word.from_timm)
        arguments, start = _parse_arguments(word.text, word.arguments)
        arch = _with_stem(word.text, arch, arguments)
        specs += [PeerSpec(name, arch, dict(arguments), start) for name in word.peers]
    return specs


def cohort_label(peers: Sequence[str]) -> str:
    """Return a short name for a cohort's folder from its peers: ``resnet32x2-wrn_28_10``."""
    nets = Counter(name.rpartition("-")[0] for name in peers)
    return "-".join(net if n == 1 else f"{net}x{n}" for net, n in nets.items())[:80]


def opens_files(argument: str) -> bool:
    """Whether an argument of that name could make timm read other files than it is told to."""
    return any(part in argument for part in _OPENS_FILES)


def registered_by(arch: str) -> str:
    """Return the Python module that registers a user's own network; empty if timm or we do."""
    if not timm.is_model(arch):
        return ""
    module = timm.model_entrypoint(arch).__module__
    return "" if module.split(".")[0] in ("timm", "dml_accel") else module


def _require_known(arch: str, net: str, from_timm: bool) -> None:
    if timm.is_model(arch) if from_timm else net in SHORT_NAMES:
        return
    everything = timm.list_models() + timm.list_models(pretrained=True)
    names = [*SHORT_NAMES, *(f"timm:{name}" for name in everything)]
    wanted = f"timm:{net}" if from_timm else net
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if timm.is_model(net):
        near.insert(0, f"timm:{net}")
    raise UsageError(
        f"--cohort: unknown net {wanted!r}; nearest: {', '.join(dict.fromkeys(near)) or 'none'}; "
        f"ours are {', '.join(SHORT_NAMES)}; any timm model as timm:<name>"
    )


def _parse_arguments(text: str, words: str) -> tuple[dict[str, Any], str | None]:
    """Return a network's arguments, and the trained weights to start from."""
    parts = (part.strip() for part in words.split(","))
    pairs = [(f"{part}=True" if part == "pretrained" else part).split("=", 1) for part in parts]
    pairs = [pair for pair in pairs if pair != [""]]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"--cohort {text!r}: write arguments as [key=value,key=value]")
    found = {name.strip(): value.strip() for name, value in pairs}
    given = found.pop("pretrained", "False")
    start = {"true": HUB, "false": None}.get(given.lower(), given)
    for name in found:
        if opens_files(name):
            raise UsageError(
                f"--cohort {text!r}: {name} is not an argument of the network; for trained weights "
                "write pretrained, or pretrained=FOLDER_OR_FILE"
            )
    return {name: literal(value) for name, value in found.items()}, start


def _with_stem(text: str, arch: str, arguments: dict[str, Any]) -> str:
    """Return the name of a network with the stem that its arguments ask for, which is taken out."""
    stem = arguments.pop("stem", None)
    if stem is None:
        return arch
    found = with_cifar_stem(arch) if stem == "cifar" else ""
    if not found:
        raise UsageError(
            f"--cohort {text!r}: stem=cifar, the only one, is for ResNets of timm that begin with "
            "a single convolution, such as timm:resnet18, timm:resnet50 or timm:seresnet18"
        )
    return found
