"""The learning rate of a step, a function of the step alone, and a warning where it never falls."""

import math

from dml_accel.core.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Return the rate of optimizer step ``step``, from 0.

    Args:
        optim: settings of a run or of one peer.
        step: optimizer steps taken before.
        steps_per_epoch: of the run.
    """
    lr, epoch = optim.highest_lr, step // steps_per_epoch
    by_epoch = optim.lr_every == "epoch"
    at = epoch if by_epoch else step / steps_per_epoch  # in epochs
    if at < optim.warmup:
        # The first step has a share already: a rate of 0 would teach nothing.
        done = epoch + 1 if by_epoch else (step + 1) / steps_per_epoch
        return lr * min(1.0, done / optim.warmup)
    if optim.lr_schedule == "step":
        return lr * optim.lr_gamma ** (epoch // optim.lr_step)
    if optim.lr_schedule == "milestones":
        drops = sum(step >= mark * steps_per_epoch for mark in optim.lr_milestones)
        return lr * optim.lr_gamma**drops
    if optim.lr_schedule == "constant":
        return lr
    # What is left from the end of the warm-up to the end of --epochs, from 1 to 0.
    left = 1 - (at - optim.warmup) / (optim.epochs - optim.warmup)
    left = min(max(left, 0.0), 1.0)
    share = left**optim.lr_power
    if optim.lr_schedule == "cosine":
        share = (1 - math.cos(math.pi * left)) / 2
    return optim.lr_min + (lr - optim.lr_min) * share


def what_never_falls(optim: OptimConfig, steps: int, steps_per_epoch: int) -> str:
    """Return one line if the rate does not come down by the end of a run; empty if it does.

    Args:
        optim: of the run.
        steps: that the whole run takes.
        steps_per_epoch: of the run.
    """
    lr, schedule = optim.highest_lr, optim.lr_schedule
    if schedule == "constant" or lr == 0:  # as asked
        return ""
    last = learning_rate(optim, steps - 1, steps_per_epoch)
    grows = steps <= optim.warmup * steps_per_epoch
    epochs = math.ceil(steps / steps_per_epoch)
    if optim.depends_on_last_epoch:
        if steps < optim.epochs * steps_per_epoch and (grows or last > lr / 2):
            return (
                f"the learning rate has hardly fallen when --max-steps ends the run: {last:.3g} of "
                f"{lr:g}, because --lr-schedule {schedule} falls until the end of --epochs "
                f"{optim.epochs}; --epochs {epochs} lets it fall"
            )
        return ""
    if last < lr and not grows:
        return ""
    drop = f"every --lr-step {optim.lr_step} epochs"
    if schedule == "milestones":
        drop = f"at --lr-milestones {' '.join(f'{at:g}' for at in optim.lr_milestones)}"
    remedy = "--lr-schedule cosine lets it fall"
    if schedule == "step" and epochs > 1:
        remedy += f", or --lr-step {max(1, epochs // 3)}"
    many = f"{epochs} epoch{'s' * (epochs > 1)}"
    return f"the learning rate never falls: it drops {drop}, and the run has {many}; {remedy}"
