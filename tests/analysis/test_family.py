"""The whole family of methods in comparisons: what each run is, and the method of two stages."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dml_accel import cli
from dml_accel.analysis import compare
from dml_accel.analysis.methods import BASELINE, METHODS
from dml_accel.analysis.passes import million_passes
from dml_accel.analysis.planned import plan_runs
from dml_accel.analysis.runs import find_runs, group_comparable
from dml_accel.analysis.statistics import comparison_record
from dml_accel.core.config import Config
from dml_accel.core.errors import DivergedError
from tests.helpers import DIGITS, assert_same_state, events, load, train

PUPIL, TEACHERS = "ensemble-distill/seed-0", "ensemble-distill/seed-0-teachers"
# Not in the order of METHODS. One of each kind: of update, target, loss and links, and two stages.
TRAINED = "official independent kdcl-naive dkd okddip-leader semi distill ensemble-distill".split()


def compared(folder: Path, *words: str) -> int:
    return cli.main(["compare", *DIGITS, "--seeds", "1", "--output-dir", str(folder), *words])


def state(folder: Path) -> dict[str, Any]:
    return load_file(folder / "peers/resnet8-0/model.safetensors")


# ---------------------------------------------------------------- every method


def test_every_method_is_its_flags() -> None:
    config = Config(labelled_fraction=0.5, frozen_peers=("x",), cohort=("2",))
    plan = plan_runs(config, [config.cohort], [*METHODS], 1)
    configs = {run.method: run.config_in(Path("c")).as_dict() for run in plan if run.is_last_stage}
    assert [*configs] == [*METHODS]

    def unusual(name: str, usual: object) -> dict[str, object]:
        values = {method: one[name] for method, one in configs.items()}
        return {method: value for method, value in values.items() if value != usual}

    assert unusual("update", "simultaneous") == {
        "sequential": "sequential",
        "official": "official",
        "switokd": "switch",
    }
    assert unusual("target", "peers") == {
        "mean-prob": "mean-prob",
        "mean-logit": "mean-logit",
        "mean-logit-all": "mean-logit-all",
        "kdcl-naive": "best",
        "kdcl-minlogit": "min-logit",
        "okddip-leader": "mean-logit",
        "ensemble-distill": "mean-prob",
    }
    divergences = ("reverse-kl", "jeffreys", "jsd", "renyi", "dkd", "nkd", "ttm", "wttm")
    assert unusual("divergence", "kl") == {name: name for name in divergences}
    assert not unusual("divergence_args", [])  # the defaults are those of the sources
    assert unusual("temperature", 1.0) == {
        "mean-logit-all": 3.0,
        "kdcl-naive": 2.0,
        "kdcl-minlogit": 2.0,
        "dkd": 4.0,
        "standardized": 2.0,
        "okddip-leader": 3.0,
    }
    weights = {"independent": 0.0, "ttm": 45.0, "wttm": 45.0, "standardized": 9.0}
    assert unusual("kl_weight", 1.0) == weights
    assert unusual("ce_weight", 1.0) == {"standardized": 0.1}
    assert unusual("standardize", False) == {"standardized": True}
    assert unusual("gate", "none") == {"correct-gate": "correct"}
    # Of 200 epochs: 1/12, and 80 of 300.
    assert unusual("kl_warmup", 0) == {"dkd": 17, "okddip-leader": 53}
    assert unusual("kl_ramp", "linear") == {"okddip-leader": "sigmoid"}
    assert unusual("exchange_every", 1) == {"codistillation": 50}
    assert unusual("links", "full") == {
        "okddip-leader": "leader",
        "distill": "frozen",
        "ensemble-distill": "frozen",
    }
    teachers = {"distill": ["x"], "ensemble-distill": [f"c/{TEACHERS}"]}
    assert unusual("frozen_peers", []) == teachers
    # Those that are not semi-supervised learn from the labelled images alone.
    assert unusual("kl_images", "labelled") == {"independent": "all", "semi": "all"}
    assert not unusual("labelled_fraction", 0.5)
    assert unusual("epochs", 200) == {"ensemble-distill": 109}  # 6/11


def test_every_kind_of_method_is_a_folder_of_runs(tmp_path: Path) -> None:
    alone = ["--cohort", "resnet8", "--max-steps", "1"]
    assert train(tmp_path / "t", *DIGITS, *alone) == 0
    words = ["--methods", *TRAINED, "--cohort", "resnet8*3", "--max-steps", "2"]
    words += ["--labelled-fraction", "0.5", "--frozen-peers", str(tmp_path / "t")]
    folder = tmp_path / "all"
    assert compared(folder, *words) == 0
    found = load(folder / "results.json")
    assert found["methods"] == TRAINED  # in the order asked for
    assert [run["method"] for run in found["runs"]] == TRAINED
    teachers = load(folder / "distill/seed-0/config.json")["teachers"]
    assert len(teachers["frozen"]["frozen-0"]["sha256"]) == 64
    card = (folder / "distill/seed-0/peers/resnet8-0/README.md").read_text()
    assert "by distillation from resnet8_cifar" in card
    for method, cost in found["cohorts"][0]["cost"].items():
        assert 0 < cost["training_seconds"]["mean"] < cost["seconds"]["mean"] + 1, method
        assert cost["top1_per_training_second"]["mean"] > 0


def test_all_leaves_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise DivergedError("at once")

    monkeypatch.setattr(compare, "run_one", diverge)  # what is trained does not matter here
    monkeypatch.setattr(compare.Display, "end", lambda _: None)  # it did not begin
    words = ["--methods", "all", "--cohort", "resnet8", "--max-steps", "3"]
    assert compared(tmp_path / "all", *words) == 1
    said, found = capsys.readouterr().err, load(tmp_path / "all/results.json")
    assert found["methods"] == ["independent", "ensemble-distill"]
    assert [*found["left_out"]] == [name for name in METHODS if name not in found["methods"]]
    text = (tmp_path / "all/results.md").read_text()
    for name, why in found["left_out"].items():
        assert f"left out: {name}: {why}\n" in said
        assert f"- Left out: {name}: {why}\n" in text
    # Nor is a pupil trained whose teachers diverged.
    assert [*found["failed"].values()] == [
        "at once",
        "at once",
        "its teachers could not be trained",
    ]
    assert found["missing"] == [] and f"error: {PUPIL} failed" in said
    assert not (tmp_path / "all" / PUPIL).exists()


# ---------------------------------------------------------------- two stages


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two networks whose method of two stages takes 2 of 4 steps in each."""
    folder = tmp_path_factory.mktemp("pair") / "first"
    assert compared(folder, *PAIR) == 0
    return folder


PAIR = ["--methods", "independent", "switokd", "ensemble-distill", "--cohort", "resnet8*2"]
PAIR += ["--max-steps", "4", "--save-every", "1"]


def test_the_pupil_learns_from_all_networks_alone(pair: Path, tmp_path: Path) -> None:
    teachers, pupil = (load(pair / where / "config.json") for where in (TEACHERS, PUPIL))
    assert teachers["config"]["cohort"] == ["resnet8*2"] and pupil["config"]["cohort"] == [
        "resnet8"
    ]
    for one in (teachers, pupil):
        assert (one["config"]["epochs"], one["config"]["max_steps"]) == (109, 2)
    steps = [load(pair / where / "results.json")["steps"] for where in (TEACHERS, PUPIL)]
    assert steps == [2, 2]
    frozen = pupil["teachers"]["frozen"]
    assert [one["arch"] for one in frozen.values()] == ["resnet8_cifar"] * 2
    # It is an ordinary run, which starts from the usual weights of the first network.
    words = ["--cohort", "resnet8", "--epochs", "109", "--max-steps", "2", "--links", "frozen"]
    words += ["--frozen-peers", str(pair / TEACHERS), "--target", "mean-prob"]
    words += ["--lr-schedule", "milestones", "--lr-milestones", *pupil_milestones(pupil)]
    assert train(tmp_path / "alone", *DIGITS, *words) == 0
    assert_same_state(state(tmp_path / "alone"), state(pair / PUPIL))


def pupil_milestones(pupil: dict[str, Any]) -> list[str]:
    return [str(at) for at in pupil["config"]["lr_milestones"]]


def test_its_cost_is_that_of_both_stages(pair: Path) -> None:
    runs = {run.method: run for run in find_runs([pair])}
    both, alone = runs["ensemble-distill"], runs["independent"]
    (teachers,) = both.earlier
    assert both.cohort == alone.cohort == "resnet8x2" and both.peers == ["resnet8-0"]
    assert both.seconds > teachers.seconds > 0
    # Of 4 steps of 8 images: 2 of two networks alone, 2 of a pupil and what two teachers say.
    passes = 2 * 8 * 6 + 2 * 8 * (3 + 2)
    assert million_passes(both) == pytest.approx(passes / 1e6)
    assert million_passes(alone) == pytest.approx(4 * 8 * 6 / 1e6)
    assert passes <= 4 * 8 * 6
    # Half of a cost is none.
    costs = comparison_record(
        alone.config,
        [alone, dataclasses.replace(both, earlier=())],
        methods=["independent", "ensemble-distill"],
        seeds=[0],
        cifar100=False,
    )["cohorts"][0]["cost"]["ensemble-distill"]
    for name in ("seconds", "training_seconds", "passes_per_image", "million_passes"):
        assert costs[name]["mean"] is None


def test_both_stages_are_listed_and_other_networks_have_no_number(pair: Path) -> None:
    text, found = (pair / "results.md").read_text(), load(pair / "results.json")
    assert f"`{PUPIL}`" in text and f"`{TEACHERS}`" in text
    rows = (pair / "results.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows if row.startswith("ensemble")] == [
        ["ensemble-distill", "0", "resnet8-0"]
    ]
    summaries = {(s["method"], s["name"]): s for s in found["cohorts"][0]["summaries"]}
    assert summaries["ensemble-distill", "resnet8-0"]["top1"]["n"] == 1
    for name in ("resnet8-1", "ensemble"):
        assert summaries["ensemble-distill", name]["top1"]["mean"] is None
    # Equal networks are averaged, but this method has one: it is paired with the same one alone.
    mean = summaries["ensemble-distill", "cohort mean"]
    one, alone = (summaries[m, "resnet8-0"]["top1"]["mean"] for m in ("ensemble-distill", BASELINE))
    assert mean["only"] == ["resnet8-0"]
    assert mean["difference"]["top1"]["mean"] == pytest.approx(one - alone)
    assert summaries[BASELINE, "cohort mean"]["top1"]["mean"] != pytest.approx(alone)
    assert "| ensemble-distill (resnet8-0) " in text


def test_report_puts_it_beside_the_methods_of_its_comparison(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (group,) = group_comparable(find_runs([pair, pair / TEACHERS]))
    assert {run.method for run in group} == {"independent", "switokd", "ensemble-distill"}
    said = capsys.readouterr().err
    assert f"left out: the run in {pair / TEACHERS} trained the teachers of a method" in said
    page = pair.parent / "page.html"
    assert cli.main(["report", str(pair), "--to", str(page), "--analyse", "0"]) == 0
    assert "ensemble-distill" in page.read_text()


@pytest.fixture
def moved(pair: Path, tmp_path: Path) -> Iterator[Path]:
    """The same comparison elsewhere, where its first folder is not to be found."""
    shutil.copytree(pair, tmp_path / "second")
    hidden = pair.rename(pair.with_name("hidden"))
    yield tmp_path / "second"
    hidden.rename(pair)


def test_a_comparison_that_was_moved_resumes_both_stages(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {where: state(moved / where) for where in (TEACHERS, PUPIL)}
    for where in (TEACHERS, PUPIL):  # as if each had been killed in its second step
        (moved / where / "results.json").unlink()
        shutil.rmtree(moved / where / "peers")
        (newest,) = (moved / where / "checkpoints").glob("*2")
        shutil.rmtree(newest)
        assert compared(moved, *PAIR) == 0
        resumed = [event["event"] for event in events(moved / where)].count("resume")
        assert resumed == 1
    for where, weights in before.items():
        assert_same_state(state(moved / where), weights)
    monkeypatch.setattr(compare, "run_one", lambda *_, **__: pytest.fail("trained again"))
    assert compared(moved, *PAIR) == 0


@pytest.mark.parametrize("done", [True, False])
def test_teachers_that_have_changed_are_refused(
    moved: Path, capsys: pytest.CaptureFixture[str], done: bool
) -> None:
    file = moved / TEACHERS / "peers/resnet8-1/model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    if not done:
        (moved / PUPIL / "results.json").unlink()
    assert compared(moved, *PAIR) == 2
    assert f"{PUPIL} learned from other teachers than {moved / TEACHERS} hold now" in (
        capsys.readouterr().err
    )


def test_teachers_that_are_gone_are_missed_by_a_pupil_that_needs_them(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(moved / TEACHERS / "peers")
    assert compared(moved, *PAIR) == 0  # a finished one does not
    (moved / PUPIL / "results.json").unlink()
    assert compared(moved, *PAIR) == 2
    assert f"{TEACHERS} holds no trained peer" in capsys.readouterr().err
