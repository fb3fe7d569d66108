"""Methods and presets by name."""

import pytest

from dml_accel.analysis.methods import PRESETS, method_of
from dml_accel.core.config import Config


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
    teacher = {"arch": "vit", "sha256": "0123456789"}
    teachers = {"frozen-0": teacher} if "frozen_peers" in changes else {}
    assert method_of(Config(**changes), peers, teachers) == method


def test_the_papers_preset_is_the_papers_recipe() -> None:
    preset = PRESETS["paper-table2"]
    assert preset.changes == {} and len(preset.cohorts) == 6
    paper = Config().optim
    assert (paper.epochs, paper.batch_size, paper.lr, paper.lr_step) == (200, 64, 0.1, 60)
    assert ("wrn_28_10", "resnet32") in preset.cohorts
