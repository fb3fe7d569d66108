"""The learning rate of a step, a function of the step alone, and a warning where it never falls."""

import dataclasses
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
        drops = sum(step / steps_per_epoch >= mark for mark in optim.lr_milestones)
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
    epochs, cut = math.ceil(steps / steps_per_epoch), steps < optim.epochs * steps_per_epoch
    if cut and steps / steps_per_epoch <= optim.warmup:
        return (
            "the learning rate never falls: --max-steps ends the run within --warmup "
            f"{optim.warmup:g}; lower --warmup"
        )
    if optim.depends_on_last_epoch and cut and last > (lr + optim.lr_min) / 2:
        remedy = f"--epochs {epochs} lets it fall"
        if _is_too_short(optim, epochs):
            remedy = "a higher --max-steps lets it fall"
        return (
            f"the learning rate has hardly fallen when --max-steps ends the run: {last:.3g} of "
            f"{lr:g}, because --lr-schedule {schedule} falls until the end of --epochs "
            f"{optim.epochs}; {remedy}"
        )
    if last < lr:
        return ""
    many = f"{epochs} epoch{'s' * (epochs > 1)}"
    if optim.depends_on_last_epoch:
        if optim.lr_min >= lr:
            why = f"--lr-min {optim.lr_min:g} is --lr itself; lower it"
        elif _is_too_short(optim, epochs):
            why = (
                f"with --lr-every epoch it falls one epoch after --warmup {optim.warmup:g}, and "
                f"the run has {many}; --lr-every step lets it fall"
            )
        else:
            why = f"one step is left after --warmup {optim.warmup:g}; more --epochs let it fall"
        return f"the learning rate never falls: {why}"
    remedy = "--lr-schedule cosine"
    remedy += f" with --epochs {epochs}" * cut
    short = _is_too_short(optim, epochs)
    remedy += " and --lr-every step let it fall" if short else " lets it fall"
    if optim.lr_gamma == 1:
        why = "--lr-gamma 1 keeps it where it is"
        drops = dataclasses.replace(optim, lr_gamma=0.1)
        if learning_rate(drops, steps - 1, steps_per_epoch) < lr:
            remedy += ", or --lr-gamma 0.1"
    else:
        drop = f"every --lr-step {optim.lr_step} epochs"
        if schedule == "milestones":
            drop = f"at --lr-milestones {' '.join(f'{at:g}' for at in optim.lr_milestones)}"
        why = f"it drops {drop}, and the run has {many}"
        if schedule == "step" and epochs > 1:
            remedy += f", or --lr-step {max(1, epochs // 3)}"
    return f"the learning rate never falls: {why}; {remedy}"


def _is_too_short(optim: OptimConfig, epochs: int) -> bool:
    """Whether cosine or poly by the epoch is as high in the last epoch as after the warm-up."""
    return optim.lr_every == "epoch" and epochs - 1 <= optim.warmup
