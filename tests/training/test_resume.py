"""A run that is interrupted and resumed equals one that was not, bit for bit."""

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from dml_accel import cli
from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.data.sources import Source
from dml_accel.distributed import rules
from dml_accel.training import checkpoint, loop, record, resume, setup
from dml_accel.training import train as training
from dml_accel.training.run_folder import RunFolder
from tests.helpers import events, load, saved_steps, status_of, tiny_config
from tests.training.interrupting import (
    NAMES,
    WORDS,
    assert_same_run,
    content,
    forged,
    killed,
    on_call,
    train,
)

# ---------------------------------------------------------------- killed anywhere


@pytest.mark.parametrize("step", [4, 6, 11, 15])
def test_killed_in_a_step(tmp_path: Path, straight: Path, step: int) -> None:
    killed(tmp_path, loop, "train_step", step)
    assert load(tmp_path / "status.json")["status"] == "running"
    assert train(tmp_path) == 0
    resumed = [event["step"] for event in events(tmp_path) if event["event"] == "resume"]
    assert resumed == [(step - 1) // 3 * 3]
    assert_same_run(tmp_path, straight)


def test_a_run_of_earlier_defaults_goes_on_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was eager and contiguous, in one process, and its checkpoint does not say so.
    explicit = ["--compile=off", "--memory-format=contiguous", "--processes=1"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert train(whole, *explicit) == 0
    assert train(cut, *explicit, "--max-steps", "6") == 0
    (last,) = [path for path in (cut / "checkpoints").iterdir() if path.name.endswith("6")]
    was = load(last / "state.json")["config"] | {"memory_format": None}
    del was["processes"]
    forged(last, config=was, memory_format=None, processes=None)
    # No rule is asked, whatever it would say.
    monkeypatch.setattr(rules, "seconds_saved", lambda *_: 1 / 0)
    monkeypatch.setattr(setup, "processes_to_start", lambda *_: 1 / 0)
    monkeypatch.setattr(setup, "can_repeat", lambda _: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert train(cut) == 0
    assert_same_run(cut, whole)
    found = load(cut / "config.json")
    assert found["resolved"]["memory_format"] == "contiguous"
    assert found["compiled"] == [] and found["resolved"]["world_size"] == 1


def test_killed_before_the_first_checkpoint_starts_again(tmp_path: Path, straight: Path) -> None:
    killed(tmp_path, loop, "train_step", 2)
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
    found = saved_steps(tmp_path)
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
        (loop, "evaluate", 2, 3),  # of step 4, which the checkpoint of step 3 is before
        (loop, "evaluate", 7, 15),  # the last, after the last checkpoint
        (record, "write_peer", 1, 15),
        (record, "write_peer", 2, 15),
        (record, "results_markdown", 1, 15),
        (RunFolder, "write", 2, 15),  # results.json, after config.json
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
        killed(tmp_path, loop, "train_step", step)
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


# ---------------------------------------------------------------- the records


def test_the_records_equal_those_of_an_uninterrupted_run(interrupted: Path, straight: Path) -> None:
    with open(interrupted / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # torn
    assert train(interrupted) == 0
    changing = {"time", "seconds"}

    def plain(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in e.items() if k not in changing} for e in events(folder)]

    found = plain(interrupted)
    assert {"event": "resume", "step": 6, "epoch": 2} in found
    assert [e for e in found if e["event"] != "resume"] == plain(straight)


def test_records_count_epochs_as_the_screen_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--max-steps", "8") == 0
    shown = dict(re.findall(r"step (\d+)/8 epoch (\d+)/3", capsys.readouterr().err))
    found = events(tmp_path)
    recorded = {str(e["step"]): str(e["epoch"]) for e in found if e["event"] == "eval"}
    assert recorded == {step: shown[step] for step in recorded} == {"4": "1", "8": "2"}
    assert all(e["epoch"] == -(-e["step"] // 5) for e in found)  # 0 before the first step


def test_the_newest_checkpoints_are_kept(straight: Path, tmp_path: Path) -> None:
    assert saved_steps(straight) == [12, 15]
    assert train(tmp_path, "--keep-checkpoints", "4", "--save-every", "1ep") == 0
    assert saved_steps(tmp_path) == [5, 10, 15]


def test_intervals_in_minutes(tmp_path: Path) -> None:
    words = (
        "--save-every",
        "0.0000001min",
        "--eval-every",
        "0.0000001min",
        "--keep-checkpoints",
        "20",
    )
    assert train(tmp_path, *words) == 0
    assert saved_steps(tmp_path) == list(range(1, 16))
    assert len([e for e in events(tmp_path) if e["event"] == "eval"]) == 15


# ---------------------------------------------------------------- nothing is overwritten


def test_a_finished_run_is_left_untouched(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(straight)
    assert train(straight) == 0
    assert "has taken all of its 15 steps: nothing to do" in capsys.readouterr().err
    assert train(straight, "--max-steps", "9", "--eval-every", "5") == 0
    assert train(straight, "--seed", "1") == 2
    assert "was started with --seed 0, but this command says --seed 1" in capsys.readouterr().err
    assert content(straight) == before


@pytest.mark.parametrize("results", ["{}", '{"steps": "x"}', '{"steps": null}', '{"steps": true}'])
def test_results_without_steps_are_refused(tmp_path: Path, digits: Source, results: str) -> None:
    (tmp_path / "results.json").write_text(results)
    config = tiny_config(output_dir=str(tmp_path), resume="auto")
    with pytest.raises(UsageError, match="results.json does not hold the results .*: remove it"):
        resume.nothing_to_do(config, digits, tmp_path, 15)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--lr", "0.1", "--seed", "3"],
            "was started with --seed 0, --lr 0.05, but this command says --seed 3, --lr 0.1: "
            "use the same flags or a new --output-dir",
        ),
        (["--epochs", "2"], "--epochs 3, but this command says --epochs 2:"),
        (
            ["--cohort", "resnet8*2"],
            "--cohort timm:test_efficientnet resnet8, but this command says --cohort resnet8*2:",
        ),
        (
            ["--mixed-precision", "bf16"],
            "--mixed-precision no, but this command says --mixed-precision bf16:",
        ),
        (["--train-split", "test"], "--train-split has no effect with --dataset digits"),
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


def test_flags_that_may_change_do_not_change_the_result(interrupted: Path, straight: Path) -> None:
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


def test_a_run_says_which_gpu_it_used_and_warns_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on(gpu: str) -> None:
        found = {"gpu": gpu, "driver": "1"} if gpu else {}
        for module in (record, resume):
            monkeypatch.setattr(module, "device_versions", lambda _: found)

    on("A100")
    assert train(tmp_path, "--max-steps", "1") == 0
    for file in ("config.json", "results.json", "checkpoints/step-00000001/state.json"):
        assert load(tmp_path / file)["versions"]["gpu"] == "A100", file
    assert "gpu A100, driver 1" in (tmp_path / "results.md").read_text()
    capsys.readouterr()
    assert train(tmp_path, "--max-steps", "2") == 0
    assert "warning" not in capsys.readouterr().err
    on("H100")
    assert train(tmp_path, "--max-steps", "3") == 0
    said = capsys.readouterr().err
    assert "step-00000002 was written with gpu A100, now H100: results may differ" in said
    on("")
    assert train(tmp_path, "--max-steps", "4") == 0
    assert "was written with driver 1, now none; gpu H100, now none:" in capsys.readouterr().err


def test_a_run_beyond_the_steps_asked_for_is_left_untouched(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(interrupted)
    assert train(interrupted, "--max-steps", "4") == 0
    assert "has reached step-00000006, beyond the 4 steps asked for" in capsys.readouterr().err
    given = interrupted / "checkpoints/step-00000006"
    assert train(tmp_path / "new", "--resume", str(given), "--max-steps", "5") == 2
    assert "has already taken 6 steps, but the flags ask for 5 in all" in capsys.readouterr().err
    assert {k: v for k, v in content(interrupted).items() if k in before} == before


def test_results_of_a_shorter_run_are_removed(tmp_path: Path) -> None:
    assert train(tmp_path, "--max-steps", "7") == 0
    killed(tmp_path, loop, "train_step", 2)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "results.md").exists()
    # What it had measured stays in the records.
    assert [e["step"] for e in events(tmp_path) if e["event"] == "eval"] == [4, 7, 8]


def test_a_run_resumed_in_a_new_folder_first_writes_its_own_checkpoint(
    interrupted: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, given = tmp_path / "new", ("--resume", str(interrupted / "checkpoints/step-00000006"))
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, setup, "make_cohort", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(new, *given) == 75
    assert saved_steps(new) == [6]
    assert train(new) == 0
    assert_same_run(new, straight)
    # Killed before that, it is not mistaken for a new run.
    other = tmp_path / "other"
    killed(other, checkpoint, "finish", 1, *given)
    assert train(other) == 2
    assert "has no checkpoint of its own yet; use --resume" in capsys.readouterr().err


def test_an_earlier_stop_does_not_hide_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, loop, "train_step", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path) == 75

    def broken(*_: Any) -> None:
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Processes", broken)
        assert train(tmp_path) == 1
    assert status_of(tmp_path) == {
        "status": "failed",
        "reason": "OSError: no network",
        "step": 5,
    }


def test_a_run_whose_peers_cannot_be_written_is_not_done(
    tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "write_peer", full)
        assert train(tmp_path) == 1
    said = capsys.readouterr().err
    assert "cannot be written: I/O error: No space left" in said and "Traceback" not in said
    assert not (tmp_path / "results.json").exists()
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize(
    ("of_rank_0", "said"),
    [("a.json is damaged", "a.json is damaged"),
     ("", "b.json is damaged; all machines must share the folder")],
)  # fmt: skip
def test_only_what_rank_0_can_load_is_said_to_be_another_folder(
    monkeypatch: pytest.MonkeyPatch, of_rank_0: str, said: str
) -> None:
    def damaged(*_: Any) -> None:
        raise UnreadableError("b.json is damaged")

    monkeypatch.setattr(checkpoint, "load_peers", damaged)
    rank_1: Any = SimpleNamespace(
        broadcast_text=lambda _: of_rank_0, failed_rank=lambda failed: 1 if failed else None
    )
    with pytest.raises(UsageError) as refused:
        resume.load_peers(resume.Origin(Path("step-00000001"), {}), [], rank_1)
    assert str(refused.value) == said


def test_auto_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *WORDS, "--resume", "auto"]) == 2
    assert "--resume auto needs --output-dir" in capsys.readouterr().err


def test_a_given_checkpoint_is_resumed_in_a_new_folder(
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
    assert "its run has already reached step-00000006" in capsys.readouterr().err
    assert train(interrupted, "--resume", str(checkpoints / "step-00000006")) == 0
    assert_same_run(interrupted, straight)
    assert train(tmp_path / "x", "--resume", str(tmp_path / "nothing")) == 2
    nothing = tmp_path / "nothing"
    said = f"--resume {nothing} is not a checkpoint, and {nothing / 'checkpoints'} has none"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_resuming_refuses_a_run_in_progress(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(interrupted, "", resumes=True):
        assert train(interrupted) == 2
        assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
