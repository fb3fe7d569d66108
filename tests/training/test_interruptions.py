"""Interruptions of real processes: killed, stopped, restarted, resumed by other processes."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dml_accel.training import checkpoint
from tests import kills
from tests.helpers import (
    BIN,
    ROOT,
    accelerate_launch,
    environment,
    events,
    load,
    run_program,
    saved_steps,
    train,
    workers,
)
from tests.training.interrupting import NAMES

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs Linux's /proc"
)


@needs_proc
@pytest.mark.parametrize(
    ("case", "phase"),
    [
        ("one process", "writing"),
        ("2 processes, split", "evaluation"),
        ("2 processes, replicate", "steps"),
    ],
)
def test_killed_for_real_at_a_random_moment(tmp_path: Path, case: str, phase: str) -> None:
    kills.complete(case, tmp_path / "straight")
    found = kills.trial(case, phase, tmp_path / "straight", random.Random(case))
    assert kills.holds(found), found


def slow_run(folder: Path, *words: str) -> list[str]:
    """A run on two processes that is far longer than a test."""
    flags = "--cohort resnet8 wrn_16_2 --dataset digits --image-size 16 --batch-size 12 --cpu "
    flags += f"--save-every 5 --placement split --resume auto --output-dir {folder}"
    return accelerate_launch(2, *words, "train.py", *flags.split())


def started(words: list[str], folder: Path, step: int) -> subprocess.Popen[str]:
    """Start a run and wait for one of its checkpoints."""
    run = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 90
    while not any(found >= step for found in saved_steps(folder)):
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.05)
    return run


@needs_proc
def test_the_launchers_sigterm_stops_all_processes_at_one_step(tmp_path: Path) -> None:
    run = started(slow_run(tmp_path), tmp_path, 5)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=25)
    assert said.count("stopped by SIGTERM; the same command") == 1
    status = load(tmp_path / "status.json")
    assert (status["status"], status["step"]) == ("stopped", saved_steps(tmp_path)[-1])
    checkpoint.verify(checkpoint.named(tmp_path / "checkpoints")[0], NAMES)
    assert events(tmp_path)[-1]["step"] == status["step"]


@needs_proc
def test_restarts_resume_after_a_crash_and_not_after_a_stop(tmp_path: Path) -> None:
    run = started(slow_run(tmp_path, "--max_restarts", "2"), tmp_path, 5)
    os.kill(workers(run.pid)[1], signal.SIGKILL)
    until, crashed_at = time.monotonic() + 90, saved_steps(tmp_path)[-1]
    while not any(event["event"] == "resume" for event in events(tmp_path)):
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.1)
    resumed = next(event for event in events(tmp_path) if event["event"] == "resume")
    assert resumed["step"] >= crashed_at >= 5
    while saved_steps(tmp_path)[-1] <= resumed["step"]:
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.1)
    os.kill(workers(run.pid)[0], signal.SIGTERM)  # not to the launcher, which it would end
    _, said = run.communicate(timeout=60)
    assert "was stopped on request; --resume auto resumes it" in said
    assert run.returncode == 0 and load(tmp_path / "status.json")["status"] == "stopped"
    assert len([event for event in events(tmp_path) if event["event"] == "resume"]) == 1


def test_a_split_run_is_resumed_by_one_process_and_back(tmp_path: Path) -> None:
    words = "--cohort resnet8 resnet20 --dataset digits --image-size 16 --batch-size 9 --lr 0.001"
    words = [*words.split(), "--float64", "--cpu", "--save-every", "100", "--eval-every", "100"]
    words += ["--resume", "auto"]

    def resume_in_two(folder: Path, steps: int) -> None:
        flags = ["--placement", "split", "--output-dir", folder, *words, "--max-steps", steps]
        done = run_program(BIN / "torchrun", "--nproc_per_node", "2", "train.py", *flags)
        assert done.returncode == 0, done.stderr[-2000:]

    resume_in_two(tmp_path / "moved", 10)
    assert load(tmp_path / "moved/results.json")["placement"]["kind"] == "split"
    assert train(tmp_path / "moved", *words, "--max-steps", "20") == 0
    resume_in_two(tmp_path / "moved", 30)
    assert train(tmp_path / "straight", *words, "--max-steps", "30") == 0
    for name in ("resnet8-0", "resnet20-0"):
        moved, one = (
            load_file(tmp_path / folder / "checkpoints/step-00000030" / f"{name}.safetensors")
            for folder in ("moved", "straight")
        )
        for key, value in one.items():
            assert (moved[key].double() - value.double()).abs().max() < 1e-9, key
