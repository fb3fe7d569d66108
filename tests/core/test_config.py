"""The configuration: sections, ranges, conflicts, and what resuming may change."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import numpy as np
import pytest

from dml_accel.core.config import (
    Config,
    differences_text,
    flag_groups,
    flag_types,
    typed,
)
from dml_accel.core.errors import UsageError
from dml_accel.core.flags import Section

SECTIONS = ["data", "optim", "method", "numerics", "compute", "run"]
# Another value for every flag, and what else it needs.
OTHER: dict[str, typing.Any] = {
    "cohort": ("resnet8*2", "wrn_16_2"),
    "seed": 1,
    "dataset": "digits",
    "dataset_config": "small",
    "image_column": "img",
    "label_column": "species",
    "train_split": "most",
    "test_split": "rest",
    "test_fraction": 0.2,
    "val_split": "held",
    "eval_resize": 40,
    "crop_mode": "squash",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "bad_images": "skip",
    "class_weights": "balanced",
    "feed": "loader",
    "images_on": "host",
    "workers": 2,
    "image_size": 16,
    "augment": ("crop", "randaugment[magnitude=7]"),
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "train_limit": 100,
    "val_fraction": 0.1,
    "labelled_fraction": 0.5,
    "epochs": 100,
    "max_steps": 5,
    "batch_size": 32,
    "grad_accum": 2,
    "optimizer": "adamw",
    "opt_args": ("betas=0.9,0.95", "eps=1e-6"),
    "lr": 0.05,
    "lr_schedule": "cosine",
    "lr_step": 30,
    "lr_milestones": (30, 60.5),
    "lr_gamma": 0.2,
    "lr_min": 1e-4,
    "lr_power": 2.0,
    "lr_every": "epoch",
    "warmup": 0.5,
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "wd_exclude_norm_bias": True,
    "clip_norm": 1.0,
    "peer_opt": ("resnet32-0:lr=0.01",),
    "ema": 0.99,
    "early_stop": 3,
    "kl_weight": 0.5,
    "ce_weight": 0.1,
    "temperature": 2.0,
    "divergence": "jeffreys",
    "divergence_args": ("beta=2", "alpha=0.5"),
    "standardize": True,
    "gate": "correct",
    "kl_reduction": "sum",
    "kl_warmup": 3,
    "kl_ramp": "sigmoid",
    "burn_in": 7,
    "exchange_every": 50,
    "update": "sequential",
    "target": "mean-prob",
    "links": "ring",
    "frozen_peers": ("runs/wrn", "runs/other"),
    "teach_with": "ema",
    "kl_images": "labelled",
    "mixed_precision": "bf16",
    "float64": True,
    "tf32": True,
    "batch_norm": "local",
    "exchange_dtype": "bf16",
    "cpu": True,
    "threads": 2,
    "processes": "2",
    "compile": "on",
    "compile_mode": "max-autotune",
    "memory_format": "contiguous",
    "low_memory": True,
    "return_memory": True,
    "placement": "split",
    "measure": True,
    "exchange": "sum",
    "timeout": 5.0,
    "output_dir": "runs/here",
    "resume": "runs/there",
    "eval_every": "500",
    "save_every": "10min",
    "keep": "best",
    "keep_checkpoints": 3,
    "max_nonfinite": 3,
    "log_with": ("tensorboard", "wandb"),
}
NEEDS = {
    "kl_images": {"labelled_fraction": 0.5},
    "compile_mode": {"compile": "on"},
    "divergence_args": {"divergence": "dkd"},
    "kl_ramp": {"kl_warmup": 2},
    "lr_milestones": {"lr_schedule": "milestones"},
    "optimizer": {"lr": 0.05},
    "teach_with": {"ema": 0.99},
    "early_stop": {"val_fraction": 0.1},
    "keep": {"val_fraction": 0.1},
}


def with_and_without(name: str) -> tuple[Config, Config]:
    """Two configurations that differ in one flag only."""
    needs = NEEDS.get(name, {})
    without = {"lr_milestones": (40,)} if name == "lr_milestones" else {}
    return Config(**needs | {name: OTHER[name]}), Config(**needs | without)


# ---------------------------------------------------------------- sections


def test_every_flag_is_a_field_of_one_section_or_of_the_whole() -> None:
    sections = Config().sections
    assert list(sections) == SECTIONS
    names = ["cohort", "seed"]
    for section in sections.values():
        names += [field.name for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) == len(OTHER) > 50
    assert names == list(Config().as_dict()) == list(flag_types())
    assert names == [field.name for group in flag_groups() for field in group.fields]
    assert set(names) == set(OTHER)


def test_only_compute_and_run_do_not_change_the_result() -> None:
    unchanged = [name for name, one in Config().sections.items() if not one.changes_result]
    assert unchanged == ["compute", "run"]


def test_every_field_has_a_help_and_every_section_a_text() -> None:
    assert [group.title for group in flag_groups()] == ["cohort", *SECTIONS]
    for group in flag_groups():
        assert group.text.endswith(".") and "\n" not in group.text
        assert all(field.metadata["help"] for field in group.fields)


@pytest.mark.parametrize("name", OTHER)
def test_a_flag_is_read_back_from_its_section_and_from_plain_json(name: str) -> None:
    config, without = with_and_without(name)
    owners = [config, *config.sections.values()]
    (value,) = [vars(owner)[name] for owner in owners if name in vars(owner)]
    assert value == OTHER[name]
    plain = json.loads(json.dumps(config.as_dict()))
    assert Config(**plain) == config != without
    assert without.changed(**{name: OTHER[name]}) == config


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0
    assert hash(config) == hash(Config())


def test_changes_are_checked_as_the_whole_is() -> None:
    with pytest.raises(UsageError, match="--lr is -1.0; it must be at least 0"):
        Config().changed(lr=-1)
    with pytest.raises(UsageError, match="unknown configuration zzz; known are: cohort, seed"):
        Config().changed(zzz=1)


# ---------------------------------------------------------------- ranges

SMALLEST = math.ulp(0)
BELOW_1, ABOVE_1 = math.nextafter(1, 0), math.nextafter(1, 2)
AT_LEAST_1 = ([1, 10**15], [0, -1])
AT_LEAST_0 = ([0.0, 1e300], [-SMALLEST])
ABOVE_0 = ([SMALLEST, 1e300], [0.0, -SMALLEST])
# Values just inside and just outside of the range of every number.
RANGES: dict[str, tuple[list[float], list[float]]] = {
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "image_size": ([8, 4096], [7, 4097]),
    "eval_resize": ([8, 8192], [7, 8193]),
    "workers": ([0, 256], [-1, 257]),
    "train_limit": AT_LEAST_1,
    "val_fraction": ([0.0, BELOW_1], [-SMALLEST, 1.0]),
    "test_fraction": ([0.0, BELOW_1], [-SMALLEST, 1.0]),
    "labelled_fraction": ([SMALLEST, 1.0], [0.0, ABOVE_1]),
    "epochs": AT_LEAST_1,
    "max_steps": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "grad_accum": ([1, 64], [0, 65]),  # at most the batch size
    "lr": AT_LEAST_0,
    "mixup": ([0.0, 1000.0], [-SMALLEST, math.nextafter(1000, 1001)]),
    "cutmix": ([0.0, 1000.0], [-SMALLEST, math.nextafter(1000, 1001)]),
    "label_smoothing": ([0.0, BELOW_1], [-SMALLEST, 1.0]),
    "lr_min": AT_LEAST_0,
    "lr_power": ABOVE_0,
    "warmup": ([0.0, math.nextafter(200, 0)], [-SMALLEST]),  # below the epochs
    "ema": ([SMALLEST, BELOW_1], [0.0, 1.0]),
    "early_stop": AT_LEAST_1,
    "lr_step": AT_LEAST_1,
    "lr_gamma": ([0.0, 1.0], [-SMALLEST, ABOVE_1]),
    "momentum": ([0.0, BELOW_1], [-SMALLEST, 1.0]),
    "weight_decay": AT_LEAST_0,
    "clip_norm": ABOVE_0,
    "kl_weight": AT_LEAST_0,
    "ce_weight": AT_LEAST_0,
    "temperature": ABOVE_0,
    "kl_warmup": ([0, 200], [-1]),  # at most the epochs
    "burn_in": ([0, 10**15], [-1]),
    "exchange_every": AT_LEAST_1,
    "threads": AT_LEAST_1,
    "timeout": ([SMALLEST, 1e6], [0.0, math.nextafter(1e6, 2e6)]),
    "keep_checkpoints": AT_LEAST_1,
    "max_nonfinite": AT_LEAST_1,
}


def is_number(name: str) -> bool:
    hint = flag_types()[name]
    if typing.get_origin(hint) is tuple:
        return False
    return bool({int, float} & {hint, *typing.get_args(hint)})


def test_the_range_of_every_number_is_tested() -> None:
    assert {name for name in flag_types() if is_number(name)} == set(RANGES)


@pytest.mark.parametrize("name", RANGES)
def test_values_just_inside_a_range_are_accepted_and_just_outside_refused(name: str) -> None:
    inside, outside = RANGES[name]
    needs = NEEDS.get(name, {})
    for value in inside:
        assert Config(**needs | {name: value}).as_dict()[name] == value
    if isinstance(inside[0], float):
        outside = [*outside, math.inf, -math.inf, math.nan]
    for value in outside:
        with pytest.raises(UsageError) as refusal:
            Config(**needs | {name: value})
        assert str(refusal.value).startswith(f"--{name.replace('_', '-')} is {value}; it must be ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "--seed is -1; it must be at least 0 and below 9,223,372,036,854,775,808"),
        ({"image_size": 5000}, "--image-size is 5000; it must be at least 8 and at most 4,096"),
        ({"momentum": 1.0}, "--momentum is 1.0; it must be at least 0 and below 1"),
        ({"labelled_fraction": 0.0}, "--labelled-fraction is 0.0; it must be above 0 and at most"),
        ({"kl_warmup": -1}, "--kl-warmup is -1; it must be at least 0"),
        ({"kl_warmup": 9, "epochs": 8}, "--kl-warmup 9 is more than --epochs 8, so the KL weight"),
        ({"lr": math.nan}, "--lr is nan; it must be a finite number"),
        ({"timeout": 1e7}, "--timeout is 10000000.0; it must be above 0 and at most 1,000,000"),
    ],
    ids=str,
)
def test_a_refusal_names_the_value_and_the_range(changes: dict, said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Config(**changes)
    assert str(refusal.value).startswith(said)


def test_every_choice_is_accepted_and_any_other_word_refused() -> None:
    chosen = 0
    for group in flag_groups():
        for field in group.fields:
            choices = [*field.metadata["argparse"].get("choices", ())]
            for choice in choices:
                needs = dict(NEEDS.get(field.name, {}))
                if choice == "milestones":
                    needs["lr_milestones"] = (9,)
                Config(**needs | {field.name: choice})
            if choices:
                chosen += 1
                said = f"--{field.name.replace('_', '-')} is other; it must be one of {choices[0]}"
                with pytest.raises(UsageError, match=said):
                    Config(**{field.name: "other"})
    assert chosen == 24


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("cohort", None, "tuple[str, ...]"),
        ("cohort", (3.0,), "tuple[str, ...]"),
        ("cohort", True, "tuple[str, ...]"),
        ("eval_every", 0.5, "str"),
        ("dataset", 5, "str"),
        ("seed", 1.0, "int"),
        ("epochs", True, "int"),
        ("lr_gamma", "0.1", "float"),
        ("lr", "0.1", "float | None"),
        ("lr_milestones", ("150",), "tuple[float, ...]"),
        ("augment", 1, "tuple[str, ...] | None"),
        ("cpu", 1, "bool"),
        ("cpu", None, "bool"),
        ("dataset", None, "str"),
        ("timeout", None, "float"),
        ("max_steps", "5", "int | None"),
        ("log_with", ("wandb", 1), "tuple[str, ...]"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object, kind: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Config(**{name: value})
    assert str(refusal.value) == f"configuration {name} is {value!r}; its type must be {kind}"


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("cohort", "resnet8*2", ("resnet8*2",)),
        ("cohort", 4, ("4",)),
        ("cohort", ["resnet8", np.int64(2)], ("resnet8", "2")),
        ("frozen_peers", Path("runs/a"), ("runs/a",)),
        ("output_dir", Path("runs/a"), "runs/a"),
        ("eval_every", 500, "500"),
        ("lr", np.float32(0.5), 0.5),
        ("lr_milestones", 75, (75.0,)),
        ("augment", "crop", ("crop",)),
        (
            "opt_args",
            {"nesterov": True, "betas": (0.9, 0.95)},
            ("nesterov=True", "betas=(0.9, 0.95)"),
        ),
        ("divergence_args", {"alpha": 2}, ("alpha=2",)),
        ("log_with", "wandb", ("wandb",)),
    ],
)
def test_values_may_be_written_as_python_writes_them(
    name: str, value: object, meant: object
) -> None:
    assert typed(name, value) == meant and type(typed(name, value)) is type(meant)


def test_a_slip_in_a_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"unknown configuration batchsize; did you mean batch_size\?$"
    ):
        Config(**{"batchsize": 3})


# ---------------------------------------------------------------- conflicts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"update": "sequential", "placement": "split"}, "--update sequential updates peers in"),
        ({"update": "official", "placement": "split"}, "--update official updates peers in turn"),
        ({"update": "sequential", "grad_accum": 2}, "needs --grad-accum 1"),
        ({"update": "sequential", "low_memory": True}, "--low-memory works with --update simult"),
        (
            {"update": "official", "low_memory": True},
            "--low-memory works with .* not with official",
        ),
        ({"update": "official", "target": "mean-prob"}, "--update official sums the KL"),
        (
            {"update": "official", "target": "mean-logit"},
            "but --target mean-logit has a single one",
        ),
        (
            {"kl_reduction": "sum", "target": "mean-logit"},
            "--kl-reduction sum needs --target peers",
        ),
        ({"kl_reduction": "sum", "target": "mean-prob"}, "--target mean-prob has a single KL term"),
        *(
            ({"target": target, "links": "ring"}, f"--target {target} is one target for all peers")
            for target in ("mean-logit-all", "best", "min-logit")
        ),
        ({"target": "best", "gate": "correct"}, "--gate correct needs --target peers"),
        ({"target": "min-logit", "kl_reduction": "sum"}, "--kl-reduction sum needs --target peers"),
        ({"target": "mean-prob", "divergence": "dkd"}, "a mean of posteriors is known only up to"),
        ({"target": "mean-logit", "divergence": "nkd"}, "compares peers at two temperatures, and"),
        ({"divergence": "wttm", "temperature": 2.0}, "--divergence wttm has temperatures of its"),
        ({"divergence": "kl", "divergence_args": ("beta=1",)}, "args beta: --divergence kl has no"),
        ({"divergence": "dkd", "divergence_args": ("gama=1",)}, "it takes alpha beta"),
        ({"divergence": "dkd", "divergence_args": ("beta=x",)}, "beta is 'x'; it must be a number"),
        ({"divergence": "dkd", "divergence_args": ("beta=-1",)}, "beta is -1; it must be at least"),
        (
            {"divergence": "dkd", "divergence_args": ("beta=nan",)},
            "beta is nan; it must be a finit",
        ),
        (
            {"divergence": "jsd", "divergence_args": ("beta=1",)},
            "beta is 1; it must be above 0 and",
        ),
        ({"divergence": "dkd", "divergence_args": ("beta=1", "beta=2")}, "gives beta twice"),
        (
            {"divergence": "renyi", "divergence_args": ("alpha=1",)},
            "within 0.001 of 1, the limit",
        ),
        *(
            ({**changes, "exchange": "sum"}, "compares peers one by one, but --exchange sum sends")
            for changes in (
                {"divergence": "renyi"},
                {"divergence": "jsd"},
                {"target": "best"},
                {"target": "min-logit"},
                {"update": "switch"},
            )
        ),
        *(
            (
                {**changes, "mixup": 0.2},
                "needs one label for each image, and --mixup gives each two",
            )
            for changes in (
                {"divergence": "dkd"},
                {"divergence": "nkd"},
                {"target": "best"},
                {"gate": "correct"},
                {"update": "switch"},
            )
        ),
        ({"gate": "correct", "labelled_fraction": 0.5}, "needs labels, but --kl-images all has a"),
        (
            {"update": "switch", "cohort": ("3",)},
            "--update switch is made for two peers, not for 3",
        ),
        ({"update": "switch", "frozen_peers": ("x",)}, "of two peers, not of averages or frozen"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "both 0, so there is nothing to learn"),
        ({"ce_weight": 0.0, "burn_in": 5}, "--ce-weight 0 leaves nothing to learn in the 5 steps"),
        ({"kl_ramp": "sigmoid"}, "--kl-ramp sigmoid has no effect without --kl-warmup"),
        ({"links": "ring", "exchange": "sum"}, "--links weighs every peer separately, but --exch"),
        ({"exchange": "sum", "exchange_dtype": "bf16"}, "--exchange-dtype bf16 rounds logits, but"),
        ({"links": "frozen"}, "--links frozen needs --frozen-peers"),
        ({"kl_images": "labelled"}, "--kl-images labelled needs --labelled-fraction below 1"),
        ({"tf32": True, "float64": True}, "--tf32 has no effect with --float64: drop one"),
        (
            {"compile": "off", "compile_mode": "max-autotune"},
            "--compile-mode max-autotune has no effect without",
        ),
        ({"resume": "auto"}, "--resume auto needs --output-dir"),
        ({"grad_accum": 9, "batch_size": 8}, r"--grad-accum is 9; it must be at most .*size \(8\)"),
        ({"cohort": ()}, "--cohort is .*; it must be at least one network"),
        ({"eval_every": "often"}, "--eval-every 'often' is not an interval: write optimizer steps"),
        ({"save_every": "0ep"}, "--save-every '0ep' is not an interval"),
        ({"save_every": "1.5ep"}, "--save-every '1.5ep' is not an interval"),
    ],
    ids=str,
)
def test_a_conflict_is_refused_in_one_line(changes: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refusal:
        Config(**changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"update": "official", "grad_accum": 2},
        {"update": "official", "placement": "replicate"},
        {"update": "sequential", "kl_reduction": "sum"},
        {"low_memory": True, "placement": "split", "grad_accum": 2},
        {"links": "frozen", "frozen_peers": ("x",)},
        {"kl_images": "labelled", "labelled_fraction": 0.5},
        {"exchange_dtype": "bf16", "placement": "split", "links": "ring"},
        {"compile": "on", "compile_mode": "max-autotune"},
        {"resume": "auto", "output_dir": "x"},
        {"save_every": "1.5min", "eval_every": "2ep"},
    ],
    ids=str,
)
def test_what_goes_together_is_accepted(changes: dict) -> None:
    assert Config(**changes).changed(seed=2).changed(seed=0) == Config(**changes)


# ---------------------------------------------------------------- resuming


def test_a_run_resumes_with_its_own_flags() -> None:
    for name in OTHER:
        config, _ = with_and_without(name)
        assert config.differences(config) == config.refused_on_resume(config) == {}


@pytest.mark.parametrize("name", OTHER)
def test_resuming_may_change_what_does_not_change_the_result(name: str) -> None:
    config, saved = with_and_without(name)
    section = next((s for s, one in config.sections.items() if name in vars(one)), None)
    owners = [(config, saved)]
    owners += [(one, saved.sections[title]) for title, one in config.sections.items()]
    (pair,) = [(vars(one)[name], vars(two)[name]) for one, two in owners if name in vars(one)]
    assert pair[0] == OTHER[name] != pair[1]
    difference = {name: pair}
    free = section in ("compute", "run")
    assert config.differences(saved) == ({} if free else difference)
    # What a data set holds is compared instead of its name, wherever it lies. And up to here no
    # image was met that could not be read.
    refused = {} if free or name in ("max_steps", "dataset", "bad_images") else difference
    assert config.refused_on_resume(saved) == refused


def test_resuming_may_stop_at_another_step_and_have_more_epochs() -> None:
    saved = Config(epochs=10, max_steps=100)
    for changes in ({"epochs": 11}, {"max_steps": 99}, {"max_steps": 101}, {"max_steps": None}):
        assert saved.changed(**changes).refused_on_resume(saved) == {}
        assert saved.changed(**changes).differences(saved)  # another result all the same
    assert saved.changed(epochs=9).refused_on_resume(saved) == {"epochs": (9, 10)}
    both = saved.changed(epochs=11, max_steps=None, lr=0.2)
    assert both.refused_on_resume(saved) == {"lr": (0.2, 0.1)}


def test_evaluations_count_where_they_decide_when_training_ends() -> None:
    saved = Config(early_stop=2, val_fraction=0.1)
    other, found = saved.changed(eval_every="500"), {"eval_every": ("500", "1ep")}
    assert other.differences(saved) == other.refused_on_resume(saved) == found
    both = saved.changed(early_stop=None), other.changed(early_stop=None)
    assert both[1].differences(both[0]) == both[1].refused_on_resume(both[0]) == {}


@pytest.mark.parametrize("schedule", ["step", "milestones", "constant", "cosine", "poly"])
def test_a_rate_that_depends_on_the_last_epoch_forbids_more_of_them(schedule: str) -> None:
    drops = {"lr_milestones": (5,)} if schedule == "milestones" else {}
    saved = Config(epochs=10, lr_schedule=schedule, **drops)
    refused = {"epochs": (20, 10)} if schedule in ("cosine", "poly") else {}
    assert saved.changed(epochs=20).refused_on_resume(saved) == refused
    # The number of steps only ends the run, whatever the schedule.
    assert saved.changed(max_steps=5).refused_on_resume(saved) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_schedule": "milestones"}, "--lr-schedule milestones needs --lr-milestones, the epo"),
        (
            {"lr_milestones": (9, 12.5)},
            "--lr-milestones 9 12.5 needs --lr-schedule milestones, not",
        ),
        (
            {"lr_schedule": "milestones", "lr_milestones": (9, 8)},
            "--lr-milestones 9 8 is out of order: each must be above the one before",
        ),
        ({"warmup": 4, "epochs": 4}, "--warmup 4 is not below --epochs 4, so the rate would never"),
        ({"opt_args": ("eps",)}, "--opt-args 'eps' is not KEY=VALUE, such as eps=1e-6"),
        ({"peer_opt": ("lr=1",)}, "--peer-opt 'lr=1' is not PEER:KEY=VALUE, such as mobilenet-0"),
        ({"peer_opt": ("a-0:lr",)}, "--peer-opt a-0: 'lr' is not KEY=VALUE, such as eps=1e-6"),
        (
            {"exchange_every": 2, "update": "official"},
            "--exchange-every 2 needs --update simultaneous: with official, peers are updated by",
        ),
        (
            {"exchange_every": 2, "update": "switch"},
            "--exchange-every 2 needs --update simultaneous: with switch, peers are updated by",
        ),
        (
            {"exchange_every": 2, "teach_with": "ema", "ema": 0.9},
            "--exchange-every 2 teaches with the weights of the last exchange, and --teach-with",
        ),
        (
            {"exchange_every": 2, "links": "frozen", "frozen_peers": ("runs/wrn",)},
            "--exchange-every 2 is about what peers teach each other, and with --links frozen only",
        ),
        (
            {"exchange_every": 2, "batch_norm": "local"},
            "--exchange-every 2 needs --batch-norm group: weights of the last exchange predict by",
        ),
        (
            {"exchange_every": 2, "exchange": "sum"},
            "--exchange sum has no effect with --exchange-every 2, which sends weights: drop one",
        ),
        (
            {"exchange_every": 2, "exchange_dtype": "bf16"},
            "--exchange-dtype bf16 has no effect with --exchange-every 2, which sends weights",
        ),
        (
            {"burn_in": 5, "max_steps": 5},
            "--burn-in 5 is not below --max-steps 5, so the KL term would never begin: lower it",
        ),
        ({"teach_with": "ema"}, "--teach-with ema needs --ema, the decay of the averages"),
        (
            {"teach_with": "ema", "ema": 0.9, "update": "official"},
            "--teach-with ema needs --update simultaneous: with official, peers learn from weights",
        ),
        (
            {"keep": "best", "val_split": "none"},
            "--keep best needs --val-fraction above 0, or a --val-split: the test split is for",
        ),
        (
            {"early_stop": 3, "val_split": "none"},
            "--early-stop 3 needs --val-fraction above 0, or a --val-split: the test split is for",
        ),
        ({"val_split": "train"}, "--val-split and --train-split are both 'train': validation"),
        (
            {"val_split": "held", "val_fraction": 0.1},
            "--val-fraction 0.1 cuts a validation split from the training images, and --val-split",
        ),
        ({"mean": (0.5, 0.5)}, "--mean has 2 values; it needs three: red, green and blue"),
        (
            {"image_size": 64, "eval_resize": 60},
            "--eval-resize 60 is below --image-size 64, which is cut out of it",
        ),
        (
            {"mixup": 0.2, "labelled_fraction": 0.5},
            "--mixup mixes labels, but with --labelled-fraction 0.5 some images have none: drop",
        ),
        ({"augment": ("none", "flip")}, "--augment none flip: none stands alone"),
        ({"augment": ()}, "--augment names nothing: write none, or leave it out"),
        ({"lr": 10**400}, "--lr is inf; it must be a finite number"),
        ({"epochs": 2**63}, "--epochs is 9223372036854775808; it must be below 9,223,372,036,854"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_be_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Config(**changes)
    assert str(refusal.value).startswith(said)


def test_the_usual_rate_is_that_of_the_optimizer() -> None:
    rates = {name: Config(optimizer=name).optim.lr for name in ("sgd", "momentum", "adamw", "lion")}
    assert rates == {"sgd": 0.1, "momentum": 0.1, "adamw": 0.001, "lion": 0.001}
    assert Config(optimizer="adamw", lr=0.1).optim.lr == 0.1


def test_a_peer_has_settings_of_its_own() -> None:
    given = ("a-0:lr=.01,weight-decay=0", "b-0:optimizer=adamw,betas=0.8,0.9,eps=1e-6", "a-0:lr=2")
    optim = Config(peer_opt=given, opt_args=("maximize=False",), momentum=0.5).optim
    assert optim.of_peer("c-0") is optim
    first, second = optim.of_peer("a-0"), optim.of_peer("b-0")
    assert (first.lr, first.weight_decay, first.momentum, first.optimizer) == (2, 0, 0.5, "sgd")
    assert first.opt_args == ("maximize=False",)
    # Another optimizer has its own usual rate, and none of the arguments of the shared one.
    assert (second.lr, second.weight_decay, second.optimizer) == (0.001, 5e-4, "adamw")
    assert second.opt_args == ("betas=0.8,0.9", "eps=1e-6")


def test_a_section_without_rules_of_its_own_refuses_what_changes_the_result() -> None:
    @dataclasses.dataclass(frozen=True)
    class Colour(Section):
        title = "colour"
        changes_result = True

        hue: int = dataclasses.field(default=0, metadata={"argparse": {}, "range": [0, 1]})

    assert Colour(1).refused_on_resume(Colour(0)) == {"hue": (1, 0)}
    with pytest.raises(UsageError, match="--hue is 2"):
        Colour(2)


def test_differences_in_words() -> None:
    config = Config(lr=0.06, cohort=("resnet8", "wrn_16_2"), cpu=True)
    text = differences_text(config.differences(Config(lr=0.05)))
    assert text == (
        "was started with --cohort 2, --lr 0.05, but this command says --cohort resnet8 wrn_16_2, "
        "--lr 0.06"
    )
    assert differences_text({"teachers": ("a", "b")}) == (
        "was started with teachers b, but this command says teachers a"
    )
