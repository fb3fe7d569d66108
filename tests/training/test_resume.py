"""A run that is interrupted and gone on with is the run that was not, bit for bit."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dml_accel import cli
from dml_accel.models.spec import Peer
from dml_accel.mutual import step as schedules
from dml_accel.training import checkpoint, preparing
from dml_accel.training import loop as engine
from dml_accel.training import record as recording
from dml_accel.training import train as training
from dml_accel.training.run_folder import RunFolder
from tests.conftest import assert_same_state

# 5 steps an epoch; every third step a checkpoint, every fourth an evaluation.
WORDS = (
    "--cohort wrn_16_2 resnet8 --dataset digits --image-size 16 --train-limit 45 --batch-size 8 "
    "--epochs 3 --lr 0.05 --lr-step 2 --grad-accum 2 --clip-norm 1 --val-fraction 0.02 "
    "--save-every 3 --eval-every 4 --cpu"
).split()
NAMES = ("resnet8-0", "wrn_16_2-0")


class KilledError(BaseException):
    """The end of the process, as far as the run can tell: nothing catches it."""


def train(folder: Path, *words: str) -> int:
    return cli.main(["train", *WORDS, "--output-dir", str(folder), "--resume", "auto", *words])


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(checkpoint.named(folder / "checkpoints"))]


def assert_same_run(folder: Path, straight: Path) -> None:
    """Weights, buffers, momentum, and what results.json says of them."""
    for name in NAMES:
        weights = (path / "peers" / name / "model.safetensors" for path in (folder, straight))
        assert_same_state(*map(load_file, weights))
        last = (
            path / f"checkpoints/step-00000015/{name}.safetensors" for path in (folder, straight)
        )
        assert_same_state(*map(load_file, last))
    for part in ("peers", "ensemble", "agreement", "steps"):
        assert load(folder / "results.json")[part] == load(straight / "results.json")[part]
    assert load(folder / "status.json") == {"status": "done", "reason": None, "step": 15}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder) == 0
    return folder


@contextmanager
def dying(owner: Any, name: str, call: int) -> Iterator[None]:
    """Let the process die when ``owner.name`` is called for the ``call``-th time."""
    whole, calls = getattr(owner, name), [0]

    def deadly(*words: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KilledError
        return whole(*words, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(KilledError):
            yield


def killed(folder: Path, owner: Any, name: str, call: int, *words: str) -> None:
    """Leave what a killed process leaves: of status.json, too, it had no time to write more."""

    def leave(self: RunFolder, *_: object) -> None:
        self._lock.close()
        if self._metrics:
            self._metrics.close()

    with dying(owner, name, call), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "__exit__", leave)
        train(folder, *words)


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run that was killed in its ninth step, with checkpoints of the third and sixth."""
    killed(tmp_path, engine, "train_step", 9)
    assert steps(tmp_path) == [3, 6]
    return tmp_path


# ---------------------------------------------------------------- killed anywhere


@pytest.mark.parametrize("step", [4, 6, 11, 15])
def test_killed_in_a_step(tmp_path: Path, straight: Path, step: int) -> None:
    killed(tmp_path, engine, "train_step", step)
    assert load(tmp_path / "status.json")["status"] == "running"
    assert train(tmp_path) == 0
    resumed = [event["step"] for event in events(tmp_path) if event["event"] == "resume"]
    assert resumed == [(step - 1) // 3 * 3]
    assert_same_run(tmp_path, straight)


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path: Path, straight: Path) -> None:
    killed(tmp_path, engine, "train_step", 2)
    assert train(tmp_path) == 0
    assert [event["event"] for event in events(tmp_path)].count("start") == 1
    assert_same_run(tmp_path, straight)


# The second checkpoint writes its files in calls 6 to 10: two peers of two files, state.json.
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(checkpoint, "_write", call) for call in range(6, 11)]
    + [(checkpoint, "_sync", call) for call in (3, 4)]
    + [(Path, "rename", call) for call in (2, 3, 4)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, straight: Path, owner: Any, name: str, call: int
) -> None:
    killed(tmp_path, owner, name, call)
    found = steps(tmp_path)
    for path in checkpoint.named(tmp_path / "checkpoints"):
        checkpoint.verify(path, NAMES)
    assert train(tmp_path) == 0
    resumed = [event["step"] for event in events(tmp_path) if event["event"] == "resume"]
    assert resumed == found[-1:] and found[0] >= 3
    assert_same_run(tmp_path, straight)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (engine, "evaluate", 2, 3),  # of step 4, which the checkpoint of step 3 is before
        (engine, "evaluate", 7, 15),  # the last, after the last checkpoint
        (recording, "write_peer", 1, 15),
        (recording, "write_peer", 2, 15),
        (recording, "results_markdown", 1, 15),
        (RunFolder, "write", 3, 15),  # results.json, after status.json and config.json
    ],
    ids=str,
)
def test_killed_while_evaluating_or_finishing(
    tmp_path: Path, straight: Path, owner: Any, name: str, call: int, step: int
) -> None:
    killed(tmp_path, owner, name, call)
    assert train(tmp_path) == 0
    assert [e["step"] for e in events(tmp_path) if e["event"] == "resume"] == [step]
    assert_same_run(tmp_path, straight)


def test_killed_again_and_again(tmp_path: Path, straight: Path) -> None:
    for step in (5, 2, 3, 6):  # counted from where each begins
        killed(tmp_path, engine, "train_step", step)
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


# ---------------------------------------------------------------- the records


def test_the_records_are_those_of_one_run_and_a_mark(interrupted: Path, straight: Path) -> None:
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # torn
    assert train(interrupted) == 0
    changing = {"time", "seconds"}

    def plain(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k not in changing} for e in events(folder)]

    found = plain(interrupted)
    assert {"event": "resume", "step": 6, "epoch": 1} in found
    assert [e for e in found if e["event"] != "resume"] == plain(straight)


def test_what_is_kept_is_the_newest(straight: Path, tmp_path: Path) -> None:
    assert steps(straight) == [12, 15]
    assert train(tmp_path, "--keep-checkpoints", "4", "--save-every", "1ep") == 0
    assert steps(tmp_path) == [5, 10, 15]


def test_minutes_are_an_interval_too(tmp_path: Path) -> None:
    words = (
        "--save-every",
        "0.0000001min",
        "--eval-every",
        "0.0000001min",
        "--keep-checkpoints",
        "20",
    )
    assert train(tmp_path, *words) == 0
    assert steps(tmp_path) == list(range(1, 16))
    assert len([e for e in events(tmp_path) if e["event"] == "eval"]) == 15


# ---------------------------------------------------------------- nothing is overwritten


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_is_left_untouched(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(straight)
    assert train(straight) == 0
    assert "has taken all of its 15 steps: nothing to do" in capsys.readouterr().err
    assert train(straight, "--max-steps", "9", "--eval-every", "5") == 0
    assert train(straight, "--seed", "1") == 2
    assert "was made with seed 0 and not 1" in capsys.readouterr().err
    assert content(straight) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "0.1", "--seed", "3"], "made with lr 0.05 and not 0.1, seed 0 and not 3; repeat"),
        (["--epochs", "2"], "epochs 3 and not 2"),
        (["--cohort", "resnet8*2"], "cohort ['wrn_16_2', 'resnet8'] and not ['resnet8*2']"),
        (["--mixed-precision", "bf16"], "mixed_precision no and not bf16"),
        (["--train-split", "test"], "does not apply to digits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_configuration_is_refused(
    interrupted: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    before = {name: data for name, data in content(interrupted).items() if "run.lock" not in name}
    assert train(interrupted, *words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    after = {name: data for name, data in content(interrupted).items() if "run.lock" not in name}
    assert after == before


def test_what_may_change_changes_nothing(interrupted: Path, straight: Path) -> None:
    words = ("--eval-every", "1ep", "--save-every", "2", "--timeout", "3", "--max-nonfinite", "4")
    assert train(interrupted, *words) == 0
    assert_same_run(interrupted, straight)


def test_a_run_can_be_made_longer(tmp_path: Path, straight: Path) -> None:
    assert train(tmp_path, "--max-steps", "7") == 0
    assert train(tmp_path, "--epochs", "2") == 2  # fewer epochs would be another run
    assert train(tmp_path, "--max-steps", "8") == 0
    assert load(tmp_path / "results.json")["steps"] == 8
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


def test_a_run_that_is_past_the_steps_asked_for_is_left_untouched(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(interrupted)
    assert train(interrupted, "--max-steps", "4") == 0
    assert "has gone on to step-00000006, past the 4 steps asked for" in capsys.readouterr().err
    given = interrupted / "checkpoints/step-00000006"
    assert train(tmp_path / "new", "--resume", str(given), "--max-steps", "5") == 2
    assert "has 6 steps behind it, and the flags ask for 5 in all" in capsys.readouterr().err
    assert {k: v for k, v in content(interrupted).items() if k in before} == before


def test_a_longer_run_does_not_show_the_results_of_the_shorter(tmp_path: Path) -> None:
    assert train(tmp_path, "--max-steps", "7") == 0
    killed(tmp_path, engine, "train_step", 2)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "results.md").exists()
    # What it had measured stays in the records.
    assert [e["step"] for e in events(tmp_path) if e["event"] == "eval"] == [4, 7, 8]


def test_a_run_that_goes_on_elsewhere_has_a_checkpoint_of_its_own_at_once(
    interrupted: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, given = tmp_path / "new", ("--resume", str(interrupted / "checkpoints/step-00000006"))
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, preparing, "_peer", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(new, *given) == 75
    assert steps(new) == [6]
    assert train(new) == 0
    assert_same_run(new, straight)
    # Killed before that, it is not mistaken for a run that begins.
    other = tmp_path / "other"
    killed(other, checkpoint, "finish", 1, *given)
    assert train(other) == 2
    assert "has no checkpoint of its own yet; --resume" in capsys.readouterr().err


def test_a_stop_of_the_past_is_not_taken_for_one_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, engine, "train_step", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == 75

    def broken(_: Any) -> None:
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Processes", broken)
        assert train(tmp_path) == 1
    assert load(tmp_path / "status.json") == {
        "status": "failed",
        "reason": "OSError: no network",
        "step": 5,
    }


def test_peers_that_cannot_be_written_leave_no_finished_run(
    tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "write_peer", full)
        assert train(tmp_path) == 1
    said = capsys.readouterr().err
    assert "cannot be written: I/O error: No space left" in said and "Traceback" not in said
    assert not (tmp_path / "results.json").exists()
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


def test_auto_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *WORDS, "--resume", "auto"]) == 2
    assert "--resume auto needs --output-dir" in capsys.readouterr().err


def test_a_given_checkpoint_goes_on_in_a_new_folder(
    interrupted: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, new = content(interrupted), tmp_path / "new"
    checkpoints = interrupted / "checkpoints"
    assert train(new, "--resume", str(checkpoints / "step-00000003")) == 0
    assert events(new)[0]["event"] == "resume"
    assert_same_run(new, straight)
    assert train(tmp_path / "newest", "--resume", str(interrupted)) == 0
    assert events(tmp_path / "newest")[0]["step"] == 6
    assert_same_run(tmp_path / "newest", straight)
    assert {k: v for k, v in content(interrupted).items() if k in before} == before
    # In its own folder only where nothing is lost by it.
    assert train(interrupted, "--resume", str(checkpoints / "step-00000003")) == 2
    assert "its run has gone on to step-00000006" in capsys.readouterr().err
    assert train(interrupted, "--resume", str(checkpoints / "step-00000006")) == 0
    assert_same_run(interrupted, straight)
    assert train(tmp_path / "x", "--resume", str(tmp_path / "nothing")) == 2
    assert "is no checkpoint, and there is none in" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- damage and malice


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
    assert f"warning: {bad} is damaged" in said and "step-00000006 is skipped" in said
    assert [e["step"] for e in events(interrupted) if e["event"] == "resume"] == [3]
    assert_same_run(interrupted, straight)


def test_without_a_good_checkpoint_nothing_is_started_over(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoint.named(interrupted / "checkpoints"):
        damage(path / "state.json")
    before = {name: data for name, data in content(interrupted).items() if "run.lock" not in name}
    assert train(interrupted) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    after = {name: data for name, data in content(interrupted).items() if "run.lock" not in name}
    assert after == before


def test_the_last_good_one_outlives_damaged_newer_ones(interrupted: Path) -> None:
    newer = interrupted / "checkpoints/step-00000099"
    shutil.copytree(interrupted / "checkpoints/step-00000006", newer)
    damage(newer / "state.json")
    killed(interrupted, engine, "train_step", 5)  # after the checkpoint of step 9
    assert steps(interrupted) == [6, 9, 99]


def forged(folder: Path, **changes: Any) -> None:
    """Change state.json and sign it anew, as a stranger could."""
    path = folder / "state.json"
    state = load(path) | changes
    state.pop("sha256")
    state = {name: value for name, value in state.items() if value is not None}
    sha256 = checkpoint._sha256(checkpoint._dump(state))
    path.write_bytes(checkpoint._dump(state | {"sha256": sha256}))


@pytest.mark.parametrize(
    "changes",
    [
        {"lost": None},
        {"config": [1]},
        {"config": {"lr": "x"}},
        {"config": {"unheard": 1}},
        {"world_size": "1"},
        {"placement": {"ranks": {"resnet8-0": [0], "wrn_16_2-0": [7]}}},
        {"placement": {"ranks": {"../../x": [0]}}},
        {"files": {}},
        {"files": {"/etc/passwd": "0"}},
        {"step": "3"},
    ],
    ids=str,
)
def test_a_forged_state_is_one_line(
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
def test_a_forged_optimizer_is_one_line(
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


def test_nothing_that_is_planted_runs(interrupted: Path, tmp_path: Path) -> None:
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


# ---------------------------------------------------------------- asked to stop


def on_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Any) -> None:
    whole, calls = getattr(owner, name), [0]

    def acting(*words: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            act()
        return whole(*words, **named)

    monkeypatch.setattr(owner, name, acting)


PHASES = {
    "building": (preparing, "_peer", 1, 0),
    "the first step": (engine, "train_step", 1, 1),
    "a step": (engine, "train_step", 8, 8),
    "an evaluation": (engine, "batch_sums", 2, 4),
    "writing": (checkpoint, "write_peer", 3, 6),
    "the last evaluation": (engine, "batch_sums", 11, 15),
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
    remedy = f"the same command with --output-dir {tmp_path} --resume auto goes on"
    assert said.splitlines()[-1] == f"stopped by {number.name}; {remedy}"
    assert "Traceback" not in said
    reason = f"stopped by {number.name}"
    assert load(tmp_path / "status.json") == {"status": "stopped", "reason": reason, "step": step}
    assert steps(tmp_path)[-1] == step
    assert train(tmp_path) == 0
    assert [e["step"] for e in events(tmp_path) if e["event"] == "resume"] == [step]
    assert_same_run(tmp_path, straight)


def test_a_signal_when_all_is_measured_lets_the_run_end(tmp_path: Path, straight: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, recording, "write_peer", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from dml_accel import cli\n"
        "from dml_accel.training import loop as engine\n"
        "whole = engine.train_step\n"
        "def slow(*words, **named):\n"
        "    if words[0].number == 4:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "    return whole(*words, **named)\n"
        "engine.train_step = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *WORDS, "--output-dir", tmp_path / "run"],
        timeout=50,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert steps(tmp_path / "run") == [3]


def test_a_requested_stop_is_not_undone_by_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, engine, "train_step", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == 75
    before = content(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(tmp_path) == 0
    assert "was stopped on request" in capsys.readouterr().err
    assert content(tmp_path) == before


# ---------------------------------------------------------------- peers that are lost


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int, by: float = torch.nan) -> None:
    """Let resnet8-0 see wrong images in steps ``first`` to ``last``, counted from 1."""
    whole = schedules.Step.forward

    def spoiled(self: schedules.Step, peer: Peer, *rest: Any) -> torch.Tensor:
        logits = whole(self, peer, *rest)
        spoils = peer.name == "resnet8-0" and first <= self.number + 1 <= last
        return logits * by if spoils else logits

    monkeypatch.setattr(schedules.Step, "forward", spoiled)


def test_no_checkpoint_after_the_first_of_the_steps_that_stay_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 5, 15)
    assert train(tmp_path, "--max-nonfinite", "6") == 1
    assert steps(tmp_path) == [3]
    assert load(tmp_path / "status.json")["status"] == "failed"
    assert "the loss of resnet8-0 was not finite" in capsys.readouterr().err
    assert "6 steps in a row by step 10" in load(tmp_path / "status.json")["reason"]
    # Gone on with, it ends at the same step: the count of lost steps is of those in a row.
    assert train(tmp_path, "--max-nonfinite", "6") == 1
    assert "6 steps in a row by step 10" in load(tmp_path / "status.json")["reason"]


def test_the_count_of_lost_steps_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 5, 15)
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, engine, "train_step", 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path, "--max-nonfinite", "6") == 75
    assert load(tmp_path / "checkpoints/step-00000008/state.json")["lost"] == {
        "resnet8-0": 4,
        "wrn_16_2-0": 0,
    }
    assert train(tmp_path, "--max-nonfinite", "6") == 1
    assert "6 steps in a row by step 10" in load(tmp_path / "status.json")["reason"]


def test_a_checkpoint_that_falls_due_in_lost_steps_waits_for_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 7)
    assert train(tmp_path, "--keep-checkpoints", "9") == 0
    assert steps(tmp_path) == [3, 8, 9, 12, 15]


def test_a_finite_loss_out_of_all_bounds_is_lost_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 5, 15, by=1e6)
    assert train(tmp_path, "--max-nonfinite", "3") == 1
    # 100 times the ln 10 of guessing among 10 classes.
    assert "or its cross-entropy above 230, for 3 steps" in capsys.readouterr().err
    assert steps(tmp_path) == [3]


# ---------------------------------------------------------------- disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB; what a run here keeps is about 20."""
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

        on_call(patch, engine, "train_step", 5, fill)
        assert train(run) == 1
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written: " in said
    assert "No space left on device" in said and "step-00000003 is as it was" in said
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
    assert "Read-only file system" in said and "step-00000003 is as it was" in said
    mount("rw")
    checkpoint.verify(run / "checkpoints/step-00000003", NAMES)
    assert train(run) == 0
    assert_same_run(run, straight)


def test_resuming_refuses_a_run_that_is_going_on(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(interrupted, "", goes_on=True):
        assert train(interrupted) == 2
        assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
