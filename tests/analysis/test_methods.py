"""Methods and presets by name."""

import pytest

from dml_accel import cli
from dml_accel.analysis.methods import METHODS, PRESETS, method_of
from dml_accel.core.config import Config
from dml_accel.core.recipes import in_words
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("changes", "peers", "method"),
    [
        ({}, 2, "mutual"),
        ({"kl_weight": 0.0}, 2, "independent"),
        ({"kl_weight": 0.0, "ce_weight": 0.5}, 2, "independent, ce weight 0.5"),
        ({"kl_weight": 0.0, "update": "switch"}, 2, "independent"),
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
        ({"divergence": "jeffreys"}, 2, "jeffreys"),
        ({"divergence": "dkd", "temperature": 4.0, "kl_warmup": 17}, 2, "dkd"),
        (
            {"divergence": "dkd", "temperature": 4.0},
            2,
            "mutual, divergence dkd, temperature 4.0",
        ),
        (
            {"divergence": "renyi", "divergence_args": ("alpha=3",), "gate": "correct"},
            2,
            "renyi, divergence args alpha=3, gate correct",
        ),
        ({"target": "best", "temperature": 2.0}, 2, "kdcl-naive"),
        ({"target": "best"}, 2, "mutual, target best"),
        ({"standardize": True}, 2, "mutual, standardize"),
        (
            {"standardize": True, "temperature": 2.0, "kl_weight": 9.0, "ce_weight": 0.1},
            2,
            "standardized",
        ),
        ({"update": "switch"}, 2, "switokd"),
        ({"exchange_every": 50}, 2, "codistillation"),
        (
            {"exchange_every": 10, "burn_in": 300},
            2,
            "mutual, burn in 300, exchange every 10",
        ),
        ({"links": "leader", "target": "mean-logit"}, 3, "mean-logit, links leader"),
        (
            METHODS["okddip-leader"].flags(200),
            3,
            "okddip-leader",
        ),
        (
            {"frozen_peers": ("x",), "links": "frozen", "target": "mean-prob"},
            2,
            "mean-prob, links frozen, of vit (01234567)",
        ),
    ],
    ids=str,
)
def test_a_configuration_has_the_name_of_its_method(changes: dict, peers: int, method: str) -> None:
    teacher = {"arch": "vit", "sha256": "0123456789"}
    teachers = {"frozen-0": teacher} if "frozen_peers" in changes else {}
    assert method_of(Config(**changes), peers, teachers) == method


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented_and_fits_a_line(name: str) -> None:
    method = METHODS[name]
    flags = in_words(method.changes) if method.changes else ""
    if method.warmup is not None:
        flags += f" --kl-warmup {method.warmup} of the epochs"
    row = (
        f"| `{name}` | {method.text} | {f'`{flags}`' if flags else '-'} | {method.source or '-'} |"
    )
    assert row in (ROOT / "docs/results.md").read_text().splitlines()
    assert 0 < len(method.text) <= 90


def test_help_lists_every_method_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert all(f"{name} {method.text}" in lines for name, method in METHODS.items())


def test_the_papers_preset_is_the_papers_recipe() -> None:
    preset = PRESETS["paper-table2"]
    assert preset.changes == {} and len(preset.cohorts) == 6
    paper = Config().optim
    assert (paper.epochs, paper.batch_size, paper.lr, paper.lr_step) == (200, 64, 0.1, 60)
    assert ("wrn_28_10", "resnet32") in preset.cohorts
