"""Every run has a precision of its own, whatever else in the process uses Accelerate."""

from collections.abc import Iterator

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from dml_accel.core.config import Config
from dml_accel.distributed.processes import Processes

HALF = ("bf16", "no", None, "bf16")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin without what other tests have left, and leave nothing."""
    for kind in (AcceleratorState, PartialState):
        monkeypatch.setattr(kind, "_shared_state", {})
    yield


def processes(precision: str | None) -> Processes:
    config = Config(mixed_precision=precision, cpu=True)
    return Processes(config.numerics, config.compute)


def is_cast(one: Processes) -> bool:
    """Whether a network that is prepared now computes in half precision."""
    net = one.accelerator.prepare_model(nn.Linear(2, 2), evaluation_mode=True)
    return "_original_forward" in vars(net)


@pytest.mark.parametrize("closes", [True, False])
def test_runs_after_each_other_have_the_precision_that_they_ask_for(closes: bool) -> None:
    runs = []
    for precision in HALF:
        runs.append(processes(precision))
        if closes:
            runs[-1].close()
            assert not AcceleratorState._shared_state and not PartialState._shared_state
    for precision, one in zip(HALF, runs, strict=True):
        assert one.mixed_precision == (precision or "no")
        assert is_cast(one) == (precision == "bf16")


def test_an_accelerator_of_the_user_stays_what_it_is() -> None:
    theirs = Accelerator(mixed_precision="bf16", cpu=True)
    for precision in ("no", "bf16"):
        one = processes(precision)
        assert (one.mixed_precision, theirs.mixed_precision) == (precision, "bf16")
        assert is_cast(one) == (precision == "bf16")
        one.close()
        assert theirs.mixed_precision == Accelerator().mixed_precision == "bf16"
        assert "_original_forward" in vars(theirs.prepare_model(nn.Linear(2, 2)))


def test_an_accelerator_of_the_user_can_follow_a_run() -> None:
    processes("no").close()
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
