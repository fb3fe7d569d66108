"""What users register is known by name everywhere: flags, help, methods, comparisons."""

from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

import dml_accel
from dml_accel import cli
from dml_accel.analysis.chosen import choose
from dml_accel.analysis.methods import METHODS, method_of
from dml_accel.cli.parser import parse
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.lessons import DIVERGENCES
from dml_accel.mutual.losses import mutual_loss

pytestmark = pytest.mark.usefixtures("registry")


def hellinger(log_p: Tensor, log_q: Tensor, power: float = 2.0) -> Tensor:
    """1 - sum (p q)^(1 / power).

    More of it.
    """
    return 1 - ((log_p + log_q) / power).exp().sum(-1)


def mean(logits: Tensor, weights: Tensor) -> Tensor:
    """The mean logits, once more."""
    return (weights[..., None] * logits).sum(0) / weights.sum(0)[:, None]


def register() -> None:
    dml_accel.register_divergence("hellinger")(hellinger)
    dml_accel.register_target("own-mean")(mean)
    dml_accel.register_method("mine", "At 2", divergence="hellinger", temperature=2)


# ---------------------------------------------------------------- known by name


def test_the_command_line_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    register()
    words = "train --divergence hellinger --divergence-args power=3 --target own-mean".split()
    assert parse(words)["divergence"] == "hellinger"
    assert parse(["compare", "--methods", "mine", "own-mean"])["methods"] == ["mine", "own-mean"]
    for command, lines in (
        ("train", ["hellinger: 1 - sum (p q)^(1 / power).", "The mean logits, once more"]),
        ("train", ["hellinger: power=2"]),
        ("compare", ["mine At 2", "hellinger 1 - sum (p q)^(1 / power)."]),
    ):
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for line in lines:
            assert line in said


def test_methods_are_behind_ours_in_the_order_of_registration() -> None:
    ours = [*METHODS]
    register()
    assert [*METHODS] == [*ours, "hellinger", "own-mean", "mine"]
    assert METHODS["hellinger"].changes == {"divergence": "hellinger"}
    register()
    assert [*METHODS] == [*ours, "hellinger", "own-mean", "mine"]
    chosen = choose(Config(), [("resnet8*3",)], ["all"])
    assert chosen.methods[-3:] == ("hellinger", "own-mean", "mine")
    config = Config(divergence="hellinger", temperature=2.0)
    assert method_of(config, 2, {}) == "mine"
    assert method_of(config.changed(temperature=3.0), 2, {}) == "hellinger, temperature 3.0"


def test_arguments_of_a_method_are_compared_as_they_are_written() -> None:
    register()
    dml_accel.register_method("cubic", "x", divergence="hellinger", divergence_args=["power=3"])
    config = Config(divergence="hellinger", divergence_args=["power=3"])
    assert method_of(config, 2, {}) == "cubic"


def test_methods_that_coincide_are_named() -> None:
    register()
    dml_accel.register_method("again", "The same", divergence="hellinger")
    chosen = choose(Config(), [("resnet8*3",)], ["independent", "hellinger", "again"])
    assert chosen.notes == ("again coincides with hellinger: ",)


def test_registering_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    register()
    logits, labels = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    before = mutual_loss(logits, labels, divergence="hellinger").kl

    @dml_accel.register_divergence("hellinger")
    def another(log_p: Tensor, log_q: Tensor) -> Tensor:
        """Twice that."""
        return 2 * hellinger(log_p, log_q)

    after = mutual_loss(logits, labels, divergence="hellinger").kl
    torch.testing.assert_close(after, 2 * before)
    assert METHODS["hellinger"].text == DIVERGENCES["hellinger"].text == "Twice that."
    # A method of that name that was asked for stays.
    dml_accel.register_method("hellinger", "Mine", divergence="hellinger", temperature=4)
    dml_accel.register_divergence("hellinger")(hellinger)
    assert METHODS["hellinger"].text == "Mine"


def test_a_method_of_ours_keeps_its_name() -> None:
    dml_accel.register_divergence("mutual")(hellinger)
    assert "divergence" not in METHODS["mutual"].changes
    assert Config(divergence="mutual").method.divergence == "mutual"


def test_a_class_does_not_inherit_a_text() -> None:
    class Own(dml_accel.Target):
        def contribute(self, logits: Tensor, labels: Tensor) -> Tensor:
            return logits

        def combine(self, mean: Tensor, labels: Tensor) -> Tensor:
            return mean

    dml_accel.register_target("own")(Own)
    assert METHODS["own"].text == "of test_methods.py"


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("kl", "is one of the package"),
        ("KL", "is one of the package"),
        ("a b", "a name has letters"),
        ("a=1", "a name has letters"),
        ("../x", "a name has letters"),
        ("", "a name has letters"),
        (hellinger, "a name has letters"),  # without brackets
    ],
)
def test_names_that_are_refused(name: Any, why: str) -> None:
    with pytest.raises(UsageError, match=f"divergence .*{why}"):
        dml_accel.register_divergence(name)


@pytest.mark.parametrize(
    ("name", "text", "flags", "why"),
    [
        ("dkd", "x", {"temperature": 2}, "method 'dkd' is one of the package"),
        ("all", "x", {"temperature": 2}, "method 'all' is one of the package"),
        ("own", "", {"temperature": 2}, "needs a text"),
        ("own", "x", {}, "sets no flag"),
        ("own", "x", {"lr": 0.1}, "cannot set lr; a method sets .*temperature"),
        ("own", "x", {"frozen_peers": "a"}, "cannot set frozen_peers"),
        ("own", "x", {"seed": 1, "tempratur": 2}, "cannot set seed, tempratur;"),
        ("own", "x", {"divergence": "other"}, "--divergence is other; it must be one of kl"),
        ("own", "x", {"temperature": "hot"}, "temperature is 'hot'"),
        ("own", "x", {"temperature": 0}, "--temperature is 0.0; it must be above 0"),
        ("own", "x", {"target": "best", "links": "ring"}, "--links must be full"),
    ],
)
def test_methods_that_are_refused(name: str, text: str, flags: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        dml_accel.register_method(name, text, **flags)
    assert "own" not in METHODS


def test_another_file_does_not_take_a_name() -> None:
    register()
    other = FunctionType(hellinger.__code__.replace(co_filename="other.py"), globals(), "other")
    other.__module__ = "other"
    with pytest.raises(UsageError, match=r"'hellinger' is registered by .*test_methods.py already"):
        dml_accel.register_divergence("hellinger")(other)


@pytest.mark.parametrize(
    "words",
    ["train --divergence own", "train --target own", "compare --methods own"],
)
def test_what_is_not_registered_is_named(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert "'own'" in said and "start from the file that registers it: python FILE.py" in said
    with pytest.raises(UsageError, match=r"own is unknown; known are: .*python FILE.py"):
        choose(Config(), [("resnet8*2",)], ["own"])
