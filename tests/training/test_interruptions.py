"""Interruptions of real processes: killed, stopped, restarted, resumed by other processes."""

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dml_accel.training import checkpoint
from tests import kills
from tests.helpers import (
    PATIENCE,
    accelerate_launch,
    events,
    forked,
    in_turn,
    launched,
    load,
    run_program,
    saved_steps,
    train,
    wait_until,
    workers,
)

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs Linux's /proc"
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that nothing interrupts, one for each case."""
    folder = tmp_path_factory.mktemp("straight")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed
    assert train(folder / "one process", *kills.words("one process")) == 0
    torch.set_num_threads(threads)
    split = {"2 processes, split": kills.words("2 processes, split")}
    done, _ = in_turn(forked(2), folder, split)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@needs_proc
# All five cases, many times: benchmarks/kills.md.
@pytest.mark.parametrize(
    ("case", "phase"), [("one process", "writing"), ("2 processes, split", "evaluation")]
)
def test_killed_for_real_at_a_random_moment(straight: Path, case: str, phase: str) -> None:
    found = kills.trial(case, phase, straight / case, random.Random(case))
    assert kills.holds(found), found


def slow_run(folder: Path, *words: str) -> list[str]:
    """A run on two processes that is far longer than a test."""
    flags = "--cohort resnet8 wrn_16_2 --dataset digits --image-size 8 --batch-size 12 --cpu "
    flags += f"--save-every 5 --placement replicate --resume auto --output-dir {folder}"
    return accelerate_launch(2, *words, "train.py", *flags.split())


@contextmanager
def started(words: list[str], folder: Path, step: int) -> Iterator[subprocess.Popen[str]]:
    """A run that has one of its checkpoints."""
    with launched(*words) as run:
        wait_until(lambda: any(found >= step for found in saved_steps(folder)), run)
        yield run


@needs_proc
def test_restarts_resume_after_a_crash_and_not_after_a_stop(tmp_path: Path) -> None:
    def resumed() -> list[int]:
        return [event["step"] for event in events(tmp_path) if event["event"] == "resume"]

    with started(slow_run(tmp_path, "--max_restarts", "2"), tmp_path, 5) as run:
        os.kill(workers(run.pid)[1], signal.SIGKILL)
        crashed_at = saved_steps(tmp_path)[-1]
        wait_until(resumed, run)
        assert resumed()[0] >= crashed_at >= 5
        wait_until(lambda: saved_steps(tmp_path)[-1] > resumed()[0], run)
        os.kill(workers(run.pid)[0], signal.SIGTERM)  # not to the launcher, which it would end
        _, said = run.communicate(timeout=PATIENCE)
    assert "was stopped on request; --resume auto resumes it" in said
    assert run.returncode == 0 and load(tmp_path / "status.json")["status"] == "stopped"
    assert len(resumed()) == 1


def test_a_stopped_split_run_is_resumed_by_one_process_and_back(tmp_path: Path) -> None:
    words = "--cohort resnet8 resnet20 --dataset digits --image-size 8 --batch-size 9 --lr 0.001"
    words = [*words.split(), "--float64", "--cpu", "--save-every", "5", "--eval-every", "100"]
    words += ["--resume", "auto", "--compile", "off"]
    words += ["--exchange-every", "7"]  # most stops are between two exchanges
    two, moved = ["train.py", "--placement", "split", *words], tmp_path / "moved"
    two += ["--output-dir", str(moved)]
    # The launcher's SIGTERM stops all processes at one step.
    with started(accelerate_launch(2, *two), moved, 5) as run:
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=PATIENCE)
    assert said.count("stopped by SIGTERM; the same command") == 1
    status, step = load(moved / "status.json"), saved_steps(moved)[-1]
    assert (status["status"], status["step"]) == ("stopped", step)
    checkpoint.verify(checkpoint.named(moved / "checkpoints")[0], ("resnet20-0", "resnet8-0"))
    assert events(moved)[-1]["step"] == step

    assert train(moved, *words, "--max-steps", str(step + 10)) == 0
    done = run_program(*forked(2, *two, "--max-steps", step + 20))
    assert done.returncode == 0, done.stderr[-2000:]
    assert load(moved / "results.json")["placement"]["kind"] == "split"
    assert train(tmp_path / "straight", *words, "--max-steps", str(step + 20)) == 0
    for name in ("resnet8-0", "resnet20-0"):
        resumed, one = (
            load_file(tmp_path / folder / f"checkpoints/step-{step + 20:08}/{name}.safetensors")
            for folder in ("moved", "straight")
        )
        for key, value in one.items():
            assert (resumed[key].double() - value.double()).abs().max() < 1e-9, key
