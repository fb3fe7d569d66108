"""From step records to numbers: windows of steps, throughput, and what a person sees meanwhile."""

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from dml_accel.mutual.metrics import finite
from dml_accel.mutual.step import PARTS
from dml_accel.training.loop import EvaluationRecord, StepRecord
from dml_accel.training.workload import Workload

_WARM_UP_STEPS = 2
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Window:
    """Consecutive steps summed up.

    Attributes:
        last: the last of them.
        steps: how many.
        seconds: what they took.
        losses: {peer: {part: mean over the steps that the peer took, None if none}}.
        skipped: {peer: steps that it skipped because its loss was not finite}, those with any.
    """

    last: StepRecord
    steps: int
    seconds: float
    losses: dict[str, dict[str, float | None]]
    skipped: dict[str, int]

    @property
    def step_seconds(self) -> float:
        """Mean seconds of one step."""
        return self.seconds / self.steps


class Windows:
    """Collects step records; reads the device once per window, not once per step.

    Windows end after steps 1, 2, 4, 8, ..., then with every twentieth of an epoch, and before a
    checkpoint or an evaluation, whose time is no step's.

    Args:
        peers: names, in the order of the records' rows.
        steps_per_epoch: optimizer steps of one epoch.
    """

    def __init__(self, peers: list[str], steps_per_epoch: int) -> None:
        self._peers = peers
        self._every = -(-steps_per_epoch // 20)
        self.steps_per_epoch = steps_per_epoch
        self._pending: list[StepRecord] = []
        self._measured: list[Window] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last window: it went into something else than steps."""
        self._started = time.perf_counter()

    def add(self, record: StepRecord) -> Window | None:
        """Take one record; return the window that it ends, if it ends one."""
        self._pending.append(record)
        early = record.step < self._every and record.step.bit_count() == 1
        into_epoch = (record.step - 1) % self.steps_per_epoch + 1
        ends = into_epoch % self._every == 0 or into_epoch == self.steps_per_epoch
        return self._close() if early or ends or record.pauses else None

    def _close(self) -> Window:
        losses = torch.stack([record.losses_KP for record in self._pending]).cpu().double()
        now = time.perf_counter()  # after the read above, which waits for the device
        taken = losses[:, :, :1].isfinite()
        means = (torch.where(taken, losses, 0.0).sum(0) / taken.sum(0)).tolist()
        skipped = (~taken).sum(0)[:, 0].tolist()
        window = Window(
            self._pending[-1],
            len(self._pending),
            now - self._started,
            {
                peer: {part: finite(value) for part, value in zip(PARTS, row, strict=True)}
                for peer, row in zip(self._peers, means, strict=True)
            },
            {name: count for name, count in zip(self._peers, skipped, strict=True) if count},
        )
        self._measured.append(window)
        self._pending, self._started = [], now
        return window

    def throughput(self, images: int) -> dict[str, float | None]:
        """Images per second and the median step, without the first steps of this process."""
        done, windows = 0, []
        for window in self._measured:
            if done >= _WARM_UP_STEPS:
                windows.append(window)
            done += window.steps
        windows = windows or self._measured[-1:]
        if not windows:
            return {"images_per_second": None, "step_seconds_median": None}
        seconds = sum(window.seconds for window in windows)
        per_step = [window.step_seconds for window in windows for _ in range(window.steps)]
        return {
            "images_per_second": images * len(per_step) / seconds,
            "step_seconds_median": median(per_step),
        }


class Display:
    """One bar with the time left on a terminal; plain lines elsewhere. Everything on stderr.

    Args:
        work: of all runs that will be shown, in the unit of their workloads.
        quiet: show nothing.
        many: several runs: a line a minute, and of the evaluations only each run's last.
    """

    def __init__(self, work: float, quiet: bool = False, many: bool = False) -> None:
        self._work, self._quiet, self._many = work, quiet, many
        self._seconds_between_lines = 60.0 if many else _SECONDS_BETWEEN_LINES
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=100,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=quiet or not self._terminal,
            smoothing=0,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self._started, self._said = time.monotonic(), -math.inf
        self._done = 0.0

    def begin(self, label: str, workload: Workload, epochs: int, batch_size: int) -> None:
        """Show another run.

        Args:
            label: what to call it; empty where there is only one.
            workload: its own.
            epochs: configured epochs.
            batch_size: images of one step.
        """
        self._label, self._workload = label, workload
        self._epochs, self._batch_size = epochs, batch_size
        self._work -= workload.done  # it takes no time here
        self._end = self._done + workload.total - workload.done

    def step(self, window: Window | None) -> None:
        """Count a step; ``window`` holds the news where a window ended with it."""
        self._advance(self._workload.step)
        if window is None:
            return
        losses = " ".join(
            f"{peer} ce {_number(part['cross_entropy'])} kl {_number(part['kl'])}"
            for peer, part in window.losses.items()
        )
        rate = self._batch_size / window.step_seconds
        if window.skipped:
            skipped = ", ".join(f"{peer} {count}" for peer, count in window.skipped.items())
            self._say(
                f"{self._at(window.last)} steps skipped of the last {window.steps}, because the "
                f"loss was not finite: {skipped}"
            )
        if self._terminal:
            epoch = f"epoch {window.last.epoch + 1}/{self._epochs}"
            self._bar.set_description(f"{self._label} {epoch}".strip(), False)
            self._bar.set_postfix_str(f"{rate:.0f} images/s {losses}")
        elif time.monotonic() - self._said >= self._seconds_between_lines:
            spent = time.monotonic() - self._started
            left = _duration(spent / self._done * max(0.0, self._work - self._done))
            self._say(f"{self._at(window.last)} {rate:.0f} images/s, {left} left: {losses}")

    def evaluation(self, record: EvaluationRecord) -> None:
        """Say what an evaluation found."""
        self._advance(self._workload.evaluation)
        if self._many and record.step < self._workload.steps:
            return
        found = record.val or record.test
        split = "val" if record.val else "test"
        scores = [*found["peers"].items(), ("ensemble", found["ensemble"])]
        accuracies = " ".join(f"{name} {100 * score['top1']:.2f}%" for name, score in scores)
        self._say(f"{self._at(record)} {split} top-1: {accuracies}")

    def end(self) -> None:
        """Count a run as done, whatever its evaluations were estimated at."""
        self._advance(self._end - self._done)

    def close(self) -> None:
        """Take the bar off the screen's last line."""
        self._bar.close()

    def _advance(self, work: float) -> None:
        self._done += work
        self._bar.update(100 * self._done / self._work - self._bar.n)

    def _at(self, record: StepRecord | EvaluationRecord) -> str:
        label = f"{self._label}: " if self._label else ""
        return (
            f"{label}step {record.step}/{self._workload.steps} "
            f"epoch {record.epoch + 1}/{self._epochs}"
        )

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if self._quiet:
            return
        if self._terminal:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def device_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: the accelerator's where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Let ``device_memory`` start anew: several runs may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # the system may not offer it: the process's peak then
        Path("/proc/self/clear_refs").write_text("5")
