"""The report: what it finds, computes and shows, and that it stands alone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageStat

from dml_accel import cli
from dml_accel.analysis import methods, page
from dml_accel.analysis import runs as history
from dml_accel.analysis.probes import NOISE, analysis
from dml_accel.analysis.runs import Run
from dml_accel.core.config import Config, UsageError

TINY = "--dataset digits --image-size 16 --batch-size 8 --lr 0.05 --cpu".split()
STEPS = "--max-steps 6 --eval-every 2".split()
EVERYTHING = 10**6  # images


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods over two seeds, and a single network alone."""
    folder = tmp_path_factory.mktemp("report")
    pair = ["--cohort", "resnet8*2", "--seeds", "2", "--output-dir", str(folder / "pair")]
    assert cli.main(["compare", *TINY, *STEPS, *pair]) == 0
    alone = ["--cohort", "resnet8", "--output-dir", str(folder / "alone")]
    assert cli.main(["train", *TINY, *STEPS, *alone]) == 0
    return folder


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    assert cli.main(["report", str(runs), "--analyse", "50"]) == 0
    return runs / "report.html"


# ---------------------------------------------------------------- what is found


def test_runs_are_found_once_and_grouped_by_what_may_be_compared(runs: Path) -> None:
    found = history.find([runs, runs / "pair"])
    assert len(found) == 5
    groups = history.comparable(found)
    assert sorted(len(group) for group in groups) == [1, 4]
    methods = history.by_method(max(groups, key=len))
    assert [(name, len(ours)) for name, ours in methods.items()] == [
        ("independent", 2),
        ("mutual", 2),
    ]


@pytest.mark.parametrize(
    ("changes", "peers", "method"),
    [
        ({}, 2, "mutual"),
        ({"kl_weight": 0.0}, 2, "independent"),
        ({}, 1, "independent"),
        ({"frozen_peers": ("x",)}, 1, "distill, of vit (01234567)"),
        ({"frozen_peers": ("x",)}, 2, "mutual, of vit (01234567)"),
        ({"frozen_peers": ("x",), "links": "frozen"}, 2, "distill, of vit (01234567)"),
        ({"update": "sequential", "target": "mean-logit"}, 2, "sequential, target mean-logit"),
        ({"kl_weight": 0.0, "update": "official"}, 2, "independent, official"),
        ({"kl_weight": 0.0, "temperature": 3.0}, 2, "independent"),
        ({"update": "sequential"}, 2, "sequential"),
        ({"target": "mean-prob"}, 2, "mean-prob"),
        ({"labelled_fraction": 0.2}, 2, "semi"),
        ({"labelled_fraction": 0.2, "kl_images": "labelled"}, 2, "mutual"),
        ({"links": "ring", "temperature": 3.0}, 3, "mutual, links ring, temperature 3.0"),
    ],
    ids=str,
)
def test_a_configuration_has_the_name_of_its_method(changes: dict, peers: int, method: str) -> None:
    known = {"arch": "vit", "sha256": "0123456789"}
    teachers = {"frozen-0": known} if "frozen_peers" in changes else {}
    assert methods.method_of(Config(**changes), peers, teachers) == method


def test_curves_are_means_over_seeds_by_hand(tmp_path: Path) -> None:
    def run(seed: int, top1: float, losses: list[float]) -> Run:
        events = [
            {"event": "step", "epoch": 0, "steps": n + 1, "peers": {"a": {"kl": loss}}}
            for n, loss in enumerate(losses)
        ]
        events.append({"event": "eval", "step": 10, "test": {"ensemble": {"top1": top1}}})
        description = {"images": {"train": 80}, "peers": [{"name": "a-0"}]}
        return Run(tmp_path, Config(seed=seed, batch_size=16), description, {}, events)

    both = [run(0, 0.2, [1.0, 4.0]), run(1, 0.4, [2.0, 2.0])]
    ((epoch, top1),) = history.over_epochs(both, lambda test: test["ensemble"]["top1"])
    assert (epoch, top1.n, top1.mean) == (2.0, 2, pytest.approx(0.3))  # 5 steps an epoch
    ((epoch, kl),) = history.loss_over_epochs(both, "kl")
    assert (epoch, kl.mean) == (1, pytest.approx((3.0 + 2.0) / 2))  # (1 x 1 + 2 x 4) / 3


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
def test_a_run_that_cannot_be_read_is_named(runs: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(UsageError, match=str(tmp_path / "run")):
        history.find([tmp_path])


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "there is no finished run in or below" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "x")]) == 2
    assert "is no folder; name one of runs" in capsys.readouterr().err


# ---------------------------------------------------------------- what is computed


def test_without_noise_the_analysis_finds_what_the_run_found(runs: Path) -> None:
    (run,) = history.find([runs / "pair/mutual/seed-0"])
    found = analysis(run, EVERYTHING)
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
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = history.find([runs / "alone"])
    from dml_accel.analysis import probes as module

    seen: list[dict[str, torch.Tensor]] = []
    whole = module._logits

    def noted(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append({name: weight.clone() for name, weight in net.named_parameters()})
        return whole(net, x)

    monkeypatch.setattr(module, "_logits", noted)
    analysis(run, 20)
    still, last = seen[1], seen[-1]
    moved = torch.cat([(last[name] - still[name]).flatten() for name in still])
    assert moved.std().item() == pytest.approx(NOISE[-1], rel=0.02)  # of 75,000 weights
    assert abs(moved.mean().item()) < 0.001


def test_an_analysis_is_made_once_for_the_same_weights(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = shutil.ignore_patterns("analysis.json")  # other tests have made one of more images
    shutil.copytree(runs / "alone", tmp_path / "run", ignore=without)
    (run,) = history.find([tmp_path])
    first = analysis(run, 10)
    with monkeypatch.context() as patch:
        patch.setattr("dml_accel.analysis.probes._analyse", None)
        assert analysis(run, 10) == json.loads(json.dumps(first))
    (tmp_path / "run/analysis.json").write_text("{")
    assert analysis(run, 10) == first  # damaged: made again, the same
    assert analysis(run, 11)["images"]["test"] == 11


# ---------------------------------------------------------------- what is shown


def test_the_page_tells_what_the_table_tells(report: Path, runs: Path) -> None:
    text = report.read_text()
    assert "5 finished runs" in text and "resnet8 + resnet8 on digits" in text
    record = json.loads((runs / "pair/results.json").read_text())
    for summary in record["cohorts"][0]["summaries"]:
        assert f"{100 * summary['top1']['mean']:.2f}" in text
    for title in ("Training loss under weight noise", "Calibration", "Agreement of the peers"):
        assert title in text
    assert "exactly the gradient of Deep Mutual Learning" in text
    assert "accuracy against the size of the cohort" in text  # K = 1 and 2


def test_the_page_loads_nothing_and_runs_nothing(report: Path) -> None:
    text = report.read_text()
    links = re.findall(r"(?:src|href|srcset)=\"([^\"]{0,5})", text)
    assert links and all(link.startswith(("data:", "#s")) for link in links)
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_what_a_run_says_is_text(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run")
    path = tmp_path / "run/config.json"
    description = json.loads(path.read_text()) | {"command": "<script>alert(1)</script>"}
    description["peers"][0]["name"] = "<b>net</b>-0"
    path.write_text(json.dumps(description))
    results = json.loads((tmp_path / "run/results.json").read_text())
    results["peers"][0]["name"] = "<b>net</b>-0"
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    page.write_page(history.find([tmp_path]), tmp_path / "x.html", 0)
    text = (tmp_path / "x.html").read_text()
    assert "<script" not in text and "<b>" not in text and "&lt;script&gt;" in text


def test_without_weights_there_is_a_page_all_the_same(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run", ignore=shutil.ignore_patterns("peers"))
    page.write_page(history.find([tmp_path]), tmp_path / "x.html", 100)
    assert "weight noise" not in (tmp_path / "x.html").read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(
    report: Path, tmp_path: Path, theme: str, width: int
) -> None:
    picture = tmp_path / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --hide-scrollbars"
    flags += f" --enable-logging=stderr --window-size={width},1600"
    flags += f" --blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    flags += f" --user-data-dir={tmp_path}/profile --screenshot={picture}"
    done = subprocess.run(
        ["chromium", *flags.split(), report.as_uri()], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    with Image.open(picture) as image:
        assert image.size == (width, 1600)
        brightness = ImageStat.Stat(image.convert("L")).mean[0]
    assert brightness < 70 if theme == "dark" else brightness > 200
