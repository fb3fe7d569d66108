"""Runs whose images are read when they are needed: bad images, lost workers, kills, other feeds."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from dml_accel.data import survey, workers
from dml_accel.training import loop
from tests.data.test_loader import damage, photographs
from tests.helpers import (
    PATIENCE,
    accelerate_launch,
    assert_same_state,
    events,
    launched,
    load,
    saved_steps,
    status_of,
    train,
    wait_until,
)

WORDS = "--cohort resnet8*2 --image-size 16 --batch-size 4 --max-steps 6 --save-every 2 --cpu"
WORDS += " --eval-every 6 --lr 0.05 --augment random-resized-crop flip --mixup 0.5 --threads 1"
ENDLESS = "--max-steps 10000 --epochs 5000 --eval-every 5000ep --compile off".split()
LOADER = [*WORDS.split(), "--feed", "loader", "--workers", "1", "--resume", "auto"]
BAD = "train/a/02.jpg", "train/b/07.jpg"


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    return ["--dataset", str(photographs(tmp_path / "photos"))]


def weights(folder: Path) -> dict[str, object]:
    return {p.parent.name: load_file(p) for p in (folder / "peers").glob("*/model.safetensors")}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert len(first) == 2 and first.keys() == second.keys()
    for name in first:
        assert_same_state(first[name], second[name])  # type: ignore[arg-type]
    assert load(one / "results.json")["ensemble"] == load(other / "results.json")["ensemble"]


@pytest.fixture
def breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Break images of the set once a run has measured it and is about to train."""
    whole = loop.fit

    def fit(*words: object, **named: object) -> Iterator[object]:
        for name in BAD:
            path = tmp_path / "photos" / name
            os.truncate(path, 0)
            path.write_bytes(bytes(200))
        yield from whole(*words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "fit", fit)
    yield


def test_feeds_give_the_same_run_and_may_change_when_it_resumes(
    tmp_path: Path, photos: list[str]
) -> None:
    recipe = [*photos, "--update", "official", "--grad-accum", "2", "--augment", "crop-flip"]
    assert train(tmp_path / "loader", *LOADER, *recipe) == 0
    words = [*WORDS.split(), *recipe, "--resume", "auto"]
    memory = [*words, "--feed", "memory"]
    assert train(tmp_path / "memory", *memory, "--max-steps", "3") == 0
    assert train(tmp_path / "memory", *words, "--feed", "loader", "--workers", "0") == 0
    assert_same_run(tmp_path / "loader", tmp_path / "memory")
    steps = [one for one in events(tmp_path / "loader") if one["event"] == "step"]
    assert all(0 <= one["waiting"] <= 1 for one in steps)
    assert train(tmp_path / "all", *memory) == 0
    steps = [one for one in events(tmp_path / "all") if one["event"] == "step"]
    assert steps and not any("waiting" in one for one in steps)


@pytest.mark.usefixtures("breaks")
def test_images_that_turn_bad_stop_the_run_which_goes_on_without_them(
    tmp_path: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, *LOADER, *photos) == 2
    said = capsys.readouterr().err
    error = said.splitlines()[-1]
    assert "cannot be read" in error and str(run / "bad-images.txt") in error
    (step,) = saved_steps(run)[-1:]
    fix = f"resume from the checkpoint of step {step} with --resume auto --bad-images skip"
    assert fix in error and "Traceback" not in said
    status = status_of(run)
    assert status["status"] == "failed" and fix in status["reason"] and status["step"] == step
    listed = (run / "bad-images.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} <= {
        str(tmp_path / "photos" / name) for name in BAD
    }
    assert listed and all(len(line.split("\t")) == 3 for line in listed)


def test_a_refused_evaluation_keeps_the_steps_and_skipping_goes_on_bit_for_bit(
    tmp_path: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "photos/test/b/01.jpg"
    damage(tmp_path / "photos", "test/b/01.jpg")
    run = tmp_path / "run"
    assert train(run, *LOADER, *photos, "--save-every", "10") == 2
    assert saved_steps(run) == [6]
    assert "checkpoint of step 6" in capsys.readouterr().err
    assert train(run, *LOADER, *photos) == 2  # it is met again, and listed once
    assert (run / "bad-images.txt").read_text().count(str(bad)) == 1
    assert train(run, *LOADER, *photos, "--bad-images", "skip") == 0
    said = capsys.readouterr().err
    assert "1 image could not be read: in training the next of its class" in said
    for feed in ("loader", "memory"):
        straight = tmp_path / feed
        words = [*LOADER, *photos, "--bad-images", "skip", "--feed", feed]
        assert train(straight, *words) == 0
        assert "1 image could not be read" in capsys.readouterr().err
        assert (straight / "bad-images.txt").read_text().startswith(f"{bad}\t")
        assert_same_run(straight, run)
    assert load(run / "results.json")["ensemble"]["n"] == 5
    # A file in its place is another image, and it is said why.
    bad.write_bytes((tmp_path / "photos/test/b/02.jpg").read_bytes())
    assert train(run, *LOADER, *photos, "--max-steps", "8") == 2
    assert "a run resumes on the damaged files" in capsys.readouterr().err


def test_a_run_that_met_bad_images_goes_on_as_one_that_skipped_them_from_the_start(
    tmp_path: Path,
    photos: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of a large set only some images are measured; training meets what is damaged among others.
    monkeypatch.setattr(survey, "MEASURED", 5)
    monkeypatch.setattr(survey, "SMALL_IMAGES", 8)
    root, run = tmp_path / "photos", tmp_path / "run"
    measured = survey.measured_rows(20, 16)
    assert measured is not None
    names = sorted(str(path.relative_to(root)) for path in root.glob("train/*/*"))
    bad = [name for row, name in enumerate(names) if row not in measured][2:12:4]
    damage(root, *bad)
    assert train(run, *LOADER, *photos, "--save-every", "1000") == 2
    (step,) = saved_steps(run)  # the last before the first of them
    assert 0 < step < 5 and f"checkpoint of step {step}" in capsys.readouterr().err
    assert train(run, *LOADER, *photos, "--bad-images", "skip") == 0
    listed = (run / "bad-images.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == {str(root / name) for name in bad}
    for feed in ("loader", "memory"):
        words = [*LOADER, *photos, "--bad-images", "skip", "--feed", feed]
        assert train(tmp_path / feed, *words) == 0
        assert_same_run(tmp_path / feed, run)


def test_a_lost_worker_ends_the_run_in_one_line(
    tmp_path: Path,
    photos: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, calls = loop.train_step, []

    def kill(*words: object, **named: object) -> object:
        calls.append(0)
        if len(calls) == 4:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        return whole(*words, **named)  # type: ignore[arg-type]

    words = [*LOADER, *photos]
    with monkeypatch.context() as patch:
        # How often torch looks for workers that are gone, in seconds.
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        patch.setattr(loop, "train_step", kill)
        assert train(tmp_path / "run", *words, "--max-steps", "30") == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: a process that decodes images was killed")
    assert "Traceback" not in said and status_of(tmp_path / "run")["status"] == "failed"
    assert issubclass(workers.WorkerLostError, RuntimeError)
    words += ["--workers", "0", "--max-steps", str(saved_steps(tmp_path / "run")[-1] + 2)]
    for name in ("run", "straight"):
        assert train(tmp_path / name, *words) == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_killed_run_leaves_no_workers_and_no_lock(tmp_path: Path, photos: list[str]) -> None:
    run, words = tmp_path / "run", [*LOADER, *photos]
    command = [sys.executable, "train.py", *words, "--workers", "2", *ENDLESS]
    command += ["--output-dir", str(run)]
    with launched(*command) as process:
        wait_until(lambda: (run / "checkpoints").is_dir() and saved_steps(run), process)
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        # Dead, even where nobody waits for orphans.
        assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)
    words += [*ENDLESS, "--max-steps", str(saved_steps(run)[-1] + 2), "--workers", "0"]
    assert train(run, *words) == 0  # it takes the lock at once
    assert train(tmp_path / "straight", *words) == 0
    assert_same_run(run, tmp_path / "straight")


def test_several_processes_stop_for_an_image_that_one_of_them_meets(
    tmp_path: Path, photos: list[str]
) -> None:
    run = tmp_path / "run"
    # Mixing would give an image to both processes.
    words = [*LOADER, *photos, *ENDLESS, "--mixup", "0", "--save-every", "1000"]
    command = [*accelerate_launch(2, "train.py", *words), "--output-dir", str(run)]
    metrics = run / "metrics.jsonl"
    with launched(*command) as process:
        wait_until(lambda: metrics.exists() and '"epoch": 1' in metrics.read_text(), process)
        bad = tmp_path / "photos" / BAD[0]
        with bad.open("r+b") as file:  # of the same size
            file.write(bytes(bad.stat().st_size))
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "exitcode  : 2" in said
    (step,) = saved_steps(run)
    assert step >= 5 and status_of(run)["step"] == step
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"{bad} cannot be read" in error and f"checkpoint of step {step}" in error
    assert (run / "bad-images.txt").read_text().startswith(f"{bad}\t")
    words += ["--max-steps", str(step + 5)]  # an epoch has five steps
    assert train(run, *words, "--bad-images", "skip") == 0
    assert load(run / "results.json")["steps"] == step + 5
