"""Trained peers are read, or refused with the reason."""

import dataclasses
import fcntl
import json
import shutil
from pathlib import Path

import pytest

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.inference import load as inference_load
from dml_accel.inference.load import Networks, read_trained_peers
from dml_accel.models.timm_config import input_entries
from tests.helpers import load
from tests.inference.conftest import CPU, PEERS, SIZE

CUT = input_entries(Geometry(SIZE, SIZE + 4), Normalisation.identity())
Captured = pytest.CaptureFixture[str]


def test_peers_of_several_runs_with_one_name_are_all_read(run: Path, tmp_path: Path) -> None:
    peer = sorted((run / "peers").iterdir())[0]
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(peer.resolve())
    assert list(read_trained_peers(tmp_path).folders) == ["a", "b"]


def test_a_folder_without_peers_is_refused(tmp_path: Path, capsys: Captured) -> None:
    for path, text in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no trained peer")):
        assert cli.main(["evaluate", str(path), "--cpu"]) == 2
        assert text in capsys.readouterr().err


def test_a_run_without_one_of_its_peers_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/peers/resnet8-1")
    with pytest.raises(UsageError, match="folders in peers differ: resnet8-1"):
        read_trained_peers(tmp_path / "run")


def test_an_unfinished_run_is_refused_with_its_state(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "results.json").unlink()  # as while a run is made longer
    assert cli.main(["evaluate", str(copy), "--cpu"]) == 2
    assert "run is not finished (done at step 8): finish it with --res" in capsys.readouterr().err
    (copy / "status.json").write_text('{"status": "running", "step": 0}')
    assert cli.main(["predict", str(copy), "x.png"]) == 2
    assert "(interrupted at step 8)" in capsys.readouterr().err  # as far as its checkpoint
    (copy / "status.json").write_text('{"status": "running", "step": 9}')
    shutil.rmtree(copy / "peers/resnet8-0")  # as when it was killed before its end
    assert cli.main(["predict", str(copy), "x.png"]) == 2
    assert "run is not finished (interrupted at step 9)" in capsys.readouterr().err
    with open(copy / "run.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.main(["predict", str(copy), "x.png"]) == 2
    assert "run is not finished (running at step 9)" in capsys.readouterr().err


def test_a_peer_that_cannot_be_read_is_refused(run: Path, tmp_path: Path, capsys: Captured) -> None:
    peer = shutil.copytree(run / "peers/resnet8-0", tmp_path / "resnet8-0")
    (peer / "config.json").write_text('{"num_classes": NaN}')
    assert cli.main(["export", str(peer), "--to", "x"]) == 2
    assert "resnet8-0/config.json is not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "key", "value", "text"),
    [
        (PEERS, "label_names", ["x", "y"], "has 2 class names for"),
        (
            PEERS[1:2],
            "num_classes",
            3,
            "cannot form an ensemble, because they differ in the number",
        ),
        (PEERS[2:], "label_names", [], "differ in class names; name one of their folders"),
        (PEERS[:1], "pretrained_cfg", CUT, "differ in how images are resized and cut"),
    ],
)
def test_peers_that_do_not_fit_together_are_refused(
    run: Path, tmp_path: Path, changed: list[str], key: str, value: object, text: str
) -> None:
    copy = shutil.copytree(run / "peers", tmp_path / "peers")
    for peer in changed:
        config = load(copy / peer / "config.json") | {key: value}
        (copy / peer / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=text):
        read_trained_peers(copy)


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_help_shows_examples(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"dml-accel {command} runs/pair" in capsys.readouterr().out


@pytest.mark.parametrize("tf32", [True, False])
def test_networks_compute_with_the_arithmetic_of_their_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    found = []
    monkeypatch.setattr(inference_load, "set_arithmetic", lambda device, tf32: found.append(tf32))
    peers = read_trained_peers(run)
    Networks(dataclasses.replace(peers, config={**peers.config, "tf32": tf32}), CPU)
    assert found == [tf32]
