"""Exported networks compute the same elsewhere: timm and ONNX runtimes without this package."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.inference import onnx
from dml_accel.inference.export import _onnx_config, select_peers
from dml_accel.inference.load import Networks, read_trained_peers
from tests.helpers import load
from tests.inference.conftest import CPU, PEERS, logits_of
from tests.marks import needs_onnx_exporter

Captured = pytest.CaptureFixture[str]


def run_elsewhere(code: str, *words: str) -> None:
    """Run code in another process, outside of this tree."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


def assert_agree(found: torch.Tensor, expected: torch.Tensor, few: Path) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    labels = torch.from_numpy(np.load(few / "few.npz")["labels"])
    assert (found.argmax(1) == labels).sum() == (expected.argmax(1) == labels).sum()


_TIMM = """
import json, sys, numpy as np, timm, torch
folder, few, to = sys.argv[1:]
config = json.load(open(f"{folder}/config.json"))["pretrained_cfg"]
mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
images = torch.from_numpy(np.load(few)["images"]).permute(0, 3, 1, 2) / 255
net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    np.save(to, net((images - mean) / std).numpy())
assert "dml_accel" not in sys.modules
"""


def test_timm_alone_loads_the_safetensors(run: Path, few: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep/er/net"
    words = ["--peer", "test_resnet-0", "--to", str(target)]
    assert cli.main(["export", str(run), *words]) == 0
    run_elsewhere(_TIMM, str(target), str(few / "few.npz"), str(tmp_path / "found.npy"))
    expected = logits_of(run / "peers/test_resnet-0", few)[0]
    assert_agree(torch.from_numpy(np.load(tmp_path / "found.npy")), expected, few)
    assert load(target / "config.json") == load(run / "peers/test_resnet-0/config.json")
    assert [path.name for path in target.parent.iterdir()] == ["net"]  # nothing temporary is left


def test_an_ensemble_is_a_folder_for_each_peer(run: Path, few: Path, tmp_path: Path) -> None:
    target = tmp_path / "all"
    target.mkdir()
    assert cli.main(["export", str(run), "--peer", "ensemble", "--to", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["README.md", *PEERS]
    net = timm.create_model(f"local-dir:{target / 'resnet8-1'}", pretrained=True)
    for name, weight in net.state_dict().items():
        assert torch.equal(
            weight, Networks(read_trained_peers(run), CPU).modules[1].state_dict()[name]
        )
    assert torch.equal(logits_of(target, few), logits_of(run, few))  # as the run itself
    card = ModelCard.load(target / "README.md").data
    top1 = load(run / "results.json")["ensemble"]["top1"]
    assert (card.library_name, card.pipeline_tag) == ("timm", "image-classification")
    assert card.eval_results[0].metric_value == top1


_ONNX = """
import json, os, sys, numpy as np
folder, few, to = sys.argv[1:]
os.chdir(folder)
names = [f"{to}-{row}.png" for row in range(len(np.load(few)["images"]))]
from PIL import Image
for name, image in zip(names, np.load(few)["images"]):
    Image.fromarray(image).save(name)
code = open("README.md").read().split("```python")[1].split("```")[0]
exec(code.replace('["photo.jpg"]', repr(names)))  # the card's own code
np.save(to, outputs)
(one,) = session.run(None, {"input": ((images[:1] / 255 - mean) / std)})
assert one.shape == outputs[:1].shape and abs(one - outputs[:1]).max() < 1e-4
assert not {"torch", "timm", "dml_accel"} & set(sys.modules)
"""


@needs_onnx_exporter
@pytest.mark.parametrize("peer", ["resnet8-0", "ensemble"])
def test_onnx_alone_computes_what_torch_does(
    run: Path, few: Path, tmp_path: Path, peer: str, capsys: Captured
) -> None:
    target = tmp_path / "net"
    words = ["--peer", peer, "--format", "onnx", "--to", str(target)]
    assert cli.main(["export", str(run), *words]) == 0
    assert "largest difference to torch" in capsys.readouterr().out
    assert sorted(p.name for p in target.iterdir()) == ["README.md", "config.json", "model.onnx"]
    run_elsewhere(_ONNX, str(target), str(few / "few.npz"), str(tmp_path / "found.npy"))
    expected = logits_of(run, few)[0]
    if peer == "ensemble":
        expected = logits_of(run, few).double().softmax(-1).mean(0).log()
    assert_agree(torch.from_numpy(np.load(tmp_path / "found.npy")), expected, few)
    config = load(target / "config.json")
    theirs = load(run / "peers/resnet8-0/config.json")
    assert config["label_names"] == theirs["label_names"]
    assert config["onnx"]["output"]["name"] == ("log_mean_posterior", "logits")[peer != "ensemble"]
    assert ModelCard.load(target / "README.md").data.library_name == "onnx"


@pytest.mark.parametrize("grey_bits", [None, 12])
def test_the_onnx_config_holds_the_depth_of_grey_images(run: Path, grey_bits: int | None) -> None:
    peers = read_trained_peers(run)
    first = dataclasses.replace(peers.folders[PEERS[0]], grey_bits=grey_bits)
    found = _onnx_config(peers, first, onnx.LOGITS)
    assert found.get("dml_accel") == (grey_bits and {"grey_bits": grey_bits})


def test_the_best_peer_is_that_of_the_validation_split(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(run, tmp_path / "run")
    results = load(tmp_path / "run/results.json")
    for peer in results["peers"]:
        peer["val"]["top1"] = 0.5 if peer["name"] == "resnet8-1" else 0.4
        peer["test"]["top1"] = 0.1 if peer["name"] == "resnet8-1" else 0.9
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    assert select_peers(read_trained_peers(tmp_path / "run"), "best")[1] == "resnet8-1"
    for peer, nll in zip(results["peers"], (0.7, 0.6, 0.8), strict=True):  # breaks a tie
        peer["val"] |= {"top1": 0.5, "nll": nll}
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    best = results["peers"][1]["name"]
    assert select_peers(read_trained_peers(tmp_path / "run"), "best")[1] == best
    printed = capsys.readouterr().err
    assert f"best is {best}: " in printed and f"{best} 50.00% (NLL 0.6000)" in printed
    results["peers"][0]["val"] = None
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    with pytest.raises(
        UsageError, match="has none .the test split is for reporting.: train with --val"
    ):
        select_peers(read_trained_peers(tmp_path / "run"), "best")


@needs_onnx_exporter
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "mine").write_text("")
    for words, text in (
        (["--to", str(full), "--peer", "resnet8-0"], "is not empty; name a new folder"),
        (["--to", str(full / "mine"), "--peer", "resnet8-0"], "is not a folder; name a new one"),
        (["--to", str(full / "mine/x"), "--peer", "resnet8-0"], "cannot be created or written"),
        (["--to", str(new)], "has 3 peers: choose with --peer ensemble, best or one of resnet8-0"),
        (["--to", str(new), "--peer", "x"], "has no such peer; it has resnet8-0, resnet8-1"),
    ):
        assert cli.main(["export", str(run), *words]) == 2
        assert text in capsys.readouterr().err
    words = ["export", str(run), "--peer", "resnet8-0", "--format", "onnx", "--to", str(new)]
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "LARGEST_DIFFERENCE", 0.0)
        assert cli.main(words) == 2
        assert "model.onnx differ from torch by" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert cli.main(words) == 2
        assert "pip install onnx onnxruntime onnxscript" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
