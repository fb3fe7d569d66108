"""A run that is asked to stop, and peers that lose steps: which checkpoint is left, and why."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dml_accel.mutual.peer import Peer
from dml_accel.mutual.step import Step
from dml_accel.training import checkpoint, loop, record, setup
from tests.helpers import events, load, run_program, saved_steps, status_of
from tests.training.interrupting import WORDS, assert_same_run, content, on_call, train

# ---------------------------------------------------------------- asked to stop


PHASES = {
    "building": (setup, "make_cohort", 1, 0),
    "the first step": (loop, "train_step", 1, 1),
    "a step": (loop, "train_step", 8, 8),
    "an evaluation": (loop, "batch_sums", 2, 4),
    "writing": (checkpoint, "write_peer", 3, 6),
    "the last evaluation": (loop, "batch_sums", 11, 15),
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, signal.SIGTERM) for phase in PHASES),
        ("a step", signal.SIGINT),
        ("a step", signal.SIGUSR1),
    ],
)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    tmp_path: Path,
    straight: Path,
    capsys: pytest.CaptureFixture[str],
    phase: str,
    number: signal.Signals,
) -> None:
    owner, name, call, step = PHASES[phase]
    handlers = {one: signal.getsignal(one) for one in signal.Signals if one.name != "SIGKILL"}
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, owner, name, call, lambda: os.kill(os.getpid(), number))
        assert train(tmp_path) == 75
    assert handlers == {one: signal.getsignal(one) for one in handlers}
    said = capsys.readouterr().err
    remedy = f"the same command with --output-dir {tmp_path} --resume auto resumes it"
    assert said.splitlines()[-1] == f"stopped by {number.name}; {remedy}"
    assert "Traceback" not in said
    reason = f"stopped by {number.name}"
    assert status_of(tmp_path) == {"status": "stopped", "reason": reason, "step": step}
    assert saved_steps(tmp_path)[-1] == step
    assert train(tmp_path) == 0
    assert [e["step"] for e in events(tmp_path) if e["event"] == "resume"] == [step]
    assert_same_run(tmp_path, straight)


def test_a_signal_after_the_last_evaluation_lets_the_run_end(
    tmp_path: Path, straight: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, record, "write_peer", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from dml_accel import cli\n"
        "from dml_accel.training import loop\n"
        "whole = loop.train_step\n"
        "def slow(*words, **named):\n"
        "    if words[1] == 4:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(900)\n"
        "    return whole(*words, **named)\n"
        "loop.train_step = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", script, "train", *WORDS, "--output-dir", tmp_path / "run"]
    done = run_program(*words)
    assert done.returncode == 128 + signal.SIGINT
    assert saved_steps(tmp_path / "run") == [3]


def test_a_requested_stop_is_not_undone_by_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, loop, "train_step", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == 75
    before = content(tmp_path)
    for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):  # of one process, started again
        monkeypatch.setenv(name, "1")
    assert train(tmp_path) == 0
    assert "was stopped on request" in capsys.readouterr().err
    assert content(tmp_path) == before


# ---------------------------------------------------------------- peers that are lost


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int, by: float = torch.nan) -> None:
    """Let resnet8-0 see wrong images in steps ``first`` to ``last``, counted from 1."""
    whole = Step.forward

    def spoiled(self: Step, peer: Peer, *rest: Any) -> torch.Tensor:
        logits = whole(self, peer, *rest)
        spoils = peer.name == "resnet8-0" and first <= self.number + 1 <= last
        return logits * by if spoils else logits

    monkeypatch.setattr(Step, "forward", spoiled)


def test_no_checkpoint_is_written_while_steps_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 5, 15)
    assert train(tmp_path, "--max-nonfinite", "6") == 1
    assert saved_steps(tmp_path) == [3]
    assert load(tmp_path / "status.json")["status"] == "failed"
    assert "the loss of resnet8-0 was not finite" in capsys.readouterr().err
    assert "6 steps in a row by step 10" in load(tmp_path / "status.json")["reason"]
    # Resumed, it ends at the same step: the count of lost steps is of those in a row.
    assert train(tmp_path, "--max-nonfinite", "6") == 1
    assert "6 steps in a row by step 10" in load(tmp_path / "status.json")["reason"]


def test_the_count_of_lost_steps_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 5, 15)
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, loop, "train_step", 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path, "--max-nonfinite", "6") == 75
    assert load(tmp_path / "checkpoints/step-00000008/state.json")["lost"] == {
        "resnet8-0": 4,
        "test_efficientnet-0": 0,
    }
    assert train(tmp_path, "--max-nonfinite", "6") == 1
    assert "6 steps in a row by step 10" in load(tmp_path / "status.json")["reason"]


def test_a_checkpoint_waits_for_the_end_of_lost_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 7)
    assert train(tmp_path, "--keep-checkpoints", "9") == 0
    assert saved_steps(tmp_path) == [3, 8, 9, 12, 15]


def test_a_finite_loss_out_of_bounds_is_lost_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 5, 15, by=1e6)
    assert train(tmp_path, "--max-nonfinite", "3") == 1
    # 100 times the ln 10 of guessing among 10 classes.
    assert "or its cross-entropy above 230, for 3 steps" in capsys.readouterr().err
    assert saved_steps(tmp_path) == [3]
