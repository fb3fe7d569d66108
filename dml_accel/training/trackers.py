"""Records of a run for TensorBoard and the other trackers of Accelerate.

A tracker receives what metrics.jsonl holds, line by line, when the line is written: in the first
process only, and without reading anything more from the device.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import tracking
from accelerate.utils import LoggerType

from dml_accel.core.errors import UsageError

_PROJECT = "dml_accel"
LOGS = "logs"
FOLDER = f"{LOGS}/{_PROJECT}"  # ours; the rest of the logs may be a user's
_ALL = "all"


def resolve(names: Sequence[str]) -> list[str]:
    """Return the trackers that ``--log-with`` names, each once.

    Raises:
        UsageError: Accelerate does not have one, or it is not installed.
    """
    if not names:
        return []
    known = [name for name in LoggerType.list() if name != _ALL]
    here = [str(one) for one in tracking.get_available_trackers()]
    for name in names:
        if name not in (*known, _ALL):
            raise UsageError(
                f"--log-with {name}: Accelerate has no such tracker; it has {', '.join(known)}, or "
                f"{_ALL} for all that are installed"
            )
        if name != _ALL and name not in here:
            raise UsageError(f"--log-with {name} is not installed; pip install {name}")
    if _ALL in names and not here:
        raise UsageError(
            f"--log-with {_ALL}: no tracker is installed; pip install tensorboard, or another of "
            f"{', '.join(known)}"
        )
    return here if _ALL in names else list(dict.fromkeys(names))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in a line of metrics.jsonl by grouped names; without non-finite ones.

    For a window of steps: ``train/lr``, ``train/<part of the loss>/<peer>`` and
    ``train/skipped/<peer>``; for an evaluation, for ``val`` as for ``test``:
    ``test/<metric>/<peer>``, ``test/<metric>/ensemble``, ``test/agreement``,
    ``test/entropy/<peer>`` and ``test/kl/<teacher>/<peer>``; with ``--ema``, ``ema_test`` and
    ``ema_val`` are those of the averages.
    """
    found: dict[str, float | None] = {}
    if record["event"] == "step":
        found["train/lr"] = record["lr"]
        found |= {f"train/lr/{peer}": lr for peer, lr in record.get("lrs", {}).items()}
        for peer, parts in record["peers"].items():
            found |= {f"train/{part}/{peer}": value for part, value in parts.items()}
        found |= {f"train/skipped/{peer}": n for peer, n in record.get("skipped", {}).items()}
    if record["event"] == "eval":
        averages = record.get("ema") or {}
        splits = {split: record[split] for split in ("test", "val")}
        splits |= {f"ema_{split}": metrics for split, metrics in averages.items()}
        for split, metrics in splits.items():
            if metrics is not None:
                found |= _of_a_split(split, metrics)
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
    """The trackers of one run, in its first process.

    A tracker that fails is named and disabled: it must not end the run.

    Args:
        names: returned by ``resolve``.
        folder: of the run; trackers that write files use ``logs`` in it.
        config: hyperparameters, as plain values.
        step: of the checkpoint that the run resumes from in this folder; None if it starts here.
            TensorBoard hides what was logged from that step on; what metrics.jsonl holds of it is
            logged again.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int | None
    ) -> None:
        self._trackers: dict[str, Any] = {}
        logs = folder / LOGS
        resumes = step is not None and (folder / FOLDER).exists()
        if names:
            logs.mkdir(exist_ok=True)
        for name in names:
            kind = tracking.LOGGER_TYPE_TO_CLASS[name]
            places = [str(logs)] if kind.requires_logging_directory else []
            options = {"purge_step": step} if resumes and name == "tensorboard" else {}
            try:
                self._trackers[name] = kind(_PROJECT, *places, **options)
            except Exception as error:  # each tracker raises its own kinds
                _print_disabled(name, error)
        # The trackers of an older accelerate have started once they exist.
        self._each(lambda tracker: getattr(tracker, "start", list)())
        if not resumes:
            values = {
                n: " ".join(map(str, v)) if isinstance(v, list) else v for n, v in config.items()
            }
            self._each(lambda tracker: tracker.store_init_configuration(dict(values)))
        if step is not None and (folder / "metrics.jsonl").exists() and self._trackers:
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if record["step"] == step or not resumes:
                    self.take(record)

    def take(self, record: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""
        found = scalars(record)
        if found:
            self._each(lambda tracker: tracker.log(found, step=record["step"]))

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text, in Markdown."""
        self._each(lambda tracker: tracker.log({name: text}, step=step))

    def close(self) -> None:
        """Make the trackers write what they have buffered."""
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, call: Callable[[Any], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # each tracker raises its own kinds
                del self._trackers[name]
                _print_disabled(name, error)


def _print_disabled(name: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"warning: {name} logging is disabled: {reason}", file=sys.stderr, flush=True)
