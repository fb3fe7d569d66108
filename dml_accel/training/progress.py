"""Progress of a run: its expected cost, windows of steps, throughput, and the progress bar."""

import contextlib
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile
from tqdm.utils import ObjectWrapper

from dml_accel.core.config import Config
from dml_accel.core.tables import terminal_columns
from dml_accel.data.selection import split_names, training_sizes
from dml_accel.data.sources import Source
from dml_accel.models.spec import parse_cohort
from dml_accel.mutual.metrics import finite
from dml_accel.mutual.step import PARTS
from dml_accel.training.loop import EvaluationRecord, StepRecord, steps_to_take

_WARM_UP_STEPS = 2
_SECONDS_BETWEEN_LINES = 10.0
_CLEAR_LINE = "\r\x1b[K"
_NARROWEST_BAR, _NOTEBOOK_COLUMNS = 8, 100
# Of ": 100%|", "| 00:00<00:00" and ", ", which tqdm puts around what we add.
_COLUMNS_BESIDE_BAR = 22


@dataclass(frozen=True)
class Workload:
    """The expected cost of a run, in any unit that the runs of one display share.

    Attributes:
        steps: optimizer steps of the whole run.
        step: cost of one step.
        evaluations: of the whole run.
        evaluation: cost of one evaluation.
        images_per_step: an image counts once, however many peers see it.
        taken: optimizer steps that were taken before.
        peers: names, in the order of the command line.
        splits: what those that are evaluated are called, by role: ``val`` and ``test``.
    """

    steps: int
    step: float
    evaluations: int
    evaluation: float
    images_per_step: int
    taken: int = 0
    peers: tuple[str, ...] = ()
    splits: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Cost of the whole run."""
        return self.steps * self.step + self.evaluations * self.evaluation

    @property
    def done(self) -> float:
        """Cost of what was done before."""
        return (self.total - self.evaluation) * self.taken / self.steps


def workload(config: Config, source: Source, image_cost: float = 1.0, taken: int = 0) -> Workload:
    """Return the expected cost of a run, in forward passes of an image times ``image_cost``.

    A backward pass counts as two forward passes. If evaluations follow the clock, only the last one
    is counted.

    Args:
        config: of the run.
        source: its images.
        image_cost: of a forward pass of one image through all networks.
        taken: optimizer steps that were taken before.
    """
    trained, held = training_sizes(len(source.train), config.data)
    batch_size, schedule = config.optim.batch_size, config.method.schedule
    steps = steps_to_take(config.optim, trained)
    period = config.run.eval_interval.steps(trained // batch_size)
    held = held or len(source.val or ())
    names = tuple(spec.name for spec in parse_cohort(config.cohort))
    peers = len(names)
    return Workload(
        steps=steps,
        step=schedule.cost(peers) * batch_size * image_cost,
        evaluations=-(-steps // period) if period else 1,
        evaluation=(held + len(source.test)) * image_cost * (1 if config.optim.ema is None else 2),
        images_per_step=batch_size * schedule.batches_per_step(peers),
        taken=taken,
        peers=names,
        splits=split_names(config.data, source.val_name)._asdict(),
    )


@dataclass(frozen=True)
class Window:
    """Consecutive steps, summarised.

    Attributes:
        last: the last one.
        steps: how many.
        seconds: that they took.
        losses: {peer: {part: mean over the steps that the peer took; None if it took none}}.
        skipped: {peer: steps skipped because its loss was not finite}, for peers with any.
        waiting: share of the time for which this process's host has waited for images; None if they
            are in memory.
    """

    last: StepRecord
    steps: int
    seconds: float
    losses: dict[str, dict[str, float | None]]
    skipped: dict[str, int]
    waiting: float | None = None

    @property
    def step_seconds(self) -> float:
        """Mean seconds of one step."""
        return self.seconds / self.steps


class Windows:
    """Collects step records, and reads losses from the device once per window, not once per step.

    Windows end after steps 1, 2, 4, 8, ..., then with every twentieth of an epoch, and before a
    checkpoint or an evaluation, whose time must not count as a step's.

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
        """Exclude the time since the last window, which was not spent on steps."""
        self._started = time.perf_counter()

    def add(self, record: StepRecord) -> Window | None:
        """Add a record; return the window that it ends, if it ends one."""
        self._pending.append(record)
        early = record.step < self._every and record.step.bit_count() == 1
        into_epoch = (record.step - 1) % self.steps_per_epoch + 1
        ends = into_epoch % self._every == 0 or into_epoch == self.steps_per_epoch
        return self._close() if early or ends or record.pauses else None

    def _close(self) -> Window:
        losses = torch.stack([record.losses_KP for record in self._pending]).cpu().double()
        now = time.perf_counter()  # after the line above, which waits for the device
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
            self._waiting(now - self._started),
        )
        self._measured.append(window)
        self._pending, self._started = [], now
        return window

    def _waiting(self, seconds: float) -> float | None:
        waited = [record.waited for record in self._pending if record.waited is not None]
        return min(1.0, sum(waited) / seconds) if waited and seconds else None

    def throughput(self, images: int) -> dict[str, float | None]:
        """Return images per second and the median step, without the first steps of this process."""
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
        waiting = [
            window.waiting * window.seconds for window in windows if window.waiting is not None
        ]
        return {
            "images_per_second": images * len(per_step) / seconds,
            "step_seconds_median": median(per_step),
            **({"waiting_for_images": sum(waiting) / seconds} if waiting else {}),
        }


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows what is printed."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


class Display:
    """A progress bar with the remaining time on a terminal or in a notebook, else plain lines.

    All of it is on stderr. On a terminal, what else is printed while the bar is there appears above
    it. In a notebook the bar is a widget if ipywidgets is installed, else a line that moves in
    place. Peers are shown in the order of the command line.

    Args:
        work: cost of all runs that will be shown, in the unit of their workloads.
        quiet: show nothing.
        many: whether there are several runs: a line per minute, and only each run's last
            evaluation.
    """

    def __init__(self, work: float, quiet: bool = False, many: bool = False) -> None:
        self._work, self._quiet, self._many = work, quiet, many
        self._seconds_between_lines = 60.0 if many else _SECONDS_BETWEEN_LINES
        notebook = in_notebook()
        self._widget = notebook and find_spec("ipywidgets") is not None
        self._columns = _NOTEBOOK_COLUMNS if notebook else terminal_columns(sys.stderr)
        self._bar: tqdm[NoReturn] | None = None
        self._streams = contextlib.ExitStack()
        if quiet and self._columns:  # the terminal may show the bar of the first process
            self._streams.enter_context(contextlib.redirect_stderr(_OverBar(sys.stderr)))
        self._started, self._printed = time.monotonic(), -math.inf
        self._done = 0.0

    def begin(self, label: str, workload: Workload, epochs: int) -> None:
        """Show another run.

        Args:
            label: of the run; empty if it is the only one.
            workload: its expected cost.
            epochs: as configured.
        """
        if not self._done:  # what came before was not spent on steps
            self._started = time.monotonic()
        self._label, self._workload, self._epochs = label, workload, epochs
        self._work -= workload.done  # it was done before and takes no time now
        self._end = self._done + workload.total - workload.done
        if self._columns and not self._quiet and self._bar is None:
            self._show_bar()

    def step(self, window: Window | None) -> None:
        """Count a step; ``window`` is the one that ended with it, if one did."""
        self._advance(self._workload.step)
        if window is None:
            return
        rate = f"{self._workload.images_per_step / window.step_seconds:.0f} images/s"
        if window.waiting is not None:
            rate += f", {100 * window.waiting:.0f}% waiting"
        if window.skipped:
            skipped = ", ".join(f"{peer} {count}" for peer, count in window.skipped.items())
            self._print(
                f"{self._at(window.last)} skipped steps of the last {window.steps}, because the "
                f"loss was not finite: {skipped}"
            )
        losses = self._losses(window)
        if self._bar is not None:
            description = f"{self._label} {self._epoch(window.last)}".strip()
            taken = len(description) + _NARROWEST_BAR + _COLUMNS_BESIDE_BAR
            room = (self._columns or 0) - taken
            self._bar.set_description(description, False)
            self._bar.set_postfix_str(_longest(room, rate, losses))
        elif time.monotonic() - self._printed >= self._seconds_between_lines:
            spent = time.monotonic() - self._started
            left = tqdm.format_interval(spent / self._done * max(0.0, self._work - self._done))
            self._print(f"{self._at(window.last)} {rate}, {left} left: {losses[0]}")

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print the accuracies of an evaluation."""
        self._advance(self._workload.evaluation)
        if self._many and record.step < self._workload.steps:
            return
        split = "val" if record.val else "test"
        metrics = record.val or record.test
        name = self._workload.splits.get(split) or split
        line = f"{self._at(record)} {name} top-1: {self._accuracies(metrics)}"
        if record.ema:
            line += f"; averages: {self._accuracies(record.ema[split])}"
        self._print(line)

    def _accuracies(self, metrics: dict[str, Any]) -> str:
        scores = [*self._in_order(metrics["peers"]).items(), ("ensemble", metrics["ensemble"])]
        return " ".join(f"{name} {100 * score['top1']:.2f}%" for name, score in scores)

    def end(self) -> None:
        """Count the run as done, whatever its evaluations were estimated to cost."""
        self._advance(self._end - self._done)

    def close(self) -> None:
        """Remove the bar from the last line of the screen."""
        self._streams.close()
        if self._bar is not None:
            self._bar.close()

    def _show_bar(self) -> None:
        options: dict[str, Any] = {
            "total": 100,
            "bar_format": "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            "smoothing": 0,
        }
        if self._widget:
            from tqdm.notebook import tqdm as widget

            self._bar = widget(**options)
            return
        self._bar = tqdm(**options, ncols=self._columns, file=sys.stderr)
        shown = sys.stderr
        self._streams.enter_context(contextlib.redirect_stderr(_AboveBar(shown, shown)))
        if terminal_columns(sys.stdout):
            self._streams.enter_context(contextlib.redirect_stdout(_AboveBar(sys.stdout, shown)))

    def _losses(self, window: Window) -> list[str]:
        """Return the losses as texts, each shorter than the one before."""
        losses = self._in_order(window.losses)
        ce, kl = ([part[key] for part in losses.values()] for key in ("cross_entropy", "kl"))
        each = " ".join(
            f"{name} ce {_number(part['cross_entropy'])} kl {_number(part['kl'])}"
            for name, part in losses.items()
        )
        texts = [each]
        for digits in (3, 2):
            texts.append(f"ce {_numbers(ce, digits)} kl {_numbers(kl, digits)}")
        if len(losses) > 1:
            mean = f"ce {_number(_mean(ce), 2)} kl {_number(_mean(kl), 2)}"
            texts += [f"mean of {len(losses)}: {mean}", f"mean: {mean}"]
        return [*texts, f"{'mean ' * (len(losses) > 1)}ce {_number(_mean(ce), 2)}"]

    def _in_order(self, of_peers: dict[str, Any]) -> dict[str, Any]:
        """Return what is known of each peer in the order of the command line, not of names."""
        return {name: of_peers[name] for name in self._workload.peers or of_peers}

    def _advance(self, work: float) -> None:
        self._done += work
        if self._bar is not None:
            self._columns = terminal_columns(sys.stderr) or self._columns  # it may be resized
            if not self._widget:
                self._bar.ncols = self._columns
            self._bar.update(100 * self._done / self._work - self._bar.n)

    def _at(self, record: StepRecord | EvaluationRecord) -> str:
        label = f"{self._label}: " if self._label else ""
        return f"{label}step {record.step}/{self._workload.steps} {self._epoch(record)}"

    def _epoch(self, record: StepRecord | EvaluationRecord) -> str:
        return f"epoch {record.epoch + 1}/{self._epochs}"

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        if self._quiet:
            return
        if self._columns:  # a terminal would break the line within words
            line = textwrap.fill(
                line,
                self._columns,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        print(line, file=sys.stderr, flush=True)


class _AboveBar(DummyTqdmFile):
    """A stream whose lines appear above the bar, which is drawn again below them.

    Args:
        stream: to write to.
        shown: where the bar is.
    """

    def __init__(self, stream: Any, shown: Any) -> None:
        super().__init__(stream)
        self.wrapper_setattr("_shown", shown)

    def write(self, text: str, nolock: bool = False) -> None:
        with tqdm.external_write_mode(self._shown, nolock):
            super().write(text, nolock=True)


class _OverBar(ObjectWrapper):
    """A stream that clears the line first, on which another process may show its bar."""

    def write(self, text: str) -> None:
        self._wrapped.write(f"{_CLEAR_LINE}{text}" if text.strip() else text)


def _longest(room: int, rate: str, losses: Sequence[str]) -> str:
    """Return the first of ``losses``, after the rate, that leaves room for a bar."""
    texts = [*(f"{rate} {text}" for text in losses), rate, ""]
    return next((text for text in texts if len(text) <= room), "")


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of losses; None if one is not finite."""
    found = [value for value in values if value is not None]
    return fmean(found) if len(found) == len(values) else None


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _numbers(values: Sequence[float | None], digits: int) -> str:
    return " ".join(_number(value, digits) for value in values)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: on CUDA the GPU's, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory(device: torch.device) -> None:
    """Reset ``peak_memory``, because several runs may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not on every system; the peak then covers all runs
        Path("/proc/self/clear_refs").write_text("5")
