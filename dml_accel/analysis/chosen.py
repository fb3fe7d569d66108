"""Which methods a comparison has: those asked for, or all that can be had, and which coincide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dml_accel.analysis.methods import (
    ALL,
    BASELINE,
    IN_STAGES,
    METHODS,
    changes_of,
    peers_of,
    refuse_unknown,
)
from dml_accel.analysis.stages import pupil_config, taught_by, teachers_config
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.method import MethodConfig
from dml_accel.training.setup import check_pauses


@dataclass(frozen=True)
class Chosen:
    """The methods of a comparison.

    Attributes:
        methods: those that are run, in the order asked for.
        left_out: of ``all``, the others, and why.
        notes: a line for each that coincides with another one, and one if differences are missing.
    """

    methods: tuple[str, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What to tell the user."""
        left_out = (f"left out: {name}: {why}" for name, why in self.left_out.items())
        return [*left_out, *(f"note: {note}" for note in self.notes)]


def choose(config: Config, cohorts: Sequence[tuple[str, ...]], asked: Sequence[str]) -> Chosen:
    """Return the methods that are run: those asked for, or of ``all`` those that can be had.

    Args:
        config: what the methods share.
        cohorts: each as ``Config.cohort``; a method is for all of them.
        asked: names in ``METHODS``, or ``all`` alone.

    Raises:
        UsageError: a method that is asked for by name cannot be had; the text says why.
    """
    refuse_unknown(asked)
    everything = ALL in asked
    if everything and len(set(asked)) > 1:
        raise UsageError(f"--methods {ALL} are all that can be had: name {ALL} alone")
    if config.method.kl_weight == 0 and set(asked) - {BASELINE}:
        raise UsageError("--kl-weight 0 makes every method independent; drop it")
    if not everything and config.method.frozen_peers and "distill" not in asked:
        raise UsageError(
            "--frozen-peers are the teachers of the method distill: give both or neither"
        )
    chosen: dict[str, list[Config]] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for name in METHODS if everything else dict.fromkeys(asked):
        try:
            found = [_made(config.changed(cohort=cohort), name, everything) for cohort in cohorts]
        except UsageError as error:
            if not everything:
                raise UsageError(f"--methods {name}: {error}") from error
            left_out[name] = str(error)
            continue
        same, why = _coincides(name, found, chosen)
        if same:
            notes.append(f"{name} coincides with {same}: {why}")
        if same and everything:
            left_out[name] = f"it coincides with {same}: {why}"
        else:
            chosen[name] = found
    if BASELINE not in chosen:
        notes.append(f"differences are those to {BASELINE}, which is not among the methods")
    return Chosen(tuple(chosen), left_out, () if everything else tuple(notes))


def _made(config: Config, name: str, fits: bool) -> Config:
    """Return the configuration of a method.

    Args:
        config: what the methods share.
        name: of the method.
        fits: whether it must be another method than independent training.

    Raises:
        UsageError: the cohort is too small, or the method contradicts the configuration.
    """
    peers, least = peers_of(config), METHODS[name].least
    # On a single network, which a cohort may be, a method for two is independent training.
    if peers < least and (fits or least > 2):
        raise UsageError(f"it needs at least {least} networks in --cohort, not {peers}")
    if name == "distill" and not config.method.frozen_peers:
        raise UsageError("it needs --frozen-peers, its teachers")
    if name == "semi" and config.data.labelled_fraction == 1:
        raise UsageError("it needs --labelled-fraction below 1")
    made = config.changed(**changes_of(config, name))
    check_pauses(made, peers)
    if name == IN_STAGES:
        teachers_config(made)
        taught_by(pupil_config(made), "teachers")  # refused now if it cannot be made
    return made


def _coincides(
    name: str, found: Sequence[Config], chosen: Mapping[str, Sequence[Config]]
) -> tuple[str, str]:
    """Return which of the chosen methods trains alike in every cohort, and why; or nothing."""
    plain = [_plainest(config) for config in found]
    for other, theirs in chosen.items():
        alike = [one for one, _ in plain] == [_plainest(one)[0] for one in theirs]
        if alike and IN_STAGES not in (name, other):
            reasons = [_plainest(one)[1] for one in (*found, *theirs)]
            return other, "; ".join(dict.fromkeys(filter(None, reasons)))
    return "", ""


def _plainest(config: Config) -> tuple[Config, str]:
    """Return the plainest configuration that trains alike up to rounding, and why it does."""
    method, peers = config.method, peers_of(config)
    if peers == 1 and not method.frozen_peers:
        usual = Config().as_dict()
        plain = {name: usual[name] for name in MethodConfig.names()}
        plain |= {"kl_weight": 0.0, "ce_weight": method.ce_weight}
        return config.changed(**plain), "a network alone has no peers"
    one_each = not method.frozen_peers and (peers == 2 or method.links == "ring")
    if method.target == "mean-logit" and one_each:
        return config.changed(target="peers"), "the mean logits of one teacher are its logits"
    if method.target == "mean-prob":
        why = "KL from the mean of posteriors has the gradient of the mean of the KL from each"
        return config.changed(target="peers"), why
    return config, ""
