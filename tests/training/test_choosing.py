"""Choosing by validation: the best weights of each peer, and runs that stop early."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dml_accel import cli, learn
from dml_accel.core.config import Config
from dml_accel.core.errors import StoppedError, UnreadableError, UsageError
from dml_accel.distributed.launch import Stop
from dml_accel.training import checkpoint, loop, record
from dml_accel.training.choosing import Choosing, best_of, wrong_state
from tests.helpers import Training, assert_same_state, events, load, saved_steps, status_of
from tests.training.interrupting import CHOOSING, content, killed, train

Build = Callable[..., Training]
PEERS = ("resnet8-0", "resnet8-1")


def evaluated(*top1: float, nll: float | None = 1.0) -> dict[str, Any]:
    """An evaluation in which the peers a, b, ... have these accuracies."""
    one = {"n": 10, "top5": None, "nll": nll, "ece": 0.1}
    names = "abc"[: len(top1)]
    return {"peers": {n: one | {"top1": value} for n, value in zip(names, top1, strict=True)}}


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("patience", "means", "over"),
    [
        (1, [0.1, 0.2, 0.3, 0.3], 4),  # as good is not better
        (2, [0.1, 0.3, 0.2, 0.25, 0.9], 4),
        (2, [0.1, 0.3, 0.2, 0.4, 0.1, 0.1], 6),  # the count starts again
        (3, [0.5, 0.4, 0.3], None),
        (None, [0.5, 0.1, 0.1, 0.1], None),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_is_over_after_so_many_evaluations_without_a_better_one(
    patience: int | None, means: list[float], over: int | None, interrupted: bool
) -> None:
    choosing = Choosing([], False, patience, {})
    for step, mean in enumerate(means, 1):
        val = evaluated(mean - 0.1, mean + 0.1)  # the mean over peers counts
        choosing.take(step, val, val)
        if interrupted:  # and the evaluation at the checkpoint is repeated
            state = json.loads(json.dumps(choosing.state()))
            assert not wrong_state(state, "ab")
            choosing = Choosing([], False, patience, state)
            choosing.take(step, val, val)
        assert choosing.is_over == (over is not None and step >= over)
        if choosing.is_over:
            return
    assert over is None


def test_only_flags_that_are_on_are_remembered() -> None:
    for keeps in (False, True):
        for patience in (None, 1):
            choosing = Choosing([], keeps, patience, {})
            choosing.take(1, evaluated(0.5), evaluated(0.5))
            names = {"best"} if keeps else set()
            assert choosing.state().keys() == names | ({"early_stop"} if patience else set())


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({"b": (0.5, 1.0), "a": (0.5, 1.1)}, "b"),  # the lower NLL
        ({"b": (0.5, 1.0), "a": (0.5, 1.0)}, "a"),
        ({"a": (0.4, 0.1), "b": (0.5, None)}, "b"),
        ({"a": (0.5, None), "b": (0.5, 9.0)}, "b"),
    ],
)
def test_the_best_peer(scores: dict[str, tuple[float, float | None]], best: str) -> None:
    assert best_of({n: {"top1": top1, "nll": nll} for n, (top1, nll) in scores.items()}) == best


METRICS = {"n": 10, "top1": 0.5, "top5": None, "nll": 1.0, "ece": 0.1}
GOOD = {"step": 3, "val": METRICS, "test": METRICS}
EARLY = {"top1": 0.5, "worse": 1, "step": 3}


@pytest.mark.parametrize(
    ("state", "wrong"),
    [
        ({}, []),
        ({"best": {}, "early_stop": {"top1": None, "worse": 0, "step": 0}}, []),
        ({"best": {"a": GOOD}, "early_stop": EARLY}, []),
        ({"best": {"a": GOOD | {"val": METRICS | {"macro_f1": 0.5}}}}, []),
        ({"best": {"a": GOOD | {"val": METRICS | {"macro_f1": "x"}}}}, ["best"]),
        ({"best": {"a": GOOD | {"val": METRICS | {"f1": 0.5}}}}, ["best"]),
        ({"best": [], "early_stop": None}, ["best", "early_stop"]),
        ({"best": {"z": GOOD}}, ["best"]),
        ({"best": {"a": GOOD | {"step": -1}}}, ["best"]),
        ({"best": {"a": GOOD | {"val": None}}}, ["best"]),
        ({"best": {"a": GOOD | {"val": METRICS | {"top1": "x"}}}}, ["best"]),
        ({"best": {"a": GOOD | {"test": METRICS | {"nll": []}}}}, ["best"]),
        ({"early_stop": EARLY | {"worse": True}}, ["early_stop"]),
        ({"early_stop": EARLY | {"top1": "0.5"}}, ["early_stop"]),
        ({"early_stop": {"worse": 1}}, ["early_stop"]),
    ],
    ids=str,
)
def test_a_state_of_another_form_is_found(state: dict[str, Any], wrong: list[str]) -> None:
    assert wrong_state(state, ["a", "b"]) == wrong


def test_the_weights_kept_are_those_of_the_best_evaluation(training: Build) -> None:
    t = training(images=80, epochs=1, max_steps=6, val_fraction=0.1, keep="best", eval_every="1")
    data = dataclasses.replace(t.data, test=t.data.val)  # which is small
    seen: dict[str, list[tuple[float, dict[str, Any]]]] = {peer.name: [] for peer in t.peers}
    for one in loop.fit(t.cohort, data, t.config.run):
        if isinstance(one, loop.EvaluationRecord):
            assert one.val is not None and one.best is not None
            for name, state in t.states().items():
                seen[name].append((one.val["peers"][name]["top1"], state))
            last = one
    for peer in t.peers:
        scores = [top1 for top1, _ in seen[peer.name]]
        place = scores.index(max(scores))  # the earlier one of two
        assert last.best is not None and last.best[peer.name]["step"] == place + 1
        assert peer.best is not None
        state = seen[peer.name][place][1]
        assert_same_state(peer.best, {name: state[name] for name in peer.best})
        assert len(scores) == 6


def kinds(records: list[loop.Record]) -> list[tuple[str, int]]:
    names = {loop.CheckpointRecord: "saved", loop.EvaluationRecord: "evaluated"}
    return [(names[type(one)], one.step) for one in records if type(one) in names]


@pytest.mark.parametrize("choice", [{"keep": "best"}, {"early_stop": 9}], ids=str)
def test_the_last_checkpoint_holds_the_last_evaluation(
    training: Build, monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any]
) -> None:
    rules = {"epochs": 1, "max_steps": 2, "save_every": "1", "eval_every": "1"}
    t = training(images=80, val_fraction=0.1, **rules, **choice)
    stop, taken = Stop(), t.placement.names

    def evaluate(*_: object, **__: object) -> dict[str, Any] | None:
        """Get better with every step; be stopped in the second evaluation."""
        steps = max([one.step for one in records], default=2)
        if steps == 2 and not stop.signal:
            stop.signal = "SIGTERM"
            return None
        return {"peers": {name: METRICS | {"top1": steps / 10} for name in taken}}

    def follow(start: loop.Start | None, stop: Stop | None = None) -> list[tuple[str, int]]:
        records.clear()
        for one in loop.fit(t.cohort, t.data, t.config.run, start, stop):
            records.append(one)
            if isinstance(one, loop.CheckpointRecord):
                saved.append(json.loads(json.dumps(one.chosen)))
        return kinds(records)

    records: list[loop.Record] = []
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(StoppedError):
        follow(None, stop)
    assert kinds(records) == [("evaluated", 1), ("saved", 1), ("saved", 2)]
    assert saved[0] == saved[1]
    for found in (["evaluated", "saved"], ["evaluated"]):  # it is saved again, once
        assert follow(loop.Start(2, saved=True, chosen=saved[-1])) == [(one, 2) for one in found]
    assert len(saved) == 3 and saved[2] != saved[1]
    # Where nothing interrupts, it is written once.
    assert follow(None) == [(kind, step) for step in (1, 2) for kind in ("evaluated", "saved")]
    assert saved[4] == saved[2]


# ---------------------------------------------------------------- a run that stops early


def test_a_run_stops_where_its_records_say(chosen: Path) -> None:
    vals = {e["step"]: e["val"]["peers"] for e in events(chosen) if e["event"] == "eval"}
    means = [fmean(peer["top1"] for peer in vals[step].values()) for step in sorted(vals)]
    best, worse, stop = -1.0, 0, 0
    for step, mean in enumerate(means, 1):
        best, worse = max(best, mean), 0 if mean > best else worse + 1
        if worse == 2:
            stop = step
            break
    assert 2 < stop < 15, "these images do not show an early stop"
    results = load(chosen / "results.json")
    assert (results["steps"], results["stopped_early"], len(means)) == (stop, True, stop)
    assert saved_steps(chosen)[-1] == stop
    assert status_of(chosen) == {"status": "done", "reason": None, "step": stop}
    assert "Stopped early" in (chosen / "results.md").read_text()
    for peer in results["peers"]:
        scores = {step: vals[step][peer["name"]]["top1"] for step in sorted(vals)}
        found = peer["best"]["step"]
        assert found == max(scores, key=lambda step: scores[step])
        assert peer["best"]["val"] == vals[found][peer["name"]]
    tops = {peer["name"]: peer["best"] for peer in results["peers"]}
    top = best_of({name: one["val"] for name, one in tops.items()})
    assert results["best"] == {"peer": top, **tops[top]}


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(loop, "evaluate", 10), (record, "write_peer", 4)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_killed_run_stops_at_the_same_step_with_the_same_weights(
    tmp_path: Path, chosen: Path, owner: Any, name: str, call: int
) -> None:
    killed(tmp_path, owner, name, call, *CHOOSING)
    assert train(tmp_path, *CHOOSING) == 0
    results = [load(folder / "results.json") for folder in (tmp_path, chosen)]
    for part in ("peers", "ensemble", "ema_ensemble", "best", "steps", "stopped_early"):
        assert results[0][part] == results[1][part], part
    for kind in ("peers", "peers-averaged", "peers-best"):
        for peer in PEERS:
            files = (folder / kind / peer / "model.safetensors" for folder in (tmp_path, chosen))
            assert_same_state(*map(load_file, files))
    last = f"checkpoints/step-{results[0]['steps']:08d}"
    for peer in PEERS:
        assert_same_state(
            *(load_file(folder / last / f"{peer}.safetensors") for folder in (tmp_path, chosen))
        )
    states = [load(folder / last / "state.json") for folder in (tmp_path, chosen)]
    for part in ("early_stop", "best"):
        assert states[0][part] == states[1][part]


def test_an_evaluation_that_follows_the_clock_is_recorded_once(tmp_path: Path) -> None:
    words = (*CHOOSING, "--eval-every", "0.0001min", "--early-stop", "1")
    killed(tmp_path, record, "write_peer", 1, *words)  # after its last checkpoint
    assert train(tmp_path, *words) == 0
    steps = [event["step"] for event in events(tmp_path) if event["event"] == "eval"]
    assert load(tmp_path / "results.json")["stopped_early"]
    assert steps == sorted(set(steps))


def test_a_run_that_stopped_early_has_nothing_left_to_do(
    chosen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(chosen)
    assert train(chosen, *CHOOSING) == 0
    assert "has stopped early after" in capsys.readouterr().err
    assert train(chosen, *CHOOSING, "--early-stop", "3") == 2
    assert "--early-stop 2, but this command says --early-stop 3" in capsys.readouterr().err
    assert train(chosen, *CHOOSING, "--ema", "0.8") == 2
    assert "--ema 0.9, but this command says --ema 0.8" in capsys.readouterr().err
    assert content(chosen) == before


def test_a_resumed_run_may_stop_keeping_the_best_weights(
    tmp_path: Path, chosen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(chosen, folder)
    (folder / "results.json").unlink()
    (folder / "best").mkdir()  # somebody's export
    assert train(folder, *CHOOSING, "--keep", "last") == 0
    assert (folder / "best").exists()
    results = load(folder / "results.json")
    assert "best" not in results and "best" not in results["peers"][0]
    assert not (folder / "peers-best").exists() and (folder / "peers-averaged").exists()
    assert load(folder / "results.json")["steps"] == load(chosen / "results.json")["steps"]
    assert "--keep best counts from" not in capsys.readouterr().err


def test_a_resumed_run_that_begins_to_keep_the_best_weights_says_so(
    tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / "results.json").unlink()
    assert train(folder, "--keep", "best") == 0
    assert "--keep best counts from step 15 on: " in capsys.readouterr().err
    assert load(folder / "results.json")["best"]["step"] == 15
    state = load(folder / "checkpoints" / "step-00000015" / "state.json")
    assert {one["step"] for one in state["best"].values()} == {15}


def test_a_run_without_the_flags_keeps_nothing_of_them(straight: Path) -> None:
    newest = max(straight.glob("checkpoints/*"))
    state, results = load(newest / "state.json"), load(straight / "results.json")
    assert not {"best", "early_stop", "ema"} & state.keys()
    assert not {"best", "stopped_early", "ema_ensemble"} & results.keys()
    assert not {"ema", "best"} & results["peers"][0].keys()
    kinds = {name.partition(".")[0] for name in load_file(next(newest.glob("*.safetensors")))}
    assert kinds == {"model", "optimizer"}
    assert {path.name for path in straight.iterdir()}.isdisjoint({"peers-averaged", "peers-best"})


@pytest.mark.parametrize("damage", ["averages", "best", "state"])
def test_a_checkpoint_that_lacks_what_the_flags_need_is_refused(
    training: Build, tmp_path: Path, damage: str
) -> None:
    changes: dict[str, Any] = {"ema": 0.9, "keep": "best", "val_fraction": 0.1}
    t = training(images=80, **changes)
    for peer in t.peers:
        peer.best = {name: value.clone() for name, value in peer.module.state_dict().items()}
    state: dict[str, Any] = {"best": {peer.name: GOOD for peer in t.peers}}
    if damage == "averages":
        t.peers[0].average = None
    elif damage == "best":
        del t.peers[0].best["fc.weight"]  # type: ignore[union-attr]
    else:
        state = {"best": {}}
    checkpoint.write_together(tmp_path, 3, t.peers, state, None, t.placement)
    fresh = training(images=80, **changes)
    before = fresh.states()
    with pytest.raises(UnreadableError, match=r"holds other weights|differ in whether"):
        checkpoint.load_peers(next(tmp_path.glob("step-*")), fresh.peers)
    for name, values in fresh.states().items():
        assert_same_state(values, before[name])


def test_learn_keeps_no_best_weights() -> None:
    data = torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(UsageError, match="keep='best'.*learn leaves the last weights"):
        learn({"a": torch.nn.Linear(1, 1)}, data, data, Config(keep="best", val_fraction=0.1))


# ---------------------------------------------------------------- using them


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--peer", "resnet8-1"], "peers/resnet8-1"),
        (["--peer", "resnet8-1", "--weights", "ema"], "peers-averaged/resnet8-1"),
        (["--peer", "resnet8-0", "--weights", "best"], "peers-best/resnet8-0"),
        (
            ["--peer", "resnet8-1", "--weights", "ema", "--checkpoint", "latest"],
            "peers-averaged/resnet8-1",
        ),
        (
            ["--peer", "resnet8-1", "--weights", "best", "--checkpoint", "latest"],
            "peers-best/resnet8-1",
        ),
        (["--peer", "best"], "peers-best/{best}"),
        (["--peer", "best", "--weights", "best", "--checkpoint", "latest"], "peers-best/{best}"),
        (["--peer", "best", "--weights", "last"], "peers/{last}"),
    ],
    ids=str,
)
def test_export_writes_the_weights_that_are_meant(
    tmp_path: Path, chosen: Path, words: list[str], folder: str
) -> None:
    results = load(chosen / "results.json")
    last = best_of({peer["name"]: peer["val"] for peer in results["peers"]})
    folder = folder.format(best=results["best"]["peer"], last=last)
    assert cli.main(["export", str(chosen), *words, "--to", str(tmp_path / "to")]) == 0
    files = (path / "model.safetensors" for path in (tmp_path / "to", chosen / folder))
    assert_same_state(*map(load_file, files))


def test_whether_a_run_kept_its_best_weights_is_what_its_results_say(
    tmp_path: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for target in (run / "best", run / "peers-best", tmp_path / "to"):  # two in the way of the next
        assert cli.main(["export", str(run), "--peer", "best", "--to", str(target)]) == 0


def test_evaluate_measures_averages_as_training_did(tmp_path: Path, chosen: Path) -> None:
    words = ["--weights", "ema", "--cpu", "--to", str(tmp_path)]
    assert cli.main(["evaluate", str(chosen), *words]) == 0
    found, results = load(tmp_path / "evaluation.json"), load(chosen / "results.json")
    assert found["weights"] == "ema"
    for one, peer in zip(found["peers"], results["peers"], strict=True):
        assert one["test"]["top1"] == peer["ema"]["test"]["top1"]
        assert one["test"]["nll"] == pytest.approx(peer["ema"]["test"]["nll"], rel=1e-4)
    assert found["ensemble"]["top1"] == results["ema_ensemble"]["top1"]


@pytest.mark.parametrize("weights", ["ema", "best"])
def test_weights_that_a_run_does_not_have_are_refused(
    straight: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, weights: str
) -> None:
    needs = {"ema": "averaged weights: .* with --ema", "best": "best weights .* with --keep best"}
    words = ["--peer", "resnet8-0", "--weights", weights, "--to", str(tmp_path / "to")]
    for where, more in (
        (straight, []),
        (straight, ["--checkpoint", "latest"]),
        (straight / "peers" / "resnet8-0", []),
    ):
        assert cli.main(["export", str(where), *words, *more]) == 2
        text = capsys.readouterr().err.splitlines()[-1]
        assert text.startswith(f"error: --weights {weights}: ")
        if where == straight:
            assert re.search(needs[weights], text), text
        else:
            assert "is not a run" in text
    assert not (tmp_path / "to").exists()
