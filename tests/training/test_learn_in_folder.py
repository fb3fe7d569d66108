"""``learn`` in the folder of a run: killed, resumed bit for bit, finished, exported."""

import signal
import sys
from pathlib import Path

import torch

import dml_accel
from dml_accel.core.files import read_json
from tests.helpers import ROOT, assert_same_state, run_program
from tests.training import own_script


def test_a_killed_run_of_ones_own_resumes_bit_for_bit_and_is_exported(tmp_path: Path) -> None:
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
