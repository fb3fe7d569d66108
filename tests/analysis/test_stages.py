"""The method of two stages costs what the others do, and its rates fall at the same share."""

import pytest

from dml_accel.analysis.stages import pupil_config, shared_flags, teachers_config
from dml_accel.core.config import Config
from dml_accel.models.schedules import learning_rate


@pytest.mark.parametrize(
    ("cohort", "epochs", "left"),
    # 3KE / (4K + 3), by hand: 3/7, 6/11, 9/15, 12/19 and 24/35 of the epochs.
    [("1", 7, 3), ("2", 15, 8), ("3", 5, 3), ("4", 5, 3), ("8", 200, 137)],
)
def test_both_stages_cost_at_most_what_mutual_learning_does(
    cohort: str, epochs: int, left: int
) -> None:
    config, peers = Config(cohort=(cohort,), epochs=epochs, max_steps=10 * epochs), int(cohort)
    for stage in (teachers_config(config), pupil_config(config)):
        assert stage.optim.epochs == left
        assert stage.optim.max_steps == 10 * epochs * 3 * peers // (4 * peers + 3)
    passes = 3 * peers + 3 + peers  # of one epoch of both stages; the teachers are not updated
    assert passes * left <= 3 * peers * epochs < passes * (left + 1)


@pytest.mark.parametrize(
    "flags",
    [
        {"lr_step": 6},
        {"lr_schedule": "milestones", "lr_milestones": (10.0, 15.0), "warmup": 2.0},
        {"lr_schedule": "cosine", "warmup": 1.0},
        {"lr_schedule": "constant"},
    ],
    ids=str,
)
def test_the_rate_is_the_same_at_the_same_share_of_the_epochs(flags: dict) -> None:
    config = Config(cohort=("2",), epochs=22, **flags)
    stage = teachers_config(config).optim
    assert stage.epochs == 12
    for step in range(220):  # 110 steps in an epoch of the others, 110 * 22 / 12 in one of these
        others = learning_rate(config.optim, step * 11, 110)
        assert learning_rate(stage, step * 6, 110) == pytest.approx(others, abs=1e-3)


def test_the_pupil_is_the_first_network_and_its_teachers_are_all() -> None:
    cohort = ("timm:resnet18[stem=cifar]*2", "resnet8")
    optim = {"peer_opt": ("resnet18-0:lr=0.2", "resnet8-0:lr=0.3"), "kl_warmup": 5, "epochs": 15}
    optim["burn_in"] = 100  # 9/15 of it
    config = Config(cohort=cohort, target="mean-prob", **optim)
    teachers, pupil = teachers_config(config), pupil_config(config)
    assert teachers.cohort == cohort and teachers.method.kl_weight == 0
    assert teachers.optim.peer_opt == config.optim.peer_opt
    assert pupil.cohort == ("timm:resnet18[stem=cifar]",) and pupil.method.target == "mean-prob"
    assert pupil.optim.peer_opt == ("resnet18-0:lr=0.2",)
    assert (pupil.optim.epochs, pupil.method.kl_warmup, pupil.method.burn_in) == (9, 3, 60)
    for stage in (teachers, pupil):  # what is recorded makes the flags of the others of it again
        others = stage.changed(**shared_flags(config, stage))
        assert others.differences(config).keys() <= {"kl_weight", "target"}
