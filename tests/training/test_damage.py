"""Damaged and forged checkpoints, and disks that fail: a good checkpoint is always left."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dml_accel.training import checkpoint, loop
from tests.helpers import events, load, saved_steps
from tests.training.interrupting import (
    NAMES,
    assert_same_run,
    content,
    forged,
    killed,
    on_call,
    train,
)

# ---------------------------------------------------------------- damage and forgery


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    interrupted: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = interrupted / "checkpoints/step-00000006/resnet8-0.safetensors"
    damage(bad)
    assert train(interrupted) == 0
    said = capsys.readouterr().err
    assert f"warning: {bad} is damaged" in said and "skipping step-00000006" in said
    assert [e["step"] for e in events(interrupted) if e["event"] == "resume"] == [3]
    assert_same_run(interrupted, straight)


def test_without_a_good_checkpoint_the_run_does_not_start_again(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoint.named(interrupted / "checkpoints"):
        damage(path / "state.json")
    before = {name: data for name, data in content(interrupted).items() if "run.lock" not in name}
    assert train(interrupted) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    after = {name: data for name, data in content(interrupted).items() if "run.lock" not in name}
    assert after == before


def test_the_last_good_checkpoint_is_kept_beside_damaged_newer_ones(interrupted: Path) -> None:
    newer = interrupted / "checkpoints/step-00000099"
    shutil.copytree(interrupted / "checkpoints/step-00000006", newer)
    damage(newer / "state.json")
    killed(interrupted, loop, "train_step", 5)  # after the checkpoint of step 9
    assert saved_steps(interrupted) == [6, 9, 99]


@pytest.mark.parametrize(
    "changes",
    [
        {"lost": None},
        {"config": [1]},
        {"config": {"lr": "x"}},
        {"config": {"unheard": 1}},
        {"world_size": "1"},
        {"placement": {"ranks": {"resnet8-0": [0], "test_efficientnet-0": [7]}}},
        {"placement": {"ranks": {"../../x": [0]}}},
        {"files": {}},
        {"files": {"/etc/passwd": "0"}},
        {"step": "3"},
    ],
    ids=str,
)
def test_a_forged_state_is_refused_in_one_line(
    interrupted: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    folder = interrupted / "checkpoints/step-00000006"
    forged(folder, **changes)
    assert train(interrupted / "new", "--resume", str(folder)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "step-00000006" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"x": 1}},
        {"optimizer": {"999999.step": 1}},
        {"optimizer": 3},
        {"groups": []},
        {"groups": [{"params": [0]}]},
        {"scaler": {"scale": 1.0}},
    ],
    ids=str,
)
def test_a_forged_optimizer_is_refused_in_one_line(
    interrupted: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    folder = interrupted / "checkpoints/step-00000006"
    path = folder / "resnet8-0.json"
    path.write_bytes(checkpoint._dump(load(path) | changes))
    files = load(folder / "state.json")["files"]
    forged(folder, files=files | {path.name: checkpoint._sha256(path.read_bytes())})
    assert train(interrupted / "new", "--resume", str(folder)) == 2
    said = capsys.readouterr().err
    assert "resnet8-0." in said and "Traceback" not in said


class Bomb:
    """Pickled, it leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.system, (f"touch {self.mark}",))


def test_planted_pickles_are_never_executed(interrupted: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb works"
    mark.unlink()
    names = ["model.safetensors", "pytorch_model.bin", "model.bin", "optimizer.bin", "optimizer.pt"]
    names += ["scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "training_args.bin"]
    names += ["random_states_0.pkl", "custom_checkpoint_0.pkl", "config.json", "status.json"]
    names += ["results.json", "metrics.jsonl", "state.json", "README.md"]
    names += [f"{name}.{kind}" for name in NAMES for kind in ("json", "safetensors", "pkl", "pt")]
    good, bad = (interrupted / "checkpoints" / f"step-{step:08d}" for step in (3, 6))
    folders = [bad, interrupted / "peers/resnet8-0", interrupted]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_bytes(bomb)
    for name in set(names) - {path.name for path in good.iterdir()}:
        (good / name).write_bytes(bomb)
    (interrupted / "results.json").unlink()  # it says that the run is done
    assert train(interrupted) == 0
    assert [e["step"] for e in events(interrupted) if e["event"] == "resume"] == [3]
    assert train(interrupted / "new", "--resume", str(bad)) in (0, 2)
    assert not mark.exists()


# ---------------------------------------------------------------- disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB; a run needs about 20."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(
    small_disk: Path, straight: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = small_disk / "run"
    with pytest.MonkeyPatch.context() as patch:

        def fill() -> None:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(max(0, free - 2**20)))

        on_call(patch, loop, "train_step", 5, fill)
        assert train(run) == 1
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written: " in said
    assert "No space left on device" in said and "step-00000003 is intact" in said
    assert "Traceback" not in said
    assert not list((run / "checkpoints").glob(".*"))
    checkpoint.verify(run / "checkpoints/step-00000003", NAMES)
    (small_disk / "filler").unlink()
    shutil.move(run, tmp_path / "run")
    assert train(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", straight)


def test_a_disk_that_becomes_read_only(
    small_disk: Path, straight: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = small_disk / "run"

    def mount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    with pytest.MonkeyPatch.context() as patch:
        # A file that is open for writing keeps a file system from becoming read-only.
        def shut() -> None:
            for descriptor in Path("/proc/self/fd").iterdir():
                try:
                    target = descriptor.readlink()
                except OSError:
                    continue
                if small_disk in target.parents:
                    null = os.open(os.devnull, os.O_RDWR)
                    os.dup2(null, int(descriptor.name))
                    os.close(null)
            mount("ro")

        on_call(patch, checkpoint, "begin", 2, shut)
        assert train(run) == 1
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written: " in said
    assert "Read-only file system" in said and "step-00000003 is intact" in said
    mount("rw")
    checkpoint.verify(run / "checkpoints/step-00000003", NAMES)
    assert train(run) == 0
    assert_same_run(run, straight)
