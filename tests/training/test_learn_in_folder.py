"""``learn`` in the folder of a run: killed, resumed bit for bit, finished, exported."""

import signal
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import dml_accel
from dml_accel import UsageError, cli
from dml_accel.core.files import read_json
from tests.helpers import ROOT, assert_same_state, run_program
from tests.marks import needs_onnx_exporter
from tests.training import own_script


def test_a_killed_run_of_ones_own_resumes_bit_for_bit_and_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-m", "tests.training.own_script", tmp_path / "run", 7]
    killed = run_program(*words)
    assert killed.returncode == -signal.SIGKILL and ROOT.is_dir()
    resumed, straight, again = own_script.nets(), own_script.nets(), own_script.nets()
    records = own_script.train(resumed, str(tmp_path / "run"))
    assert [record.step for record in records] == [7, 8, 9, 10, 10]  # from the checkpoint of 6
    rates = [record.lr for record in records if isinstance(record, dml_accel.StepRecord)]
    assert rates == [1e-3 * 0.9**step for step in range(6, 10)]
    own_script.train(straight, str(tmp_path / "straight"))
    for name, net in resumed.items():
        assert_same_state(net.state_dict(), straight[name].state_dict())
    # A finished run gives the networks its weights.
    (record,) = own_script.train(again, str(tmp_path / "run"))
    assert isinstance(record, dml_accel.EvaluationRecord)
    assert_same_state(again["wide"].state_dict(), straight["wide"].state_dict())
    exported = own_script.Net(4)
    dml_accel.export(tmp_path / "run", peer="wide", to=tmp_path / "out", network=exported)
    assert_same_state(exported.state_dict(), straight["wide"].state_dict())
    own = read_json(tmp_path / "out" / "config.json")["dml_accel"]["own_network"]
    assert own["input_shape"] == [3, 8, 8] and torch.is_tensor(exported.head[2].weight)
    with pytest.raises(UsageError, match="does not fit network=, a Net"):
        dml_accel.export(
            tmp_path / "run", peer="wide", to=tmp_path / "x", network=own_script.Net(3)
        )
    assert not (tmp_path / "x").exists()
    # The commands cannot build the modules, and say so; a report needs none.
    for words in ("evaluate", "predict", "export"):
        flags = {"predict": ["x.png"], "export": ["--peer", "wide", "--to", str(tmp_path / "x")]}
        assert cli.main([words, str(tmp_path / "run"), *flags.get(words, [])]) == 2
        assert "a tests.training.own_script.Net that learn has trained" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "run"), "--analyse", "0"]) == 0
    assert "narrow" in (tmp_path / "run/report.html").read_text()


@needs_onnx_exporter
def test_a_module_of_ones_own_is_exported_to_onnx(tmp_path: Path) -> None:
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.rand(8, 3, 4, 4)
    flags = {"epochs": 1, "batch_size": 4, "lr": 0.05, "cpu": True, "output_dir": tmp_path / "run"}
    data = images, torch.arange(8) % 3
    list(dml_accel.learn({"only": net}, data, data, **flags))
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    dml_accel.export(tmp_path / "run", to=tmp_path / "out", network=fresh, format="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found), net.eval()(images), rtol=1e-4, atol=1e-5)
