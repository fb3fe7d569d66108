"""A command without its display: training goes on, and what is a result is not lost quietly."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from dml_accel import cli
from dml_accel.cli import commands
from dml_accel.training import loop
from tests.core.test_streams import full, left
from tests.helpers import DIGITS, load, train


def test_a_run_survives_its_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    terminal = open(slave, "w")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    hung_up = []
    signal_before = signal.signal(signal.SIGHUP, lambda *_: hung_up.append(True))
    step = loop.train_step

    def train_step(*arguments: object) -> object:
        if not hung_up:
            hung_up.append(False)
            os.close(master)
            os.kill(os.getpid(), signal.SIGHUP)
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", train_step)
    try:
        code = train(tmp_path / "run", *DIGITS, "--cohort", "resnet8", "--max-steps", "2")
    finally:
        signal.signal(signal.SIGHUP, signal_before)
    assert (code, hung_up) == (0, [False])
    assert load(tmp_path / "run" / "status.json")["status"] == "done"
    terminal.close()  # what it still held was dropped, or this would raise


@pytest.mark.parametrize(
    ("command", "stream_of", "code", "said"),
    [
        ("predict", full, 1, "error: [Errno 28] No space left on device\n"),
        ("predict", left, 1, ""),
        ("compare", full, 0, ""),
        ("report", left, 0, ""),
    ],
)
def test_results_that_are_printed_are_not_lost_quietly(
    command: str,
    stream_of: Callable[[], TextIO],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = stream_of()
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", errors)

    def run(values: dict[str, object]) -> int:
        print("a line")
        return 0

    words = {"predict": ["run", "image"], "report": ["run"]}
    monkeypatch.setitem(commands._COMMANDS, command, run)
    assert cli.main([command, *words.get(command, ())]) == code
    assert errors.getvalue() == said
    stream.close()


def test_the_help_may_be_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = left()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0
    stream.close()


def test_a_home_is_found_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    words = ["train", "--output-dir=~/runs", "--frozen-peers", "~/a", "b", "--dataset", "~/c"]
    values = commands._parsed(words)
    assert values["output_dir"] == "/me/runs"
    assert values["frozen_peers"] == ["/me/a", "b"]


def test_a_home_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "~no_such_user/runs"]) == 2
    error = capsys.readouterr().err
    assert (
        error == "error: ~no_such_user/runs: there is no such home directory; write the path out\n"
    )
