"""The progress of a run on terminals of several widths, and in plain lines."""

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TextIO

import pytest
import torch

from dml_accel.training.loop import EvaluationRecord, StepRecord
from dml_accel.training.progress import Display, Window, Workload

# In the order of the command line, which is not that of the names.
PEERS = ("wrn_16_2-0", "resnet8-0", "resnet8-1", "mobilenet-0")
WIDTHS = (40, 80, 200)


class Terminal:
    """A terminal of a given width; once it is closed, ``text`` is everything that was written."""

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream: TextIO = open(slave, "w")  # noqa: SIM115
        self._content = b""
        # Nobody may write more than some thousand characters to a terminal that is not read.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # nobody can write to it any more
            while part := os.read(self._master, 65536):
                self._content += part

    def close(self) -> None:
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        self.text = self._content.decode()


def lines_of(written: str) -> list[list[str]]:
    """What every line of the screen showed, one after the other."""
    return [re.split(r"\r|\x1b\[K", line) for line in written.replace("\r\n", "\n").split("\n")]


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    shown = Terminal(columns)
    out = open(os.dup(shown.stream.fileno()), "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", shown.stream)
    monkeypatch.setattr(sys, "stdout", out)  # another stream to the same terminal
    try:
        yield shown
    finally:
        monkeypatch.undo()
        out.close()
        shown.close()


def window(peers: tuple[str, ...], step: int = 5) -> Window:
    losses = {
        name: {"loss": 2.0, "cross_entropy": 1.5 + place, "kl": 0.25}
        for place, name in enumerate(sorted(peers))  # as records are
    }
    record = StepRecord(step, 0, 0.1, False, torch.zeros(len(peers), 3))
    return Window(record, 1, 0.5, losses, {})


def evaluation(peers: tuple[str, ...]) -> EvaluationRecord:
    scores = {name: {"top1": 0.25} for name in sorted(peers)}
    return EvaluationRecord(10, 0, {"peers": scores, "ensemble": {"top1": 0.5}}, None)


def shown(peers: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that a display writes to a terminal in ten steps and an evaluation."""
    with terminal(columns, monkeypatch) as there:
        display = Display(12.0)
        display.begin("", Workload(10, 1.0, 1, 2.0, 32, peers=peers), 8)
        for step in range(1, 11):
            display._bar.last_print_t = 0  # tqdm would wait a tenth of a second
            display.step(window(peers, step))
            if step == 5:
                print("placement: split", file=sys.stderr)
                print("a library prints", flush=True)
                print("and one warns in part", end="", file=sys.stderr)
                print(", and in part", file=sys.stderr)
        display.evaluation(evaluation(peers))
        display.end()
        display.close()
    return there.text


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_bar_fits_the_terminal_and_collides_with_nothing(
    count: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = PEERS[:count]
    lines = lines_of(shown(peers, columns, monkeypatch))
    texts = [text.rstrip() for line in lines for text in line]
    assert max(map(len, texts)) <= columns
    for message in ("placement: split", "a library prints", "and one warns in part, and in part"):
        assert message in texts  # alone on its line
    bars = [text for text in texts if "%|" in text and "epoch" in text]
    assert len(bars) >= 10
    bar = bars[-2]
    assert bar.startswith("epoch 1/8: ") and "<" in bar
    assert len(re.search(r"\|(.*)\|", bar)[1]) >= 8
    assert ("64 images/s" in bar) == (columns > 40)
    each = " ".join(f"{name} ce {1.5 + sorted(peers).index(name):.3f} kl 0.250" for name in peers)
    expected = {
        (1, 40): "",
        (1, 80): "ce 1.500 kl 0.250",
        (1, 200): each,
        (2, 80): "ce 2.500 1.500 kl 0.250 0.250",
        (2, 200): each,
        (4, 80): "mean of 4: ce 3.00 kl 0.25",
        (4, 200): each,
    }
    assert bar.endswith(expected.get((count, columns), ""))


def test_peers_are_in_the_order_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dml_accel.training.progress._SECONDS_BETWEEN_LINES", 0.0)
    display = Display(12.0)
    display.begin("", Workload(10, 1.0, 1, 2.0, 32, peers=PEERS), 8)
    display.step(window(PEERS))
    display.evaluation(evaluation(PEERS))
    display.close()
    losses, scores = capsys.readouterr().err.splitlines()
    for line in (losses, scores):
        assert [line.index(f" {name} ") for name in PEERS] == sorted(
            line.index(f" {name} ") for name in PEERS
        )
    assert losses.startswith("step 5/10 epoch 1/8 64 images/s, ")
    assert scores.startswith("step 10/10 epoch 1/8 test top-1: wrn_16_2-0 25.00%")
    assert scores.endswith(" ensemble 50.00%")


def test_an_evaluation_names_its_split(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(24.0)
    names = {"val": "val (0.1 of train)", "test": "val"}
    display.begin("", Workload(10, 1.0, 1, 2.0, 32, peers=PEERS, splits=names), 8)
    tested = evaluation(PEERS)
    for record in (tested, replace(tested, val=tested.test, ema={"val": tested.test})):
        display.evaluation(record)
    test, val = capsys.readouterr().err.splitlines()
    assert " epoch 1/8 val top-1: wrn_16_2-0 25.00%" in test
    assert " epoch 1/8 val (0.1 of train) top-1: wrn_16_2-0 25.00%" in val


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_long_message_is_broken_between_words(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [line[-1] for line in lines_of(shown(PEERS, columns, monkeypatch))]
    words = " ".join(text.strip() for text in texts)
    assert (
        "wrn_16_2-0 25.00% resnet8-0 25.00% resnet8-1 25.00% mobilenet-0 25.00% ensemble" in words
    )


def test_other_processes_clear_the_line_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(80, monkeypatch) as there:
        display = Display(12.0, quiet=True)
        display.begin("", Workload(10, 1.0, 1, 2.0, 32, peers=PEERS), 8)
        display.step(window(PEERS))
        print("50%|###", end="\r", file=there.stream, flush=True)  # of the first process
        print("rank 1 warns", file=sys.stderr)
        display.close()
    assert lines_of(there.text)[0][-1] == "rank 1 warns"
