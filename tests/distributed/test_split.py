"""Split runs as users start them: what is written, what is sent, a cut link."""

import re
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import BIN, accelerate_launch, load, run_program, train

SMALL = "--dataset digits --image-size 16 --batch-size 9 --lr 0.001".split()


def test_a_split_run_writes_what_one_process_writes(tmp_path: Path) -> None:
    words = [*SMALL, "--cohort", "wrn_16_2", "resnet8*2", "--float64", "--max-steps", "4"]
    words += ["--placement", "split", "--val-fraction", "0.1"]
    assert train(tmp_path / "one", *words) == 0
    # A name that ends in a space is another folder.
    launch = accelerate_launch(2, "train.py")
    done = run_program(*launch, *words, "--output-dir", tmp_path / "two ")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load(tmp_path / folder / "results.json") for folder in ("one", "two "))
    assert one["placement"]["kind"] == "replicate"
    ranks = {"wrn_16_2-0": [0], "resnet8-0": [1], "resnet8-1": [1]}
    assert two["placement"] == {"kind": "split", "ranks": ranks}
    assert load(tmp_path / "two /config.json")["config"]["placement"] == "split"
    files = {
        folder: {
            str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*")
        }
        for folder in ("one", "two ")
    }
    assert files["one"] == files["two "]
    for peer, other in zip(one["peers"], two["peers"], strict=True):
        for part in ("test", "val"):
            assert peer[part]["top1"] == other[part]["top1"]
            assert peer[part]["nll"] == pytest.approx(other[part]["nll"], rel=1e-9)
        assert (peer["name"], peer["params"]) == (other["name"], other["params"])
        weights, others = (
            load_file(tmp_path / folder / "peers" / peer["name"] / "model.safetensors")
            for folder in ("one", "two ")
        )
        for key, value in weights.items():
            assert (value.double() - others[key].double()).abs().max() < 1e-9, key
    assert one["ensemble"]["nll"] == pytest.approx(two["ensemble"]["nll"], rel=1e-9)


def test_auto_prints_its_choice_and_the_reason(tmp_path: Path) -> None:
    launch = [BIN / "torchrun", "--nproc_per_node", "2", "train.py"]
    words = [*SMALL, "--cohort", "resnet8*2", "--max-steps", "1"]
    done = run_program(*launch, *words, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("placement: ")]
    assert len(said) == 1 and "per step predicted" in said[0]
    found = load(tmp_path / "run/results.json")["placement"]
    assert said[0].startswith(f"placement: {found['kind']}, ")
    assert f"Placement {found['kind']}: " in (tmp_path / "run" / "results.md").read_text()


def test_a_peer_that_stays_not_finite_ends_every_process_with_its_name(tmp_path: Path) -> None:
    launch = [BIN / "torchrun", "--nproc_per_node", "2", "train.py"]
    words = [*SMALL, "--cohort", "resnet8", "wrn_16_2", "--placement", "split", "--lr", "1e30"]
    words += ["--max-nonfinite", "3", "--output-dir", tmp_path / "run"]
    done = run_program(*launch, *words)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    reason = "was not finite, or its cross-entropy above 230, for 3 steps in a row"  # 100 ln 10
    assert re.match(rf"error: the loss of (resnet8|wrn_16_2)-0 {reason}", said[0])
    assert "--max-nonfinite 3" in said[0]
    assert '"skipped"' in (tmp_path / "run" / "metrics.jsonl").read_text()


# ---------------------------------------------------------------- the network


def sent_per_step(folder: Path, *words: str) -> tuple[list[float], float]:
    """What each of two hosts sends per step, and its seconds: a long run less a short one."""
    sent, seconds = [], []
    for steps in (5, 20):
        flags = [*words, "--max-steps", str(steps), "--output-dir", str(folder / str(steps))]
        started = time.monotonic()
        done = run_program("bash", "tests/two_hosts.sh", BIN / "accelerate", *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        seconds.append(time.monotonic() - started)
        sent.append([int(n) for n in re.findall(r"sent (\d+) bytes", done.stdout)])
    measured = [(long - short) / 15 for short, long in zip(*sent, strict=True)]
    return measured, max(0.0, seconds[1] - seconds[0]) / 15


@pytest.mark.parametrize("placement", ["split", "replicate"])
def test_the_bytes_sent_are_those_predicted(hosts: None, tmp_path: Path, placement: str) -> None:
    # 6,400 logits per step of each of two peers, as with 64 images of 100 classes. There is no
    # evaluation between: how many packets its logits take differs from run to run.
    words = "--dataset digits --image-size 8 --batch-size 640 --lr 0.001 --cohort resnet8*2".split()
    words += "--epochs 40 --eval-every 40ep --save-every 40ep --placement".split() + [placement]
    found, seconds = sent_per_step(tmp_path, *words)
    predicted = load(tmp_path / "20/results.json")["sent_bytes_per_step"]
    least = {"split": 640 * 10 * 4, "replicate": 2 * 4 * 75_000}[placement]
    heartbeats = 500 * seconds  # at most, of the processes and of their launchers
    for measured, payload in zip(found, predicted, strict=True):
        assert payload >= least
        assert payload <= measured <= 1.1 * payload + heartbeats


def test_a_cut_link_ends_both_hosts_with_an_error(hosts: None, tmp_path: Path) -> None:
    words = [*SMALL, "--cohort", "resnet8*2", "--placement", "split", "--timeout", "0.2"]
    started = time.monotonic()
    both = ["bash", "tests/two_hosts.sh", BIN / "accelerate", *words]
    metrics = str(tmp_path / "run/metrics.jsonl")
    done = run_program(*both, "--output-dir", tmp_path / "run", CUT_WHEN=metrics)
    # 12 seconds of waiting for the other, 10 at most of asking who is left; and the start.
    assert time.monotonic() - started < 90
    assert "exit codes: 1 1" in done.stdout
    for gone in (0, 1):
        assert done.stderr.count(f"error: rank {gone} stopped responding, so the run ends") == 1
    assert '"failed"' in (tmp_path / "run" / "status.json").read_text()
