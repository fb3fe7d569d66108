"""What training costs in forward passes: unlike seconds, the same on every machine.

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
    own = passes_per_batch(run) * run.config.optim.batch_size * int(run.results["steps"])
    return own + sum(map(_passes, run.earlier))


def _images(run: Run) -> int:
    """Return how many images its steps used, each as often as it was used."""
    per_step = run.config.method.schedule.batches_per_step(len(run.peers))
    return per_step * run.config.optim.batch_size * int(run.results["steps"])


def passes_per_batch(run: Run) -> float:
    """Return the passes of one optimizer step for each image of ``--batch-size``."""
    method, peers = run.config.method, len(run.peers)
    frozen = len(run.description.get("teachers", {}).get("frozen", {}))
    schedule, by_averages = method.schedule, method.teach_with == "ema"
    if method.kl_weight == 0 or peers + frozen < 2:  # nobody teaches
        return 3.0 * peers
    passes = schedule.cost(peers) * peers + frozen * schedule.batches_per_step(peers)
    # What teaches is predicted apart from what is trained.
    apart = by_averages or (run.config.compute.low_memory and not schedule.takes_turns)
    return passes + peers * apart
