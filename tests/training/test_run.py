"""One run from the command line to its folder: its files, what is refused, what is printed."""

import fcntl
import math
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from dml_accel import cli
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.flags import Interval
from dml_accel.data import sources
from dml_accel.training import loop
from dml_accel.training.loop import StepRecord
from dml_accel.training.progress import Windows
from dml_accel.training.run_folder import RunFolder
from dml_accel.training.setup import prepare_images
from dml_accel.training.trackers import scalars
from tests import helpers
from tests.helpers import DIGITS, events, load, run_program, status_of

TINY = [*DIGITS, "--max-steps", "20"]


def train(folder: Path, *words: str) -> int:
    return helpers.train(folder, *TINY, *words)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two unequal peers."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ("--cohort", "wrn_16_2", "resnet8", "--val-fraction", "0.1", "--eval-every", "8")
    assert train(folder, *words) == 0
    return folder


# ---------------------------------------------------------------- the run folder


def test_the_folder_holds_what_is_promised_and_no_pickle(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    peers = {
        f"peers/{name}/{file}"
        for name in ("wrn_16_2-0", "resnet8-0")
        for file in ("model.safetensors", "config.json", "README.md")
    }
    checkpoint = {
        f"checkpoints/step-00000020/{file}"
        for name in ("wrn_16_2-0", "resnet8-0")
        for file in (f"{name}.safetensors", f"{name}.json", "state.json")
    }
    records = {"config.json", "status.json", "metrics.jsonl", "results.json", "results.md"}
    assert files == peers | checkpoint | records | {"run.lock"}
    for path in run.rglob("*"):
        if path.is_file():
            assert not zipfile.is_zipfile(path)  # what torch.save would write
            assert not path.read_bytes().startswith(b"\x80")  # what pickle would write


def test_results_are_complete(run: Path) -> None:
    results = load(run / "results.json")
    assert results["format"] == 1 and results["seed"] == 0
    assert (results["epochs"], results["steps"]) == (200, 20)
    assert (results["device"], results["mixed_precision"], results["world_size"]) == (
        "cpu",
        "no",
        1,
    )
    ranks = {"wrn_16_2-0": [0], "resnet8-0": [0]}
    assert results["placement"] == {"kind": "replicate", "ranks": ranks}
    assert [peer["name"] for peer in results["peers"]] == ["wrn_16_2-0", "resnet8-0"]
    for peer in results["peers"]:
        assert set(peer) == {"name", "arch", "params", "test", "val"}
        assert set(peer["test"]) == {"n", "top1", "top5", "nll", "ece", "macro_f1"}
        assert (peer["test"]["n"], peer["val"]["n"]) == (360, 144)
        assert 0 <= peer["test"]["top1"] <= peer["test"]["top5"] <= 1
    assert results["ensemble"]["n"] == 360
    assert results["splits"] == {"train": "train", "val": "val (0.1 of train)", "test": "test"}
    assert 0 <= results["agreement"] <= 1
    assert results["throughput"]["images_per_second"] > 0
    assert results["throughput"]["step_seconds_median"] > 0
    assert results["peak_memory_bytes"] > 1e8
    assert {"torch", "timm", "accelerate", "datasets"} <= set(results["versions"])


def test_metrics_are_one_record_a_line(run: Path) -> None:
    found = events(run)
    assert [e["event"] for e in found if e["event"] != "step"] == ["start", *["eval"] * 3, "end"]
    assert [e["step"] for e in found if e["event"] == "eval"] == [8, 16, 20]
    steps = [e for e in found if e["event"] == "step"]
    assert sum(e["steps"] for e in steps) == 20 and steps[-1]["step"] == 20
    # 9: a twentieth of the epoch's 161
    assert [e["step"] for e in steps] == [1, 2, 4, 8, 9, 16, 18, 20]
    losses = [e["peers"]["resnet8-0"]["cross_entropy"] for e in steps]
    assert len(set(losses)) == len(losses)  # not one value reported again and again
    assert all({"event", "step", "epoch", "time"} <= set(e) for e in found)
    last, results = found[-2], load(run / "results.json")
    assert last["test"]["peers"]["resnet8-0"] == results["peers"][1]["test"]


def test_the_configuration_repeats_the_run(run: Path, tmp_path: Path) -> None:
    saved = load(run / "config.json")
    config = Config(**saved["config"])
    assert config.as_dict() == saved["config"]
    assert saved["peers"][1] == {"name": "resnet8-0", "arch": "resnet8_cifar"}
    assert {"versions", "command", "commit"} <= set(saved)
    words = ("--cohort", *config.cohort, "--val-fraction", "0.1", "--eval-every", "8")
    assert train(tmp_path / "again", *words) == 0
    first, again = (load(path / "results.json") for path in (run, tmp_path / "again"))
    assert [peer["test"] for peer in first["peers"]] == [peer["test"] for peer in again["peers"]]


def test_the_status_is_done(run: Path) -> None:
    assert status_of(run) == {"status": "done", "reason": None, "step": 20}


def test_results_md_shows_the_table_and_the_command(run: Path) -> None:
    text = (run / "results.md").read_text()
    for words in ("| wrn_16_2-0 |", "| ensemble", "top-1 %", "Command: `"):
        assert words in text


# ---------------------------------------------------------------- the peers


@pytest.mark.parametrize("name", ["wrn_16_2-0", "resnet8-0"])
def test_timm_loads_the_trained_peer_and_its_accuracy_is_the_recorded(run: Path, name: str) -> None:
    torch.manual_seed(0)  # an unloaded network would differ from the peer
    net = timm.create_model(f"local-dir:{run / 'peers' / name}", pretrained=True).eval()
    config = Config(**load(run / "config.json")["config"])
    data = prepare_images(config, sources.read(config.data), torch.device("cpu"))
    images, labels = data.test.rows(0, 360)
    with torch.no_grad():
        logits = net(images)
    peer = next(p for p in load(run / "results.json")["peers"] if p["name"] == name)
    assert (logits.argmax(1) == labels).sum().item() / 360 == peer["test"]["top1"]
    nll = torch.nn.functional.cross_entropy(logits, labels).item()
    assert nll == pytest.approx(peer["test"]["nll"], rel=1e-5)
    settings = timm.data.resolve_model_data_config(net)
    assert list(settings["input_size"]) == [3, 8, 8]
    assert settings["mean"] == pytest.approx(data.normalisation.mean)
    assert settings["std"] == pytest.approx(data.normalisation.std)
    assert net.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]


def test_double_precision_reaches_the_files(tmp_path: Path) -> None:
    assert train(tmp_path, "--cohort", "resnet8", "--float64", "--max-steps", "1") == 0
    tensors = load_file(tmp_path / "peers" / "resnet8-0" / "model.safetensors")
    assert tensors["conv1.weight"].dtype == torch.float64
    assert load(tmp_path / "results.json")["agreement"] is None


def test_a_timm_network_with_arguments_comes_back_with_them(tmp_path: Path) -> None:
    net = "timm:vit_tiny_patch16_224[img_size=8,patch_size=2,depth=1,embed_dim=12,num_heads=1]"
    assert train(tmp_path, "--cohort", net, "--max-steps", "1") == 0
    folder = tmp_path / "peers" / "vit_tiny_patch16_224-0"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert len(loaded.blocks) == 1


def test_a_cohort_that_diverges_fails_and_still_writes_json(tmp_path: Path) -> None:
    assert train(tmp_path, "--cohort", "resnet8*2", "--lr", "1e30", "--max-steps", "4") == 1
    status = load(tmp_path / "status.json")
    assert status["status"] == "failed"
    assert "predictions of resnet8-0 are not finite" in status["reason"]
    assert not (tmp_path / "results.json").exists()
    found = events(tmp_path)
    assert found[-1]["test"]["peers"]["resnet8-0"]["nll"] is None
    assert found[-2]["skipped"] == {"resnet8-0": 2, "resnet8-1": 2}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cohort", "resnet23"], "unknown net 'resnet23'; nearest: "),
        (["--cohort", "0"], "asks for 0 peers"),
        (["--dataset", "no-such/set"], "the hub cannot be reached"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--batch-size", "2000"], "--batch-size 2000 is more than the 1437 training images"),
        (["--threads", "9999"], "--threads is 9999, but this process can use "),
        (["--lr", "-1"], "--lr is -1.0; it must be at least 0"),
        (["--lr", "nan"], "--lr is nan; it must be a finite number"),
        (["--momentum", "1"], "--momentum is 1.0; it must be at least 0 and below 1"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0"),
        (["--temperature", "0"], "--temperature is 0.0; it must be above 0"),
        (["--kl-weight", "inf"], "--kl-weight is inf; it must be a finite number"),
        (["--clip-norm", "0"], "--clip-norm is 0.0; it must be above 0"),
        (["--grad-accum", "9"], "--grad-accum is 9; it must be at most --batch-size (8)"),
        (["--val-fraction", "1"], "--val-fraction is 1.0"),
        (["--max-steps", "0"], "--max-steps is 0; it must be at least 1"),
        (["--eval-every", "often"], "--eval-every 'often' is not an interval"),
        (["--image-size", "4"], "--image-size is 4"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0 and below 9,223,"),
        (["--seed", "1" + 400 * "0"], "it must be at least 0 and below 9,223,"),
        (["--lr-gamma", "1e200"], "--lr-gamma is 1e+200; it must be at least 0 and at most 1"),
        (["--output-dir", "/tmp/" + "x" * 300], "cannot be created: File name too long"),
        (["--epochs", "two"], "--epochs: invalid int value: 'two'"),
        (["--kl-reduction", "max"], "invalid choice: 'max'"),
        (["--batchsize", "8"], "unknown argument --batchsize: did you mean --batch-size?"),
        (["--epoch", "8"], "unknown argument --epoch: did you mean --epochs?"),
        (["--cohort", "timm:vit_tiny_patch16_224"], "try 'timm:vit_tiny_patch16_224[img_size=8"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["train", *TINY, "--output-dir", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(run) == 2
    assert "already holds a run (config.json); name a new folder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_resuming_leaves_other_folders_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers/mine.txt").write_text("mine")
    assert train(tmp_path, "--resume", "auto") == 2
    assert "holds peers but no run that could be resumed; name another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["peers", "mine.txt"]


def test_a_folder_that_cannot_be_created_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert train(tmp_path / "file" / "run") == 2
    assert "cannot be created: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_use_is_refused_and_its_holder_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "run.lock", "w") as lock:
        lock.write("process 42 on elsewhere\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(tmp_path, "--cohort", "resnet8") == 2
        assert "is in use by process 42 on elsewhere" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_folders_without_a_name_are_new_even_in_the_same_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    with RunFolder(None, "ax1") as first, RunFolder(None, "ax1") as second:
        assert (str(first.path), str(second.path)) == ("runs/now-ax1", "runs/now-ax1-2")


def test_the_time_of_an_evaluation_is_not_counted_as_a_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    windows = Windows(["a"], steps_per_epoch=781)
    ends = []
    for step in range(1, 783):
        window = windows.add(StepRecord(step, 0, 0.1, step in (100, 781), torch.zeros(1, 3)))
        if window:
            ends.append((step, window.steps, window.seconds))
        if step in (100, 781):
            next(clock)  # an evaluation
            windows.restart_clock()
    assert [end[0] for end in ends][:8] == [1, 2, 4, 8, 16, 32, 40, 80]
    assert [end[:2] for end in ends][-2:] == [(760, 40), (781, 21)]
    assert {end[2] for end in ends} == {10}


def test_a_model_card_says_how_it_was_taught(run: Path, tmp_path: Path) -> None:
    card = (run / "peers" / "resnet8-0" / "README.md").read_text()
    assert "together with wrn_16_2-0 by Deep Mutual Learning" in card
    assert "after 20 steps" in card
    words = ("--cohort", "resnet8*2", "--kl-weight", "0", "--max-steps", "1")
    assert train(tmp_path, *words) == 0
    card = (tmp_path / "peers" / "resnet8-0" / "README.md").read_text()
    assert "from the labels alone" in card and "mutual" not in card.lower()


def test_a_failure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(RuntimeError):
        train(tmp_path, "--cohort", "resnet8")
    failed = {"status": "failed", "reason": "RuntimeError: out of luck", "step": 0}
    assert status_of(tmp_path) == failed


# ---------------------------------------------------------------- the programs


def test_a_program_of_its_own_prints_plain_lines_without_a_warning(tmp_path: Path) -> None:
    # train.py enters the same function: see tests/cli/test_parser.py.
    words = ["-m", "dml_accel", "train", *TINY, "--cohort", "resnet8", "--max-steps", "2"]
    done = run_program(sys.executable, "-W", "error", *words, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "resnet8-0" in done.stdout and "ensemble" in done.stdout
    assert f"run folder: {tmp_path / 'run'}" in done.stdout
    assert (
        "\r" not in done.stderr and "\x1b" not in done.stderr
    )  # plain lines, because it is not a terminal
    assert "step 2/2 epoch 1/200 test top-1: resnet8-0 " in done.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    assert "'resnet8*2' --dataset digits" in text
    for default in ("(default: 200)", "(default: 64)", "(default: 0.1)", "(default: 1ep)"):
        assert default in text


@pytest.mark.parametrize(
    ("text", "count", "unit"), [("500", 500, "step"), ("2ep", 2, "ep"), ("1.5min", 1.5, "min")]
)
def test_intervals(text: str, count: float, unit: str) -> None:
    interval = Interval.parse(text, "--eval-every")
    assert (interval.count, interval.unit) == (count, unit)


def test_interval_ends() -> None:
    ends = [step for step in range(1, 13) if Interval(2, "ep").due(step, 3)]
    assert ends == [6, 12]
    assert not Interval(1, "min").due(60, 1)


def test_unknown_configuration_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unknown configuration zzz; known are: cohort"):
        Config(**{"zzz": 3})


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(UsageError, match="configuration epochs is '8'; its type must be int"):
        Config(**{"epochs": "8"})
    assert Config(**{"lr": 1}).optim.lr == 1


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    optim, method = config.optim, config.method
    recipe = (optim.epochs, optim.batch_size, optim.lr, optim.momentum, optim.lr_step)
    assert recipe == (200, 64, 0.1, 0.9, 60)
    assert (optim.lr_gamma, method.kl_weight, method.temperature) == (0.1, 1.0, 1.0)
    assert config.data.augmentation == ("crop-flip",)
    assert Config(dataset="digits").data.augmentation == ("crop",)
    assert math.isclose(optim.weight_decay, 5e-4)


# ---------------------------------------------------------------- packages that are not installed


def test_digits_are_trained_on_without_the_packages_that_others_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("datasets", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    assert train(tmp_path / "run", "--cohort", "resnet8", "--max-steps", "1") == 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/train.parquet").touch()
    words = ["--cohort", "resnet8*2", "--dataset", str(tmp_path / "photos")]
    capsys.readouterr()
    assert cli.main(["train", *words, "--output-dir", str(tmp_path / "new")]) == 2
    assert "photos needs datasets: pip install datasets" in capsys.readouterr().err
    assert cli.main(["compare", *words, "--output-dir", str(tmp_path / "new")]) == 2
    assert "compare needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- the learning rate


def test_rates_of_peers_are_recorded_and_a_schedule_keeps_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ["--cohort", "resnet8*2", "--lr-schedule", "cosine", "--max-steps", "2"]
    unknown = ["--peer-opt", "resnet-0:lr=1"]
    assert train(folder, *words, *unknown) == 2 and not folder.exists()
    said = capsys.readouterr().err
    assert "--peer-opt resnet-0: there is no such peer; there are resnet8-0, resnet8-1" in said
    words += ["--peer-opt", "resnet8-1:lr=.01,optimizer=lion"]
    assert train(folder, *words) == 0
    assert "the learning rate has hardly fallen when --max-steps ends" in capsys.readouterr().err
    steps = [one for one in events(folder) if one["event"] == "step"]
    for one in steps:
        assert one["lrs"] == {"resnet8-0": one["lr"], "resnet8-1": pytest.approx(0.2 * one["lr"])}
    assert "lrs" not in scalars(steps[0])
    assert scalars(steps[0])["train/lr/resnet8-1"] == steps[0]["lrs"]["resnet8-1"]
    assert train(folder, *words, "--epochs", "300", "--resume", "auto") == 2
    text = "but this command says --epochs 300 (--lr-schedule cosine ends with --epochs): use"
    assert text in capsys.readouterr().err
