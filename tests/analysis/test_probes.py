"""The analysis of trained networks repeats the run's numbers, and is made once."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dml_accel.analysis import probes
from dml_accel.analysis.probes import NOISE, analyse
from dml_accel.analysis.runs import Run, read_run

ALL_IMAGES = 10**6


def without_analysis(folder: Path, tmp_path: Path) -> Run:
    """A copy of a run whose analysis no other test has made before."""
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("analysis.json"))
    return read_run(tmp_path / "run")


def test_without_noise_the_analysis_finds_what_the_run_found(runs: Path) -> None:
    run = read_run(runs / "pair/mutual/seed-0")
    found = analyse(run, ALL_IMAGES)
    assert found["images"] == {"train": 1437, "test": 360}
    last = list(run.evaluations())[-1][1]
    for peer in run.results["peers"]:
        ours = found["peers"][peer["name"]]
        still = ours["noise"][0]
        assert still["sigma"] == 0
        assert still["test_top1"] == pytest.approx(peer["test"]["top1"])
        assert still["test_loss"] == pytest.approx(peer["test"]["nll"], rel=1e-5)
        assert ours["entropy"]["mean"] == pytest.approx(last["entropy"][peer["name"]], rel=1e-5)
        gaps = [abs(b["share"] * (b["accuracy"] - b["confidence"])) for b in ours["calibration"]]
        assert sum(gaps) == pytest.approx(peer["test"]["ece"], rel=1e-4)
        assert sum(b["share"] for b in ours["calibration"]) == pytest.approx(1)
    disagreement = found["disagreement"]["resnet8-0"]["resnet8-1"]
    assert disagreement == pytest.approx(1 - run.results["agreement"])


def test_noise_moves_every_weight_by_as_much_as_it_says(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = without_analysis(runs / "alone", tmp_path)
    seen: list[dict[str, torch.Tensor]] = []
    whole = probes._logits

    def noted(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append({name: weight.clone() for name, weight in net.named_parameters()})
        return whole(net, x)

    monkeypatch.setattr(probes, "_logits", noted)
    analyse(run, 20)
    still, last = seen[1], seen[-1]
    moved = torch.cat([(last[name] - still[name]).flatten() for name in still])
    assert moved.std().item() == pytest.approx(NOISE[-1], rel=0.02)  # of 75,000 weights
    assert abs(moved.mean().item()) < 0.001


def test_an_analysis_is_made_once_for_the_same_weights(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = without_analysis(runs / "alone", tmp_path)
    first = analyse(run, 10)
    with monkeypatch.context() as patch:
        patch.setattr(probes, "_analyse", None)
        assert analyse(run, 10) == json.loads(json.dumps(first))
    (tmp_path / "run/analysis.json").write_text("{")
    assert analyse(run, 10) == first  # damaged: made again, the same
    assert analyse(run, 11)["images"]["test"] == 11
