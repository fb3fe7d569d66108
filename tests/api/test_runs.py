"""train and compare as functions: what the commands do, in somebody else's process."""

import os
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dml_accel
from dml_accel import cli
from dml_accel.core.errors import StoppedError, UsageError
from dml_accel.training import loop, progress
from tests.helpers import load
from tests.training.interrupting import on_call

FLAGS: dict[str, Any] = {
    "cohort": "resnet8*2",
    "dataset": "digits",
    "image_size": 8,
    "batch_size": 16,
    "lr": 0.05,
    "max_steps": 4,
    "cpu": True,
}
WORDS = "--cohort resnet8*2 --dataset digits --image-size 8 --batch-size 16 --lr 0.05 --max-steps 4"


def hashes(run: dml_accel.Run) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.path.glob("peers/*/model.safetensors"))]


def settings() -> tuple[object, ...]:
    """What a call must leave as it was."""
    backends = torch.backends
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        dict(os.environ),
        [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dml_accel.Run:
    """A run of a few steps with averages, validation and an evaluation in the middle."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    more = {"val_fraction": 0.1, "ema": 0.9, "eval_every": 2}
    return dml_accel.train(**FLAGS, **more, output_dir=folder)


def test_a_call_does_what_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *WORDS.split(), "--cpu", "--output-dir", str(tmp_path / "cli")]) == 0
    capsys.readouterr()
    # The settings of the caller change nothing, and are found as they were.
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_device("meta")
    before = settings()
    try:
        called = dml_accel.train(**FLAGS, output_dir=tmp_path / "call")
        after = settings()
    finally:
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
    assert after == before
    said = capsys.readouterr()
    assert said.out == "" and "step 4/4" in said.err
    assert hashes(called) == hashes(dml_accel.Run(tmp_path / "cli")) != []
    mine, theirs = called.results, load(tmp_path / "cli/results.json")
    for name in ("peers", "ensemble", "agreement", "steps", "splits"):
        assert mine[name] == theirs[name]
    files = {one.name for one in called.path.iterdir()}
    assert files == {one.name for one in (tmp_path / "cli").iterdir()}
    command = load(called.path / "config.json")["command"]
    assert command.startswith("dml_accel.train(cohort='resnet8*2', dataset='digits', ")


def test_the_metrics_are_a_row_for_each_network_of_each_record(run: dml_accel.Run) -> None:
    found = run.metrics
    keys = ["step", "split", "weights", "peer"]
    assert not found.duplicated(keys).any()
    names = ["resnet8-0", "resnet8-1"]
    training = found[found.split == "train"]
    assert sorted(set(training.step)) == [1, 2, 4] and sorted(set(training.peer)) == names
    assert np.allclose(training.loss, training.cross_entropy + training.kl)
    last = found.query("step == 4 and split == 'test' and weights == 'last'").set_index("peer")
    assert list(last.index) == [*names, "ensemble"]
    results = run.results
    assert last.top1["ensemble"] == results["ensemble"]["top1"]
    assert [last.nll[peer["name"]] for peer in results["peers"]] == [
        peer["test"]["nll"] for peer in results["peers"]
    ]
    averaged = found.query("step == 4 and split == 'test' and weights == 'ema'").set_index("peer")
    assert averaged.top1["ensemble"] == results["ema_ensemble"]["top1"]
    assert set(found.split) == {"train", "val", "test"} and found.lr.notna().sum() == len(training)
    assert run.status == "done" and run.config.optim.ema == 0.9


def test_a_configuration_a_file_and_a_recipe(tmp_path: Path) -> None:
    config = dml_accel.Config(**FLAGS)
    first = dml_accel.train(config, max_steps=1, output_dir=tmp_path / "a")
    assert (first.config.optim.max_steps, first.config.optim.lr) == (1, 0.05)
    again = dml_accel.train(config=first.path / "config.json", output_dir=tmp_path / "b")
    assert hashes(again) == hashes(first)
    with pytest.raises(UsageError, match="would change nothing: a Config sets every flag"):
        dml_accel.train(config, recipe="mcl")


@pytest.mark.parametrize(
    ("function", "flags", "said"),
    [
        ("train", {"cohrt": 2}, "train has no cohrt: did you mean cohort?"),
        ("train", {"methods": "all"}, "train has no methods: its keywords are the flags"),
        ("train", {"lr": "fast"}, "configuration lr is 'fast'; its type must be float"),
        ("train", {"config": {"lr": 1}}, "config is a dict; it must be a Config or the path"),
        ("train", {"dataset": "digits", "cohort": "resnet9"}, "resnet9"),
        ("compare", {"target": "mean-logit"}, "compare has no target: use methods"),
        ("compare", {"resume": "auto"}, "the same call with the same output_dir resumes"),
        ("compare", {"methods": "mutuel", "dataset": "digits"}, "--methods mutuel is unknown"),
        ("compare", {"seeds": 1.5}, "seeds is 1.5; it must be a whole number"),
        ("compare", {"preset": "x"}, "--preset is x; it must be one of"),
    ],
)
def test_what_is_refused(function: str, flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    before = settings()
    with pytest.raises(UsageError) as refusal:
        getattr(dml_accel, function)(**flags, output_dir=tmp_path / "new")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "new").exists() and settings() == before


def test_an_interrupt_leaves_a_checkpoint_and_the_next_call_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = dml_accel.train(**FLAGS, output_dir=tmp_path / "straight")
    before = settings()
    with monkeypatch.context() as patch, pytest.raises(StoppedError) as stopped:
        on_call(patch, loop, "train_step", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        dml_accel.train(**FLAGS, output_dir=tmp_path / "run")
    where = f"output_dir={str(tmp_path / 'run')!r}, resume='auto'"
    assert str(stopped.value) == f"stopped by SIGINT; the same call with {where} resumes it"
    assert settings() == before
    assert dml_accel.Run(tmp_path / "run").status == "stopped"
    with pytest.raises(UsageError, match=r"is not finished \(stopped at step 2\)"):
        _ = dml_accel.Run(tmp_path / "run").results
    resumed = dml_accel.train(**FLAGS, output_dir=tmp_path / "run", resume="auto")
    assert hashes(resumed) == hashes(straight)
    # A run that is done is returned again.
    assert dml_accel.train(**FLAGS, output_dir=tmp_path / "run", resume="auto") == resumed


def test_a_second_interrupt_does_not_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = settings()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(patch, loop, "train_step", 2, twice)
        dml_accel.train(**FLAGS, output_dir=tmp_path / "run")
    assert settings() == before and dml_accel.Run(tmp_path / "run").status == "failed"
    assert dml_accel.train(**FLAGS, output_dir=tmp_path / "other").status == "done"


def test_a_thread_trains_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(UsageError) as refusal:
            dml_accel.train(**FLAGS, output_dir=tmp_path / "second")
        refused.append(str(refusal.value))

    def first() -> None:
        found.append(dml_accel.train(**FLAGS, output_dir=tmp_path / "first"))

    before = settings()
    on_call(monkeypatch, loop, "train_step", 2, second)
    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    assert "another call of dml_accel is running in this process" in refused[0]
    assert found[0].status == "done" and settings() == before
    straight = dml_accel.train(**FLAGS, output_dir=tmp_path / "straight")
    assert hashes(found[0]) == hashes(straight)


def test_calls_with_other_precision_and_learn_between_them(tmp_path: Path) -> None:
    flags = FLAGS | {"max_steps": 2}
    first = dml_accel.train(**flags, output_dir=tmp_path / "a")
    half = dml_accel.train(**flags, mixed_precision="bf16", output_dir=tmp_path / "b")
    wide = dml_accel.train(**flags, float64=True, output_dir=tmp_path / "c")
    images = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    nets = {"a": torch.nn.Linear(4, 2), "b": torch.nn.Linear(4, 2)}
    data = (images, (images[:, 0] > 0.5).long())
    config = dml_accel.Config(epochs=1, batch_size=8, lr=0.05, cpu=True)
    records = dml_accel.learn(nets, data, data, config)
    next(records)
    with pytest.raises(UsageError):
        dml_accel.train(**flags, lr_schedule="never", output_dir=tmp_path / "d")
    again = dml_accel.train(**flags, output_dir=tmp_path / "e")
    assert len(list(records)) == 4
    assert [one.results["mixed_precision"] for one in (first, half, wide)] == ["no", "bf16", "no"]
    assert hashes(again) == hashes(first)
    assert len({*map(str, (hashes(first), hashes(half), hashes(wide)))}) == 3


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = FLAGS | {"max_steps": 2, "output_dir": tmp_path / "c"}
    found = dml_accel.compare(**flags, methods=["independent", "mutual"], seeds=2)
    assert capsys.readouterr().out == ""
    assert len(found.runs) == 4 and all(run.status == "done" for run in found.runs)
    assert found.failed == {} and len(found.scores) == 8
    table = found.table
    one = table.query("method == 'mutual' and of == 'ensemble' and metric == 'top1'").iloc[0]
    scores = {
        (run.path.parent.name, run.config.seed): run.results["ensemble"]["top1"]
        for run in found.runs
    }
    assert one["mean"] == pytest.approx(np.mean([scores["mutual", 0], scores["mutual", 1]]))
    pairs = [scores["mutual", seed] - scores["independent", seed] for seed in (0, 1)]
    assert one["difference"] == pytest.approx(np.mean(pairs)) and one["n"] == 2
    again = dml_accel.compare(**flags, methods=["independent", "mutual"], seeds=2)
    assert again == found and again.results["command"].startswith("dml_accel.compare(cohort=")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not hold a run"):
        dml_accel.Run(tmp_path)
    with pytest.raises(UsageError, match="is not a folder; name that of a comparison"):
        dml_accel.Comparison(tmp_path / "none")


# ---------------------------------------------------------------- in a notebook


class Widget:
    """What stands for tqdm's widget, which needs ipywidgets."""

    made: list["Widget"]

    def __init__(self, **options: Any) -> None:
        self.n, self.closed = 0.0, False
        Widget.made.append(self)

    def update(self, n: float) -> None:
        self.n += n

    def set_description(self, *_: object) -> None: ...

    def set_postfix_str(self, *_: object) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_a_bar(
    widgets: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(progress, "find_spec", lambda _: widgets or None)
    fake = types.SimpleNamespace(tqdm=Widget)
    if widgets:
        monkeypatch.setitem(sys.modules, "tqdm.notebook", fake)
    Widget.made = []
    dml_accel.train(**FLAGS | {"max_steps": 2}, output_dir=tmp_path / "run")
    said = capsys.readouterr()
    assert said.out == "" and "test top-1: resnet8-0" in said.err
    if widgets:
        (bar,) = Widget.made
        assert bar.n == pytest.approx(100) and bar.closed and "\r" not in said.err
    else:
        assert "100%|" in said.err and said.err.count("\r") > 2 and not Widget.made
