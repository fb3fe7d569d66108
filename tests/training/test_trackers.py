"""What trackers receive: every number of metrics.jsonl, and nothing else."""

import shutil
from pathlib import Path

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dml_accel.core.errors import UsageError
from dml_accel.training import trackers
from tests import helpers
from tests.helpers import DIGITS, events, load

PAIR = ("--cohort", "resnet8*2", "--val-fraction", "0.1", "--save-every", "4")

Numbers = dict[str, list[tuple[int, float]]]


def train(folder: Path, *words: str, steps: int) -> int:
    cohort = () if "--cohort" in words else PAIR
    words = (*cohort, *words, "--log-with", "tensorboard", "--max-steps", str(steps))
    return helpers.train(folder, *DIGITS, "--eval-every", "4", *words)


def read_back(folder: Path) -> EventAccumulator:
    keep_all = {"scalars": 0, "tensors": 0}
    return EventAccumulator(str(folder / "logs" / "dml_accel"), keep_all).Reload()


def logged(folder: Path) -> Numbers:
    found = read_back(folder)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def recorded(folder: Path) -> Numbers:
    """Return every number of metrics.jsonl by the name that it should have."""
    found: Numbers = {}

    def add(name: str, step: int, value: float | None) -> None:
        if value is not None:
            found.setdefault(name, []).append((step, value))

    for event in events(folder):
        step = event["step"]
        if event["event"] == "step":
            add("train/lr", step, event["lr"])
            for peer in event["peers"]:
                for part in ("loss", "cross_entropy", "kl"):
                    add(f"train/{part}/{peer}", step, event["peers"][peer][part])
        for split in ("test", "val") if event["event"] == "eval" else ():
            scores = event[split]
            add(f"{split}/agreement", step, scores["agreement"])
            for metric in ("top1", "top5", "nll", "ece", "macro_f1"):
                add(f"{split}/{metric}/ensemble", step, scores["ensemble"][metric])
                for peer in scores["peers"]:
                    add(f"{split}/{metric}/{peer}", step, scores["peers"][peer][metric])
            for peer in scores["peers"]:
                add(f"{split}/entropy/{peer}", step, scores["entropy"][peer])
                for other in set(scores["peers"]) - {peer}:
                    add(f"{split}/kl/{other}/{peer}", step, scores["kl"][other][peer])
    return found


def assert_all_records_are_logged(folder: Path) -> None:
    found, expected = logged(folder), recorded(folder)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        numbers = [value for _, value in values]
        assert [value for _, value in found[name]] == pytest.approx(numbers, rel=1e-6), name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers") / "run"
    assert train(folder, steps=8) == 0
    return folder


def test_tensorboard_has_every_number_of_metrics_jsonl(run: Path) -> None:
    assert_all_records_are_logged(run)
    found = logged(run)
    assert {"train/loss/resnet8-0", "test/top1/ensemble", "val/kl/resnet8-1/resnet8-0"} <= set(
        found
    )
    assert [step for step, _ in found["test/top1/resnet8-1"]] == [4, 8]


def test_the_table_and_the_configuration_are_logged(run: Path) -> None:
    (event,) = read_back(run).Tensors("results/text_summary")
    assert event.tensor_proto.string_val[0].decode() == (run / "results.md").read_text()
    assert event.step == 8
    (hyperparameters,) = (run / "logs").rglob("hparams.yml")
    assert "batch_size: 8\n" in hyperparameters.read_text()
    assert "cohort: resnet8*2\n" in hyperparameters.read_text()


def test_a_resumed_run_logs_to_the_same_place_without_what_was_lost(
    run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    # As if it had been killed before the checkpoint of step 8.
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    (folder / "results.json").unlink()
    assert train(folder, "--resume", "auto", steps=12) == 0
    assert_all_records_are_logged(folder)
    assert [step for step, _ in logged(folder)["test/top1/ensemble"]] == [4, 8, 12]
    assert len(list((folder / "logs").rglob("hparams.yml"))) == 1


def test_a_tracker_that_is_added_later_receives_everything(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "logs")
    assert train(folder, "--resume", "auto", steps=9) == 0
    assert_all_records_are_logged(folder)


def test_numbers_that_are_not_finite_are_not_logged() -> None:
    window = {"event": "step", "step": 3, "lr": 0.1, "skipped": {"b": 2}}
    peers = {"a": {"loss": 1.5, "kl": 0.5}, "b": {"loss": None, "kl": None}}
    assert trackers.scalars(window | {"peers": peers}) == {
        "train/lr": 0.1,
        "train/loss/a": 1.5,
        "train/kl/a": 0.5,
        "train/skipped/b": 2,
    }
    assert trackers.scalars({"event": "start", "step": 0}) == {}


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", fail)
    assert train(tmp_path / "run", "--cohort", "resnet8", steps=2) == 0
    said = capsys.readouterr().err
    line = "warning: tensorboard logging is disabled: ConnectionError: nobody there\n"
    assert said.count(line) == 1
    assert load(tmp_path / "run/status.json")["status"] == "done"


def test_what_is_unknown_or_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    for name, message in {
        "tensorbord": "Accelerate has no such tracker; it has aim, tensorboard, wandb",
        "wandb": "--log-with wandb is not installed; pip install wandb",
        "all": "--log-with all: no tracker is installed; pip install tensorboard, or another",
    }.items():
        assert helpers.train(tmp_path / "run", *DIGITS, "--log-with", name) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_all_names_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert trackers.resolve(["all"]) == ["tensorboard", "wandb"]
    assert trackers.resolve(["wandb", "tensorboard", "wandb"]) == ["wandb", "tensorboard"]
    with pytest.raises(UsageError, match="has no such tracker"):
        trackers.resolve(["all", "x"])


def test_a_users_own_logs_stay(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/job.out").write_text("mine")
    assert train(tmp_path, "--resume", "auto", steps=2) == 0
    assert (tmp_path / "logs/job.out").read_text() == "mine"
    assert (tmp_path / "logs/dml_accel").is_dir()
