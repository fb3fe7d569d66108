"""The peers of a run that is not finished, from its checkpoints."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.data.pixels import Geometry
from dml_accel.inference.checkpoints import read_checkpoint_peers
from dml_accel.inference.load import read_trained_peers
from tests.helpers import assert_same_state, load
from tests.inference.conftest import PEERS, SIZE, logits_of

Captured = pytest.CaptureFixture[str]
STEP = "step-00000008"


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """The run as it was when its last checkpoint had been written."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "peers")
    (copy / "status.json").write_text('{"status": "running", "step": 8}')
    return copy


def damaged(run: Path, step: int) -> Path:
    """A newer checkpoint, with a bit changed."""
    path = shutil.copytree(run / "checkpoints" / STEP, run / f"checkpoints/step-{step:08d}")
    state = json.loads((path / "state.json").read_text()) | {"step": step}
    (path / "state.json").write_text(json.dumps(state))
    return path


@pytest.mark.parametrize("asked", ["latest", "8", STEP, "PATH"])
def test_a_checkpoint_holds_what_the_run_would_have_written(
    run: Path, unfinished: Path, few: Path, tmp_path: Path, asked: str
) -> None:
    asked = str(unfinished / "checkpoints" / STEP) if asked == "PATH" else asked
    peers = read_checkpoint_peers(unfinished, asked, tmp_path / "scratch")
    finished = read_trained_peers(run)
    assert list(peers.folders) == list(finished.folders) == PEERS
    for name, folder in peers.folders.items():
        theirs = finished.folders[name]
        assert_same_state(*(load_file(one.path / "model.safetensors") for one in (folder, theirs)))
        assert load(folder.path / "config.json") == load(theirs.path / "config.json")
    assert (peers.classes, peers.precision) == (finished.classes, finished.precision)
    assert (peers.step, peers.note) == (8, f"step 8 of 8 of an unfinished run ({STEP})")
    for name, mine in peers.results_by_peer.items():
        for split in ("test", "val"):
            assert mine[split] == finished.results_by_peer[name][split]
    if asked == "latest":
        assert torch.equal(logits_of(tmp_path / "scratch", few), logits_of(run, few))


def test_a_run_of_an_earlier_version_squashes(unfinished: Path, tmp_path: Path) -> None:
    config = load(unfinished / "config.json")
    for name in ("crop_mode", "eval_resize"):
        del config["config"][name]
    (unfinished / "config.json").write_text(json.dumps(config))
    peers = read_checkpoint_peers(unfinished, "latest", tmp_path / "scratch")
    for geometry in (peers.geometry, *(folder.geometry for folder in peers.folders.values())):
        assert geometry == Geometry(SIZE, SIZE, "squash")


def test_every_command_uses_it_and_says_so(
    run: Path, unfinished: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    for command, *words in (
        ["evaluate", "--dataset", str(few / "set"), "--cpu"],
        ["predict", str(few / "set"), "--cpu"],
        ["export", "--peer", "best", "--to", str(tmp_path / "best")],
        ["export", "--peer", "ensemble", "--to", str(tmp_path / "all")],
    ):
        assert cli.main([command, str(unfinished), *words, "--checkpoint", "latest"]) == 0, command
        assert f"step 8 of 8 of an unfinished run ({STEP})" in capsys.readouterr().err
    (found,) = (unfinished / "evaluations").iterdir()
    assert found.name == f"set-test-{STEP}"
    record = load(found / "evaluation.json")
    assert (record["step"], record["checkpoint"]) == (
        8,
        f"step 8 of 8 of an unfinished run ({STEP})",
    )
    for card in (tmp_path / "best/README.md", tmp_path / "all/README.md"):
        assert "step 8 of 8 of an unfinished run" in card.read_text()
    assert cli.main(["predict", str(run), str(few / "set"), "--cpu", "--checkpoint", "8"]) == 0
    assert f"step 8 of 8 of a finished run ({STEP})" in capsys.readouterr().err


def test_without_the_flag_an_unfinished_run_is_refused_with_the_flag(
    unfinished: Path, capsys: Captured
) -> None:
    assert cli.main(["predict", str(unfinished), "x.png"]) == 2
    said = capsys.readouterr().err
    assert "(interrupted at step 8): finish it with --resume auto, or use its newest check" in said
    assert said.endswith("with --checkpoint latest\n")


def test_a_damaged_checkpoint_is_skipped_by_latest_and_refused_by_its_name(
    unfinished: Path, tmp_path: Path, capsys: Captured
) -> None:
    newest = damaged(unfinished, 9)
    assert read_checkpoint_peers(unfinished, "latest", tmp_path / "a").step == 8
    said = capsys.readouterr().err
    assert "warning: " in said and said.endswith("skipping step-00000009\n")
    with pytest.raises(UsageError, match="state.json is damaged: .*; name another --checkpoint"):
        read_checkpoint_peers(unfinished, "9", tmp_path / "b")
    shutil.rmtree(newest)
    weights = unfinished / "checkpoints" / STEP / "resnet8-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(UsageError, match="resnet8-0.safetensors is damaged: .* is good"):
        read_checkpoint_peers(unfinished, "latest", tmp_path / "c")


def test_what_is_no_checkpoint_is_refused(unfinished: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="~nobodyx/y: there is no such home directory"):
        read_checkpoint_peers(unfinished, "~nobodyx/y", tmp_path / "scratch")
    for asked in ("7", "newest", str(tmp_path), str(tmp_path / "loop")):
        with pytest.raises(UsageError, match="no such checkpoint; it has those of steps 8: name"):
            read_checkpoint_peers(unfinished, asked, tmp_path / "scratch")
    with pytest.raises(UsageError, match=r"is a checkpoint: name its run, and .*--checkpoint 8"):
        read_trained_peers(unfinished / "checkpoints" / STEP)
    with pytest.raises(UsageError, match="few is not a run"):
        read_checkpoint_peers(tmp_path / "few", "latest", tmp_path / "scratch")
    config = load(unfinished / "config.json")
    (unfinished / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name != "class_names"})
    )
    with pytest.raises(UsageError, match="did not record its class names"):
        read_checkpoint_peers(unfinished, "latest", tmp_path / "scratch")
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UsageError, match=r"\(interrupted at step 8\) has no checkpoint yet"):
        read_checkpoint_peers(unfinished, "latest", tmp_path / "scratch")


def test_folders_of_another_kind_say_what_to_name(
    run: Path, unfinished: Path, tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_text("")
    (tmp_path / "onnx/config.json").write_text('{"architecture": "x"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"architecture": "x"}')
    (tmp_path / "compared/mutual").mkdir(parents=True)
    (tmp_path / "compared/mutual/seed-0").symlink_to(run.resolve())
    for name, text in {
        "onnx": "holds an exported ONNX file, which onnxruntime runs",
        "other": "does not describe a run: it has no config",
        "compared": r"holds 1 run\(s\): name one of mutual/seed-0",
    }.items():
        with pytest.raises(UsageError, match=text):
            read_trained_peers(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalisation", {"mean": [1], "std": [1, 1, 1]}),
        ("normalisation", {"mean": [0, 0, 0], "std": [0, 0, 0]}),
        ("normalisation", {"mean": [0, 0, 10**400], "std": [1, 1, 1]}),
        ("normalisation", ["mean", "std"]),
        ("grey_bits", "x"),
        ("grey_bits", 7),
        ("class_names", []),
        ("class_names", "x"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_entries_of_the_run_are_refused_where_they_are(
    unfinished: Path, tmp_path: Path, name: str, value: object
) -> None:
    file = unfinished / "config.json"
    file.write_text(json.dumps(load(file) | {name: value}))
    with pytest.raises(UsageError, match=f"^{file}: {name} (is|must)"):
        read_checkpoint_peers(unfinished, "latest", tmp_path / "scratch")


def test_records_of_another_kind_are_passed_over(unfinished: Path, tmp_path: Path) -> None:
    with open(unfinished / "metrics.jsonl", "a") as file:
        file.write("[" * 200_000 + '\n[3]\n{"event": "eval", "step": 8, "test": [3]}\n')
    peers = read_checkpoint_peers(unfinished, "latest", tmp_path / "scratch")
    assert peers.results["ensemble"] is None
    for recorded in ([], "fp8", {}):
        wrong = dataclasses.replace(peers, results={"mixed_precision": recorded})
        with pytest.raises(UsageError, match="its mixed_precision is recorded as"):
            _ = wrong.precision
