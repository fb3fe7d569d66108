"""What training costs in forward passes: unlike seconds, the same on every machine.

With ``--exchange-every`` they depend on the placement: several processes predict with one snapshot.

A pass is one network predicting one image; a backward pass counts as two.
"""

from dml_accel.analysis.runs import Run


def passes_per_image(run: Run) -> float:
    """Return the passes for each training image of a step; of all stages together."""
    return _passes(run) / sum(_images(one) for one in (*run.earlier, run))


def million_passes(run: Run) -> float:
    """Return the passes of all optimizer steps of all stages, in millions."""
    return _passes(run) / 1e6


def _passes(run: Run) -> float:
    steps = int(run.results["steps"])
    alone = min(run.config.method.burn_in, steps)  # steps without a KL term
    per_batch = _alone(run) * alone + _together(run) * (steps - alone)
    return per_batch * run.config.optim.batch_size + sum(map(_passes, run.earlier))


def _images(run: Run) -> int:
    """Return how many images its steps used, each as often as it was used."""
    per_step = run.config.method.schedule.batches_per_step(len(run.peers))
    return per_step * run.config.optim.batch_size * int(run.results["steps"])


def _alone(run: Run) -> float:
    """Return the passes of a step in which nobody teaches, for each image of ``--batch-size``."""
    return 3.0 * len(run.peers)


def _together(run: Run) -> float:
    """Return the passes of a step in which peers teach, for each image of ``--batch-size``."""
    method, peers = run.config.method, len(run.peers)
    frozen = len(run.description.get("teachers", {}).get("frozen", {}))
    schedule, by_averages = method.schedule, method.teach_with == "ema"
    if method.kl_weight == 0 or peers + frozen < 2:  # nobody teaches
        return _alone(run)
    passes = schedule.cost(peers) * peers + frozen * schedule.batches_per_step(peers)
    if method.exchange_every > 1:
        return passes + _by_snapshots(run)
    # What teaches is predicted apart from what is trained.
    apart = by_averages or (run.config.compute.low_memory and not schedule.takes_turns)
    return passes + peers * apart


def _by_snapshots(run: Run) -> int:
    """Return the passes of the weights of the last exchange: every process predicts with its own.

    A peer that is alone on its processes needs those of the others only, unless all peers have one
    target.
    """
    ranks = run.description.get("placement", {}).get("ranks", {})
    teams = [tuple(ranks.get(name, [0])) for name in run.peers]
    leaves_out = not run.config.method.one_target.is_shared
    return sum(len(teams) - (leaves_out and teams.count(team) == 1) for team in set(teams))
