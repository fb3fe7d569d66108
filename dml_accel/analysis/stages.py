"""The method of two stages: K networks alone, then one distilled from their frozen ensemble.

Both stages together cost what K networks that learn together cost. A forward pass counts 1, a
backward pass 2: E epochs of K networks are 3KE. An epoch of both stages is 3K for the teachers, 3
for the pupil and K for what the teachers say to it, so each has 3KE / (4K + 3) epochs. The learning
rate changes at the same share of the epochs as in the other methods.
"""

from typing import Any

from dml_accel.analysis.methods import BASELINE, IN_STAGES, METHODS, peers_of
from dml_accel.core.assignments import peer_settings
from dml_accel.core.cohort import words_of
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.method import MethodConfig


def teachers_config(config: Config) -> Config:
    """Return the configuration of the first stage, from that of the method.

    Raises:
        UsageError: there is no such stage; see ``_shortened``.
    """
    return _shortened(config).changed(target="peers", **METHODS[BASELINE].changes)


def pupil_config(config: Config) -> Config:
    """Return the configuration of the second stage, without its teachers: the first network.

    Raises:
        UsageError: see above.
    """
    word = words_of(config.cohort)[0]
    arguments = f"[{word.arguments}]" * bool(word.arguments)
    net = f"{'timm:' * word.from_timm}{word.net}{arguments}"
    of_it = [one for one in config.optim.peer_opt if peer_settings(one)[0] == word.peers[0]]
    return _shortened(config).changed(cohort=[net], peer_opt=of_it)


def taught_by(pupil: Config, teachers: str) -> Config:
    """Return the configuration of the second stage with its teachers: the folder of a run.

    Raises:
        UsageError: a flag excludes frozen peers.
    """
    return pupil.changed(links=METHODS[IN_STAGES].changes["links"], frozen_peers=[teachers])


def shared_flags(config: Config, stage: Config) -> dict[str, Any]:
    """Return the flags that a stage has changed and the methods of a comparison share."""
    others, changed = config.as_dict(), stage.differences(config)
    own = {*MethodConfig.names()} - {"kl_warmup", "burn_in"}
    return {name: others[name] for name in others if name in changed and name not in own}


def _shortened(config: Config) -> Config:
    """Return a configuration of fewer epochs, whose learning rate and KL weight change in time.

    Raises:
        UsageError: no epoch or step is left, or the run may end early.
    """
    optim, peers = config.optim, peers_of(config)
    if optim.early_stop is not None:
        raise UsageError(
            "two stages cost what the other methods do only without --early-stop: drop one"
        )

    def share(count: int) -> int:
        return 3 * peers * count // (4 * peers + 3)

    for name, count in (("epochs", optim.epochs), ("max-steps", optim.max_steps or optim.epochs)):
        if share(count) == 0:
            raise UsageError(
                f"--{name} {count} leaves nothing for two stages at equal compute: each has "
                f"{3 * peers}/{4 * peers + 3} of it, rounded down"
            )
    epochs = share(optim.epochs)
    scale = epochs / optim.epochs
    changes: dict[str, Any] = {"epochs": epochs}
    changes["max_steps"] = None if optim.max_steps is None else share(optim.max_steps)
    changes["warmup"] = optim.warmup * scale
    changes["kl_warmup"] = round(config.method.kl_warmup * scale)
    changes["burn_in"] = share(config.method.burn_in)
    drops = list(optim.lr_milestones)
    if optim.lr_schedule == "step":
        drops = [float(at) for at in range(optim.lr_step, optim.epochs, optim.lr_step)]
    if drops:  # as fractions of epochs, where the rate of whole ones would drop at another time
        changes |= {"lr_schedule": "milestones", "lr_milestones": [at * scale for at in drops]}
    return config.changed(**changes)
