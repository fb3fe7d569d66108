"""Two hosts on one machine: the steps of one process, what is sent, a cut link."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dml_accel.core.config import Config
from dml_accel.models.spec import parse_cohort
from tests.helpers import BIN, build_peer, in_turn, load, run_program, train

HOSTS = ["bash", "tests/two_hosts.sh", BIN / "accelerate"]
SMALL = "--dataset digits --image-size 8 --batch-size 9 --lr 0.001 --cohort resnet8*2".split()
STEPS = [*SMALL, "--placement", "replicate", "--float64", "--max-steps", "5"]
# 6,400 logits per step of each of two peers, as with 64 images of 100 classes. There is no
# evaluation between: how many packets its logits take differs from run to run.
COUNTED = "--dataset digits --image-size 8 --batch-size 640 --lr 0.001 --cohort resnet8*2 ".split()
COUNTED += "--epochs 40 --eval-every 40ep --save-every 40ep".split()


@pytest.fixture(scope="module")
def two(hosts: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Any]]:
    """Run all that is compared, one after another: the folder, what was said, how it went."""
    folder = tmp_path_factory.mktemp("hosts")
    runs = {"steps": STEPS}
    for placement in ("split", "replicate"):
        for steps in (2, 12):
            words = [*COUNTED, "--placement", placement, "--max-steps", str(steps)]
            runs[f"{placement}-{steps}"] = words
    done, found = in_turn(HOSTS, folder, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, found


def test_two_hosts_take_the_steps_of_one_process(
    two: tuple[Path, str, list[Any]], tmp_path: Path
) -> None:
    folder, said, found = two
    assert train(tmp_path / "one", *STEPS) == 0
    folders = {"one": tmp_path / "one", "two": folder / "steps"}
    config = Config(**load(folders["two"] / "config.json")["config"])
    start = build_peer(parse_cohort(["resnet8*2"])[0], config, classes=10)
    moved = load_file(folders["two"] / "peers" / "resnet8-0" / "model.safetensors")
    for key, weight in start.named_parameters():
        assert not torch.equal(moved[key], weight), key
    assert "10.77.0.1/24" in said and "10.77.0.2/24" in said
    for host in found:  # every step's gradients were sent
        assert host["steps"]["sent"] > 5 * 8 * 75_290
    results = {name: load(path / "results.json") for name, path in folders.items()}
    assert (results["one"]["world_size"], results["two"]["world_size"]) == (1, 2)
    ranks = {f"resnet8-{i}": [0, 1] for i in (0, 1)}
    assert results["two"]["placement"] == {"kind": "replicate", "ranks": ranks}
    for name in ranks:
        one, other = (
            load_file(path / "peers" / name / "model.safetensors") for path in folders.values()
        )
        for key, value in one.items():
            assert (other[key].double() - value.double()).abs().max() < 1e-9, key


@pytest.mark.parametrize("placement", ["split", "replicate"])
def test_the_bytes_sent_are_those_predicted(
    two: tuple[Path, str, list[Any]], placement: str
) -> None:
    folder, _, found = two
    predicted = load(folder / f"{placement}-12/results.json")["sent_bytes_per_step"]
    least = {"split": 640 * 10 * 4, "replicate": 2 * 4 * 75_000}[placement]
    for host, payload in zip(found, predicted, strict=True):
        short, long = (host[f"{placement}-{steps}"] for steps in (2, 12))
        measured = (long["sent"] - short["sent"]) / 10
        # At most, of the processes and of their launchers.
        heartbeats = 500 * max(0.0, long["seconds"] - short["seconds"]) / 10
        assert payload >= least
        assert payload <= measured <= 1.1 * payload + heartbeats


def test_a_cut_link_ends_both_hosts_with_an_error(hosts: None, tmp_path: Path) -> None:
    words = [*SMALL, "--placement", "split", "--timeout", "0.2"]
    metrics = str(tmp_path / "run/metrics.jsonl")
    both = [*HOSTS, "train.py", *words, "--output-dir", tmp_path / "run"]
    done = run_program(*both, CUT_WHEN=metrics)
    status = load(tmp_path / "run" / "status.json")
    assert status["status"] == "failed"
    cut = datetime.fromisoformat(done.stdout.partition("link cut: ")[2].splitlines()[0])
    # 12 seconds of waiting for the other, 10 at most of asking who is left.
    assert (datetime.fromisoformat(status["time"]) - cut).total_seconds() < 45
    assert "exit codes: 1 1" in done.stdout
    for gone in (0, 1):
        assert done.stderr.count(f"error: rank {gone} stopped responding, so the run ends") == 1
