"""The command plan: each of its flags changes what it prints, none of the others would; classes."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dml_accel import cli
from dml_accel.cli.parser import PLANNED
from dml_accel.core.config import Config, flag_types
from dml_accel.distributed.plan import cpus
from dml_accel.training import planning, setup
from dml_accel.training.planning import Question, plan
from tests.core.test_config import NEEDS, OTHER

SHAPE = {"cohort": ("resnet8*2",), "image_size": 8, "placement": "split"}
LOADER = {"feed": "loader"}
# What else a flag needs to change the plan; nothing for those that are not named.
WITH: dict[str, dict[str, Any]] = {
    "divergence": {"exchange": "sum"},
    "target": {"exchange": "sum"},
    "update": {"placement": "auto"},
    "teach_with": {"ema": 0.9},
    "placement": {"placement": "auto"},
    "mixup": LOADER | {"grad_accum": 2},
    "cutmix": LOADER | {"grad_accum": 2},
    "workers": LOADER,
    "mixed_precision": {"measure": True},
    "memory_format": {"measure": True},
    "opt_args": {"optimizer": "adafactor"},
    "threads": {"cpu": True},
}
# Another value than that of ``OTHER``, where that one has no effect on memory or time.
VALUES: dict[str, Any] = {
    "cohort": ("resnet8*3",),
    "label_column": "coarse_label",
    "kl_weight": 0.0,
    "momentum": 0.0,
    "opt_args": ("betas=0.9,0.99",),
    "peer_opt": ("resnet8-0:optimizer=adamw",),
    "target": "mean-logit",
    "update": "official",
    "exchange_every": 10,
}
LISTED = "says which images of a local folder are listed"
NO_EFFECT = {
    **dict.fromkeys(("dataset_config", "image_column", "train_split", "val_split"), LISTED),
    **dict.fromkeys(("test_split", "test_fraction"), LISTED),
    "augment": "is part of what --measure times of decoding a local folder",
    "divergence_args": "some divergences cannot be had without",
    "cpu": "chooses the rates where there is a GPU",
    "threads": "is set for the process that plans",
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan a configuration; each network is built and counted once, and its time is made up."""
    networks: dict[Any, Any] = {}
    build = planning.build_networks
    monkeypatch.setattr(setup, "count", functools.cache(setup.count))

    def built(config: Config, specs: Any, classes: int) -> Any:
        key = (config.cohort, classes, config.data.size, config.numerics.float64)
        if key not in networks:
            networks[key] = build(config, specs, classes)
        return networks[key]

    def timed(specs: Any, modules: Any, optim: Any, precision: str, images: Any, *_: Any) -> Any:
        slow = 2 if precision == "bf16" else 1
        return {one.name: 1e-3 * slow * (1 + ("last" in str(images.layout))) for one in specs}

    monkeypatch.setattr(planning, "build_networks", built)
    monkeypatch.setattr(setup, "timed", timed)

    def of(**flags: Any) -> str:
        return plan(Config(**SHAPE | flags), Question([3], None, None, cpus()))[0]

    return of


def test_every_flag_of_plan_changes_what_it_prints(said: Any) -> None:
    for name in sorted(PLANNED - NO_EFFECT.keys()):
        needs, value = WITH.get(name, {}), VALUES.get(name, OTHER.get(name))
        assert said(**needs | {name: value}) != said(**needs), name


def test_no_other_flag_would_change_it(said: Any) -> None:
    # So a flag that the model begins to read becomes one of plan's.
    others = flag_types().keys() - PLANNED | NO_EFFECT.keys()
    assert len(others) > 40
    for name in sorted(others):
        needs = NEEDS.get(name, {}) | ({"lr_milestones": (40,)} if "milestones" in name else {})
        assert said(**needs | {name: OTHER[name]}) == said(**needs), name


def test_a_file_may_hold_what_plan_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("cohort: resnet8*2\nbatch-size: 24\nlr: 0.3\nepochs: 7\n")
    assert cli.main(["plan", "--config", str(path), "--cpu"]) == 0
    found = capsys.readouterr().out
    words = ["--cohort", "resnet8*2", "--batch-size", "24", "--cpu"]
    assert cli.main(["plan", *words]) == 0
    assert capsys.readouterr().out == found
    assert "24 images of 32 pixels per step, 100 classes" in found


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "100 classes"),
        (["--label-column", "coarse_label"], "20 classes"),
        (["--dataset", "digits"], "10 classes"),
        (["--dataset", "digits", "--classes", "10"], "10 classes"),
        (["--dataset", "uoft-cs/cifar10"], "10 classes"),
        (["--dataset", "some/birds", "--classes", "7"], "7 classes"),
        (["--dataset", "PHOTOS"], "2 classes"),
        (["--dataset", "some/birds"], "how many classes --dataset some/birds has: give --classes"),
        (["--label-column", "mood"], "uoft-cs/cifar100 has in --label-column mood: give --classes"),
        (["--classes", "11"], "--classes 11 contradicts --dataset uoft-cs/cifar100, which has 100"),
        (["--dataset", "PHOTOS", "--classes", "3"], "which has 2 classes: drop --classes"),
    ],
)
def test_classes_are_those_of_the_data_set(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name / "a.png")
    words = [str(tmp_path) if word == "PHOTOS" else word for word in words]
    code = cli.main(["plan", "--cohort", "resnet8", "--world", "1", "--cpu", *words])
    out, err = capsys.readouterr()
    assert text in (err if code else out)
    assert code == (2 if "--classes" in text else 0)
    assert not code or (out == "" and err.count("\n") == 1)


# ---------------------------------------------------------------- many processes


def test_several_numbers_of_processes_are_rows_of_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--cohort", "resnet8*2", "--image-size", "8", "--batch-size", "64", "--gpus"]
    words += ["--step-ms", "30", "--world", "1", "2", "2", "48", "65"]
    assert cli.main([*words, "--plot", str(tmp_path / "x.svg")]) == 0
    out = capsys.readouterr().out  # a row for 2, which was named twice
    one, two, many, more = (
        re.split(r"  +", line.strip())
        for line in out.splitlines()
        if re.match(r"(1|2|48|65) ", line)
    )
    # 12 operations and more of each network take longer to start than 15 ms: 10 ms at 64 rows.
    assert one[:2] == ["1", "replicate"] and one[6] == "100.0"
    assert two[:2] == ["2", "split"] and two[4] == "64"
    assert many[4] == "2-3"
    assert more == ["65", "batch too small: --batch-size 65"]
    assert "measured: 30 ms for a step of the cohort in one process" in out
    assert "10 GB/s, 20 us per message, all-reduces along a tree, 2 log2 n messages" in out
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_a_placement_is_chosen_as_for_mutual_training(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--cohort", "resnet8*2", "--image-size", "8", "--cpu", "--kl-weight"]
    chosen = []
    for weight in ("1", "0"):
        assert cli.main([*words, weight]) == 0
        chosen.append(capsys.readouterr().out.splitlines()[-1])
    assert chosen[1] == f"{chosen[0]}, both with the mutual loss"


def test_a_thousand_processes_are_a_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--cohort", "resnet8*2", "--image-size", "8", "--batch-size", "2048", "--cpu"]
    assert cli.main([*words, "--world", "1024"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^0-1023 +resnet8-0 resnet8-1 +2 ", out, re.M)
    assert re.search(r"^0-511 +resnet8-0 +4 ", out, re.M)
    assert re.search(r"^512-1023 +resnet8-1 +4 ", out, re.M)
    assert "around a ring, 2 (n - 1) messages for n processes, as gloo's" in out
    assert len(out.splitlines()) < 25
