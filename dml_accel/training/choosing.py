"""Choosing by validation: the best weights of each peer, and when to stop.

    --keep best      each peer's weights at its best evaluation
    --early-stop N   the end, after N evaluations without a better one of the cohort

Both follow evaluations, which are the same in all processes, so that all processes agree. Taking
the same evaluation twice changes nothing: a run that resumes repeats the one at its checkpoint.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from dml_accel.mutual.peer import Peer

STATE = BEST, EARLY_STOP = "best", "early_stop"
_METRICS = {"n", "top1", "top5", "nll", "ece"}
_NEWER_METRICS = {"macro_f1"}  # which older checkpoints lack


class Choosing:
    """What a run remembers of its evaluations.

    Args:
        peers: those that are trained here; their ``best`` is set.
        keeps_best: ``--keep best``.
        patience: ``--early-stop``.
        state: what ``state`` returned before the run was interrupted; empty at the start.

    Attributes:
        best: the best evaluation of each peer of the cohort by validation top-1, the earlier one of
            two that are equal: {name: {step, val, test}}; None unless it is kept.
        is_over: whether ``patience`` evaluations in a row were not better.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        keeps_best: bool,
        patience: int | None,
        state: Mapping[str, Any],
    ) -> None:
        self._peers, self._patience = peers, patience
        self.best: dict[str, dict[str, Any]] | None = None
        if keeps_best:
            self.best = dict(state.get(BEST, {}))
        else:  # the run that is resumed may have kept them
            for peer in peers:
                peer.best = None
        self._early: dict[str, Any] = {"top1": None, "worse": 0, "step": 0}
        self._early |= state.get(EARLY_STOP, {})

    @property
    def is_on(self) -> bool:
        """Whether anything is chosen."""
        return self.best is not None or self._patience is not None

    @property
    def is_over(self) -> bool:
        """See above."""
        return is_over(self._patience, {EARLY_STOP: self._early})

    def take(self, step: int, test: Mapping[str, Any], val: Mapping[str, Any] | None) -> bool:
        """Take an evaluation after ``step`` optimizer steps, as ``metrics.finish`` returns it.

        Returns:
            Whether a checkpoint that was written before it lacks something.
        """
        if val is None:
            return False
        has_news = self._patience is not None and step > self._early["step"]
        if self.best is not None:
            has_news |= self._keep_better(self.best, step, test["peers"], val["peers"])
        mean = fmean(metrics["top1"] for metrics in val["peers"].values())
        if step > self._early["step"]:
            top1 = self._early["top1"]
            better = top1 is None or mean > top1
            worse = 0 if better else self._early["worse"] + 1
            self._early = {"top1": mean if better else top1, "worse": worse, "step": step}
        return has_news

    def _keep_better(
        self,
        best: dict[str, dict[str, Any]],
        step: int,
        test: Mapping[str, Any],
        val: Mapping[str, Any],
    ) -> bool:
        better = {n for n in val if n not in best or val[n]["top1"] > best[n]["val"]["top1"]}
        best |= {name: {"step": step, "val": val[name], "test": test[name]} for name in better}
        for peer in self._peers:
            if peer.name in better:
                weights = peer.module.state_dict().items()
                peer.best = {name: t.detach().to("cpu", copy=True) for name, t in weights}
        return bool(better)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, besides the weights: only that of flags that are on."""
        best = {} if self.best is None else {BEST: self.best}
        return best if self._patience is None else best | {EARLY_STOP: self._early}


def is_over(patience: int | None, state: Mapping[str, Any]) -> bool:
    """Whether a run with such a ``Choosing.state`` stops early."""
    return patience is not None and state.get(EARLY_STOP, {"worse": 0})["worse"] >= patience


def best_of(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the peer with the highest top-1; the lowest NLL, then the name breaks a tie."""

    def score(name: str) -> tuple[float, float]:
        nll = scores[name].get("nll")
        return scores[name]["top1"], -nll if isinstance(nll, int | float) else -float("inf")

    return max(sorted(scores), key=score)


def wrong_state(state: Mapping[str, Any], peers: Iterable[str]) -> list[str]:
    """Return what of a checkpoint's state, which anybody may have written, is not ours."""
    wrong = []
    best, early = state.get(BEST, {}), state.get(EARLY_STOP)
    if not (
        isinstance(best, dict) and set(best) <= set(peers) and all(map(_is_best, best.values()))
    ):
        wrong.append(BEST)
    if EARLY_STOP in state and not _is_early(early):
        wrong.append(EARLY_STOP)
    return wrong


def _is_best(found: Any) -> bool:
    if not (isinstance(found, dict) and set(found) == {"step", "val", "test"}):
        return False
    splits = (found["val"], found["test"])
    return _is_count(found["step"]) and all(
        isinstance(one, dict)
        and _METRICS <= set(one) <= _METRICS | _NEWER_METRICS
        and _is_count(one["n"])
        and isinstance(one["top1"], float)
        and all(isinstance(value, int | float | None) for value in one.values())
        for one in splits
    )


def _is_early(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == {"top1", "worse", "step"}
        and isinstance(found["top1"], float | None)
        and _is_count(found["worse"])
        and _is_count(found["step"])
    )


def _is_count(found: Any) -> bool:
    return type(found) is int and found >= 0
