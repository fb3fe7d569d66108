"""The README's examples: those in Python run, and every command that it shows can be read."""

import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dml_accel import cli
from dml_accel import parser as flags
from dml_accel.core.config import Config
from dml_accel.models import spec as cohort

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = ("python train.py ", "dml-accel ", "accelerate launch train.py ")


def blocks(word: str) -> str:
    """Return the one block of Python that holds a word."""
    found = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if word in block]
    assert len(found) == 1, word
    return found[0]


def commands() -> list[list[str]]:
    """Return the words of every command of ours that the README shows, without its program."""
    found = []
    for line in README.splitlines():
        program = next((p for p in PROGRAMS if line.startswith("    " + p)), None)
        if program:
            words = shlex.split(line.strip().removeprefix(program), comments=True)
            found.append(words if program == "dml-accel " else ["train", *words])
    return found


def test_a_trained_peer_is_loaded_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--cohort resnet8 --dataset digits --image-size 16 --batch-size 8 --max-steps 1 --cpu"
    assert cli.main(["train", *words.split(), "--output-dir", "runs/x"]) == 0
    names: dict = {}
    exec(blocks("local-dir:"), names)
    assert not names["net"].training and names["net"].num_classes == 10


def test_a_network_of_ones_own_is_trained_and_loaded_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(blocks("register_model"))
    mine = importlib.import_module("mine")
    words = "--cohort timm:pebble resnet8 --dataset digits --image-size 16 --batch-size 16 --cpu"
    words = ["train", *words.split(), "--max-steps", "2", "--output-dir", "runs/mine"]
    assert mine.dml_accel.cli.main(words) == 0
    folder = tmp_path / "runs/mine/peers/pebble-0"
    net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert mine.dml_accel.cli.main(["evaluate", "runs/mine", "--cpu"]) == 0


def test_networks_of_ones_own_learn_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks("dml_accel.learn("), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3", "4"]
    # Two small networks know nine digits of ten after five epochs.
    assert names["record"].test["ensemble"]["top1"] > 0.88
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_python_that_is_not_run() -> None:
    assert README.count("```python") == 4  # that of a data set is run where sets are read


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_can_be_read(words: list[str]) -> None:
    values = flags.parse(words)
    if words[0] not in ("train", "compare", "plan"):
        return
    fields = Config.from_dict({n: v for n, v in values.items() if n in Config.__annotations__})
    assert cohort.parse(fields.cohort)


def test_the_plan_that_is_shown_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands() if words[0] == "plan"]
    assert cli.main(words) == 0
    assert "--placement auto: " in capsys.readouterr().out


def test_a_trained_network_is_used_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--cohort resnet8*2 --dataset digits --batch-size 16 --max-steps 2 --val-fraction 0.1"
    assert cli.main(["train", *words.split(), "--cpu", "--output-dir", "runs/pair"]) == 0
    for name in ("photo.png", "folder/a.png", "more/deep/b.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "green").save(name)
    section = README.partition("## Use a trained network")[2].partition("\n## ")[0]
    shown = [line.strip() for line in section.splitlines() if "dml-accel " in line[:60]]
    assert len(shown) == 6
    for line in shown:
        _, piped, command = line.rpartition(" | ")
        if piped:
            monkeypatch.setattr("sys.stdin", io.StringIO("folder/a.png\n"))
        words = shlex.split(command, comments=True)[1:]
        assert cli.main(words) == 0, line
    said = capsys.readouterr().out
    assert all(name in said for name in ("photo.png", "folder/a.png", "more/deep/b.jpg"))
    assert Path("measured/confusion.png").exists()
    assert Path("exported/best/model.safetensors").exists()
    assert Path("exported/ensemble/model.onnx").exists()
