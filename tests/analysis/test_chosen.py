"""Which methods a comparison has, what is left out, and which coincide."""

import itertools

import pytest
import torch

from dml_accel.analysis.chosen import choose
from dml_accel.analysis.methods import IN_STAGES, METHODS, changes_of, peers_of
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.mutual.losses import mutual_loss

PAIR, TRIO = ("resnet8*2",), ("resnet8*3",)
NO_BASELINE = "differences are those to independent, which is not among the methods"
# These have other steps, links or stages, not another loss.
OTHERS = {"sequential", "official", "switokd", "okddip-leader", "codistillation", IN_STAGES}


def left_out(cohort: tuple[str, ...], **changes: object) -> dict[str, str]:
    return choose(Config(cohort=cohort, **changes), [cohort], ["all"]).left_out


@pytest.mark.parametrize(
    ("cohort", "changes", "missing"),
    [
        (TRIO, {}, "mean-prob switokd distill semi"),
        (PAIR, {}, "mean-prob mean-logit okddip-leader distill semi"),
        (TRIO, {"frozen_peers": ("x",)}, "mean-prob switokd semi"),
        (TRIO, {"labelled_fraction": 0.5}, "mean-prob switokd distill"),
        (
            TRIO,
            {"mixup": 0.2},
            "mean-prob kdcl-naive kdcl-minlogit dkd nkd correct-gate switokd distill semi",
        ),
        (
            TRIO,
            {"exchange": "sum"},
            "mean-prob jsd renyi kdcl-naive kdcl-minlogit okddip-leader switokd codistillation "
            "distill semi ensemble-distill",
        ),
        (TRIO, {"epochs": 1}, "mean-prob switokd distill semi ensemble-distill"),
    ],
    ids=str,
)
def test_all_are_those_that_can_be_had(
    cohort: tuple[str, ...], changes: dict, missing: str
) -> None:
    chosen = choose(Config(cohort=cohort, **changes), [cohort], ["all"])
    assert [*chosen.left_out] == missing.split()
    assert [*chosen.methods] == [name for name in METHODS if name not in chosen.left_out]
    assert chosen.lines == [f"left out: {name}: {why}" for name, why in chosen.left_out.items()]


def test_what_is_left_out_has_a_reason() -> None:
    pair, trio = left_out(PAIR), left_out(TRIO, placement="split")
    assert pair["distill"] == "it needs --frozen-peers, its teachers"
    assert pair["semi"] == "it needs --labelled-fraction below 1"
    assert pair["okddip-leader"] == "it needs at least 3 networks in --cohort, not 2"
    assert pair["mean-logit"].startswith("it coincides with mutual: the mean logits of one teacher")
    assert trio["switokd"] == "--update switch is made for two peers, not for 3"
    mixed = left_out(PAIR, mixup=0.2)["dkd"]
    assert mixed.startswith("--divergence dkd needs one label for each image, and --mixup")
    assert "leaves processes of --placement split idle" in trio["official"]


@pytest.mark.parametrize(
    ("cohort", "asked", "changes", "notes"),
    [
        (PAIR, ["mutual", "mean-prob"], {}, ["mean-prob coincides with mutual: ", NO_BASELINE]),
        (PAIR, ["mean-logit", "mutual"], {}, ["mutual coincides with mean-logit: ", NO_BASELINE]),
        (TRIO, ["mean-logit", "mutual", "independent"], {}, []),
        (
            TRIO,
            ["mean-logit", "mutual"],
            {"links": "ring"},
            ["mutual coincides with mean-logit: ", NO_BASELINE],
        ),
        (("resnet8",), ["independent", "mutual"], {}, ["mutual coincides with independent: "]),
        (
            PAIR,
            [IN_STAGES, "mean-prob", "mutual"],
            {},
            ["mutual coincides with mean-prob: ", NO_BASELINE],
        ),
    ],
)
def test_methods_that_are_asked_for_are_run_and_those_that_coincide_are_named(
    cohort: tuple[str, ...], asked: list[str], changes: dict, notes: list[str]
) -> None:
    chosen = choose(Config(cohort=cohort, **changes), [cohort], asked)
    assert [*chosen.methods] == asked and not chosen.left_out
    assert len(chosen.notes) == len(notes)
    assert all(map(str.startswith, chosen.notes, notes))


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (["okddip-leader"], {}, "--methods okddip-leader: it needs at least 3 networks in"),
        (["switokd"], {"cohort": TRIO}, "--methods switokd: --update switch is made for two peers"),
        (
            ["switokd"],
            {"mixed_precision": "fp16"},
            "--methods switokd: .* loss scaler of fp16 cannot",
        ),
        (["ensemble-distill"], {"early_stop": 2, "val_fraction": 0.1}, "without --early-stop"),
        (["ensemble-distill"], {"epochs": 1}, "--epochs 1 leaves nothing for two stages at equal"),
        (["ensemble-distill"], {"max_steps": 1}, "--max-steps 1 leaves nothing for two stages"),
        (["all", "mutual"], {}, "--methods all are all that can be had: name all alone"),
        (["kdcl-naive"], {"links": "ring"}, "--methods kdcl-naive: --target best is one target"),
    ],
)
def test_a_method_that_cannot_be_had_is_refused(
    asked: list[str], changes: dict, message: str
) -> None:
    config = Config(**({"cohort": PAIR} | changes))
    with pytest.raises(UsageError, match=message):
        choose(config, [config.cohort], asked)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("distill", "semi")])
def test_flags_that_are_given_hold_unless_the_method_sets_them(name: str) -> None:
    cohort = TRIO if METHODS[name].least > 2 else PAIR
    shared = Config(cohort=cohort, temperature=5.0, kl_warmup=3, epochs=24)
    made = shared.changed(**changes_of(shared, name)).method
    flags = METHODS[name].flags(24)
    assert made.temperature == flags.get("temperature", 5.0)
    assert made.kl_warmup == flags.get("kl_warmup", 3)


@pytest.mark.parametrize(
    ("cohort", "same"),
    [(PAIR, {"mean-prob": "mutual", "mean-logit": "mutual"}), (TRIO, {"mean-prob": "mutual"})],
    ids=str,
)
def test_what_coincides_has_the_same_gradients(
    cohort: tuple[str, ...], same: dict[str, str]
) -> None:
    """And what has not is not called the same: every other pair of methods differs."""
    chosen = choose(Config(cohort=cohort), [cohort], ["all"])
    coincides = {name for name, why in chosen.left_out.items() if "coincides" in why}
    assert coincides == same.keys()
    found = {
        name: gradient(Config(cohort=cohort).changed(**changes_of(Config(), name)))
        for name in (*chosen.methods, *same)
        if name not in OTHERS
    }
    for name, other in itertools.combinations(found, 2):
        distance = (found[name] - found[other]).abs().max()
        if same.get(name, name) == same.get(other, other):
            assert distance <= 1e-12, (name, other)
        else:
            assert distance > 1e-3, (name, other)


def gradient(config: Config) -> torch.Tensor:
    """The gradient of the losses of a batch by the logits of all peers, [K, B, C]."""
    method, generator = config.method, torch.Generator().manual_seed(0)
    shape = (peers_of(config), 16, 10)
    z = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 10, (16,), generator=generator)
    names = ("kl_weight", "ce_weight", "temperature", "target", "divergence", "standardize", "gate")
    flags = {name: getattr(method, name) for name in names}
    numbers = method.facts.values(method.divergence_args)
    total = mutual_loss(z, labels, divergence_args=numbers, **flags).total.sum()
    (found,) = torch.autograd.grad(total, z)
    return found
