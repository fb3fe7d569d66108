"""From step records to numbers: windows of steps, throughput, and what a person sees meanwhile."""

import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm

from dml_accel.engine import PARTS, EvaluationRecord, StepRecord
from dml_accel.metrics import finite

_WARM_UP_STEPS = 2
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Window:
    """Consecutive steps summed up: mean losses {peer: {part: value}} and the time they took."""

    last: StepRecord
    steps: int
    seconds: float
    losses: dict[str, dict[str, float | None]]

    @property
    def step_seconds(self) -> float:
        """Mean seconds of one step."""
        return self.seconds / self.steps


class Windows:
    """Collects step records; reads the device once per window, not once per step.

    Windows end after steps 1, 2, 4, 8, ..., then with every twentieth of an epoch, and before an
    evaluation, whose time is no step's.

    Args:
        peers: names, in the order of the records' rows.
        steps_per_epoch: optimizer steps of one epoch.
    """

    def __init__(self, peers: list[str], steps_per_epoch: int) -> None:
        self._peers = peers
        self._per_epoch = steps_per_epoch
        self._every = -(-steps_per_epoch // 20)
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
        into_epoch = (record.step - 1) % self._per_epoch + 1
        ends = into_epoch % self._every == 0 or into_epoch == self._per_epoch
        return self._close() if early or ends or record.evaluates else None

    def _close(self) -> Window:
        means = torch.stack([record.losses_KP for record in self._pending]).mean(0).tolist()
        now = time.perf_counter()  # after the read above, which waits for the device
        window = Window(
            self._pending[-1],
            len(self._pending),
            now - self._started,
            {
                peer: {part: finite(value) for part, value in zip(PARTS, row, strict=True)}
                for peer, row in zip(self._peers, means, strict=True)
            },
        )
        self._measured.append(window)
        self._pending, self._started = [], now
        return window

    def throughput(self, batch_size: int) -> dict[str, float | None]:
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
            "images_per_second": batch_size * len(per_step) / seconds,
            "step_seconds_median": median(per_step),
        }


class Display:
    """A bar with the time left on a terminal; plain lines elsewhere. Everything on stderr.

    Args:
        steps: optimizer steps of the whole run.
        epochs: configured epochs.
        batch_size: images of one step.
        quiet: show nothing.
    """

    def __init__(self, steps: int, epochs: int, batch_size: int, quiet: bool = False) -> None:
        self._steps, self._epochs, self._batch_size, self._quiet = steps, epochs, batch_size, quiet
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            unit="step",
            disable=quiet or not self._terminal,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self._started = self._said = time.monotonic()
        self._taken = 0

    def step(self, window: Window | None) -> None:
        """Count a step; ``window`` holds the news where a window ended with it."""
        self._taken += 1
        self._bar.update(1)
        if window is None:
            return
        losses = " ".join(
            f"{peer} ce {_number(part['cross_entropy'])} kl {_number(part['kl'])}"
            for peer, part in window.losses.items()
        )
        rate = self._batch_size / window.step_seconds
        if self._terminal:
            self._bar.set_description(f"epoch {window.last.epoch + 1}/{self._epochs}", False)
            self._bar.set_postfix_str(f"{rate:.0f} images/s {losses}")
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES or self._taken == 1:
            done, last = time.monotonic() - self._started, window.last
            left = _duration(done / self._taken * (self._steps - last.step))
            self._say(
                f"step {last.step}/{self._steps} epoch {last.epoch + 1}/{self._epochs} "
                f"{rate:.0f} images/s, {left} left: {losses}"
            )

    def evaluation(self, record: EvaluationRecord) -> None:
        """Say what an evaluation found."""
        found = record.val or record.test
        split = "val" if record.val else "test"
        scores = [*found["peers"].items(), ("ensemble", found["ensemble"])]
        accuracies = " ".join(f"{name} {100 * score['top1']:.2f}%" for name, score in scores)
        self._say(
            f"step {record.step}/{self._steps} epoch {record.epoch + 1}/{self._epochs} "
            f"{split} top-1: {accuracies}"
        )

    def close(self) -> None:
        """Take the bar off the screen's last line."""
        self._bar.close()

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
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
