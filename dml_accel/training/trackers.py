"""The records of a run for TensorBoard and whatever other tracker Accelerate knows.

A tracker is told what metrics.jsonl holds, line by line, when the line is written: the first
process alone speaks, and nothing more is read from the device.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import tracking
from accelerate.utils import LoggerType

from dml_accel.core.config import UsageError

_PROJECT = "dml_accel"
LOGS = "logs"
FOLDER = f"{LOGS}/{_PROJECT}"  # what is ours of it: the rest may be a user's
_ALL = "all"


def check(names: Sequence[str]) -> list[str]:
    """Return the trackers that ``--log-with`` means, each once.

    Raises:
        UsageError: Accelerate does not know one, or it is not installed.
    """
    known = [name for name in LoggerType.list() if name != _ALL]
    here = [str(one) for one in tracking.get_available_trackers()]
    for name in names:
        if name not in (*known, _ALL):
            raise UsageError(
                f"--log-with {name}: Accelerate knows no such tracker; it knows "
                f"{', '.join(known)}, or {_ALL} for those that are installed"
            )
        if name != _ALL and name not in here:
            raise UsageError(f"--log-with {name}: it is not installed; pip install {name}")
    if _ALL in names and not here:
        raise UsageError(
            f"--log-with {_ALL}: no tracker is installed; pip install tensorboard, or another of "
            f"{', '.join(known)}"
        )
    return here if _ALL in names else list(dict.fromkeys(names))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in a line of metrics.jsonl by grouped names; what is not finite is absent.

    Of a window of steps: ``train/lr``, ``train/<part of the loss>/<peer>`` and
    ``train/skipped/<peer>``; of an evaluation, for ``val`` as for ``test``:
    ``test/<metric>/<peer>``, ``test/<metric>/ensemble``, ``test/agreement``,
    ``test/entropy/<peer>`` and ``test/kl/<teacher>/<peer>``.
    """
    found: dict[str, float | None] = {}
    if record["event"] == "step":
        found["train/lr"] = record["lr"]
        for peer, parts in record["peers"].items():
            found |= {f"train/{part}/{peer}": value for part, value in parts.items()}
        found |= {f"train/skipped/{peer}": n for peer, n in record.get("skipped", {}).items()}
    if record["event"] == "eval":
        for split in ("test", "val"):
            if record[split] is not None:
                found |= _of_a_split(split, record[split])
    return {name: value for name, value in found.items() if value is not None}


def _of_a_split(split: str, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    found = {f"{split}/agreement": metrics["agreement"]}
    for who, values in (*metrics["peers"].items(), ("ensemble", metrics["ensemble"])):
        found |= {f"{split}/{name}/{who}": value for name, value in values.items() if name != "n"}
    found |= {f"{split}/entropy/{who}": value for who, value in metrics["entropy"].items()}
    for teacher, row in metrics["kl"].items():
        found |= {f"{split}/kl/{teacher}/{who}": v for who, v in row.items() if who != teacher}
    return found


class Trackers:
    """Trackers of one run, in its first process.

    One that fails is named and left out from then on: it is not worth the run.

    Args:
        names: what ``check`` returned.
        folder: the run's; those that write files do so in ``logs`` there.
        config: hyperparameters, as plain values.
        step: the checkpoint's that the run goes on from in this folder; None where it begins here.
            What was told from that step on is hidden by TensorBoard, and told again where
            metrics.jsonl holds it.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int | None
    ) -> None:
        self._trackers: dict[str, Any] = {}
        logs = folder / LOGS
        goes_on = step is not None and (folder / FOLDER).exists()
        if names:
            logs.mkdir(exist_ok=True)
        for name in names:
            kind = tracking.LOGGER_TYPE_TO_CLASS[name]
            places = [str(logs)] if kind.requires_logging_directory else []
            options = {"purge_step": step} if goes_on and name == "tensorboard" else {}
            try:
                self._trackers[name] = kind(_PROJECT, *places, **options)
            except Exception as error:  # each tracker raises its own kinds
                _say_lost(name, error)
        self._each(lambda tracker: tracker.start())
        if not goes_on:
            values = {n: " ".join(v) if isinstance(v, list) else v for n, v in config.items()}
            self._each(lambda tracker: tracker.store_init_configuration(dict(values)))
        if step is not None and (folder / "metrics.jsonl").exists() and self._trackers:
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                if record["step"] == step or not goes_on:
                    self.take(record)

    def take(self, record: Mapping[str, Any]) -> None:
        """Tell a line of metrics.jsonl."""
        found = scalars(record)
        if found:
            self._each(lambda tracker: tracker.log(found, step=record["step"]))

    def text(self, name: str, text: str, step: int) -> None:
        """Tell a text, in Markdown."""
        self._each(lambda tracker: tracker.log({name: text}, step=step))

    def close(self) -> None:
        """Let the trackers write what they have left."""
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, tell: Callable[[Any], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # each tracker raises its own kinds
                del self._trackers[name]
                _say_lost(name, error)


def _say_lost(name: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"warning: {name} is told no more: {reason}", file=sys.stderr, flush=True)
