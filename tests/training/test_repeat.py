"""A run that is repeated: what its config.json keeps, and what is taken from it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from timm.layers import DropPath
from torch import nn

from dml_accel.core.config import Config
from dml_accel.core.config_file import ConfigFile
from dml_accel.core.settings import with_resolved
from dml_accel.models.spec import parse_cohort
from dml_accel.training import repeat
from dml_accel.training.repeat import _spread_matters, history
from dml_accel.training.setup import choose_ranks

# ---------------------------------------------------------------- runs that were resumed


def described(threads: int, earlier: Any = (), resume: str | None = "auto") -> dict[str, Any]:
    """What config.json holds of how steps were taken."""
    return {
        "config": Config(resume=resume, output_dir="new").as_dict(),
        "versions": {"torch": "2.15", "gpu": "x"},
        "resolved": {"world_size": 1, "threads": threads, "device": {"name": "a CPU"}},
        "earlier": list(earlier),
    }


def until(step: int, **was: Any) -> dict[str, Any]:
    return {"until_step": step, "was": was}


# What config.json held, the last step before the resumed ones, which have 4 threads; what is kept.
HISTORIES: dict[str, tuple[Any, int, list[dict[str, Any]]]] = {
    "the same": (described(4), 6, []),
    "other threads": (described(1), 6, [until(6, threads=1)]),
    "and before": (
        described(1, [until(3, threads=2)]),
        6,
        [until(3, threads=2), until(6, threads=1)],
    ),
    "and back": (described(1, [until(3, threads=4)]), 6, [until(3), until(6, threads=1)]),
    "two that have become one": (described(2, [until(3, threads=4)]), 3, []),
    "without a step": (described(1, [until(3, threads=2)]), 3, [until(3, threads=2)]),
    "from an older checkpoint": (described(1, [until(3, threads=2)]), 2, [until(2, threads=2)]),
    "forged": (described(1, [until(3), {"until_step": "x"}]), 6, [until(6, threads=1)]),
    "forged order": (described(1, [until(3), until(2)]), 6, [until(6, threads=1)]),
    "forged types": (described(1) | {"earlier": {"a": 1}}, 6, [until(6, threads=1)]),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_resumed_run_keeps_how_earlier_steps_were_taken(case: str, tmp_path: Path) -> None:
    before, step, kept = HISTORIES[case]
    (tmp_path / "config.json").write_text(json.dumps(before))
    config = Config(resume="auto", output_dir=str(tmp_path))
    assert history(config, tmp_path, step, described(4)) == {"earlier": kept, "continued": None}


def test_a_run_that_continues_another_says_so_and_keeps_its_history(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(described(1)))
    for given in (str(old), str(old / "checkpoints/step-00000006")):
        found = history(Config(resume=given, output_dir=str(new)), new, 6, described(4))
        assert found == {"earlier": [until(6, threads=1)], "continued": given}
    # When it is resumed itself, its flags no longer say where it comes from.
    new.mkdir()
    (new / "config.json").write_text(json.dumps(described(4) | found))
    config = Config(resume="auto", output_dir=str(new))
    assert history(config, new, 9, described(4)) == found
    lost = history(config, tmp_path / "lost", 6, described(4))["earlier"]
    assert lost[0]["was"]["threads"] is None


# ---------------------------------------------------------------- what is taken over


def test_networks_with_dropout_depend_on_how_they_are_spread() -> None:
    config = Config()
    for plain in (nn.Dropout(0.0), DropPath(0.0)):
        assert _spread_matters(config, {"a": nn.Sequential(plain)}) == ""
    for dropping in (nn.Dropout(0.1), DropPath(0.1)):
        assert _spread_matters(config, {"a": nn.Sequential(dropping)}) == "dropout"


RANKS = {"resnet8-0": [0], "resnet8-1": [1, 2]}
FLAGS = {"cohort": ("resnet8*2",), "placement": "split", "measure": True}
NO_RANKS: list[tuple[dict[str, Any], Any, int]] = [
    ({}, RANKS, 2),
    ({"measure": False}, RANKS, 3),
    ({"placement": "replicate"}, RANKS, 3),
    ({"cohort": ("resnet8*3",)}, RANKS, 3),
    ({}, None, 3),
    ({}, RANKS | {"resnet8-0": [0, 1]}, 3),
    ({}, RANKS | {"resnet8-0": ["0"]}, 3),
    ({}, RANKS | {"resnet8-0": [False]}, 3),
    ({}, RANKS | {"resnet8-1": [2, 1]}, 3),
]


def recorded(
    changes: dict[str, Any], ranks: Any, processes: int, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The ranks that a repeated run takes over."""
    monkeypatch.setattr(repeat, "launched_processes", lambda: processes)
    saved, config = Config(**FLAGS), Config(**FLAGS | changes)
    peers = [spec.name for spec in parse_cohort(config.cohort)]
    checked: Any = SimpleNamespace(names=peers)
    return repeat._recorded_ranks({"placement": {"ranks": ranks}}, config, saved, checked)


def test_measured_ranks_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in NO_RANKS:
        assert recorded(*case, monkeypatch) is None
    ranks = recorded({}, RANKS, 3, monkeypatch)
    assert ranks == RANKS
    # Without networks nothing could be timed, or counted.
    (tmp_path / "run.lock").touch()
    checked: Any = SimpleNamespace(source=SimpleNamespace(classes=["a"]))
    for blind, expected in ((None, ranks), (2, None)):
        processes: Any = SimpleNamespace(
            world_size=3, rank=1, failed_rank=lambda _, blind=blind: blind, broadcast_text=str
        )
        config = Config(**FLAGS | {"placement": "auto"})
        assert choose_ranks(config, checked, {}, processes, tmp_path, ranks) == expected


RESOLVED: list[tuple[dict[str, Any], dict[str, Any], set[str], dict[str, Any]]] = [
    ({}, {"device": {"type": "cpu"}}, set(), {"cpu": True}),
    ({}, {"device": {"type": "cuda"}}, set(), {"cpu": False}),
    ({}, {"device": "cpu"}, set(), {"cpu": False}),
    ({}, {"world_size": 2, "placement": "split"}, set(), {"placement": "split"}),
    ({}, {"world_size": 2, "placement": "split"}, {"update"}, {"placement": "auto"}),
    ({}, {"world_size": 3, "placement": "split"}, set(), {"placement": "auto"}),
    ({}, {"world_size": 2}, set(), {"placement": "auto"}),
    ({"placement": "replicate"}, {"world_size": 2}, set(), {"placement": "replicate"}),
]


# What a run's flags and its record say of processes that its command started, the cores and whether
# this command may start some; and what it is told.
STARTED: list[tuple[dict[str, Any], dict[str, Any], int, bool, str]] = [
    ({}, {"processes": 2}, 2, True, "2"),
    ({}, {"processes": 1}, 2, True, "1"),
    ({}, {}, 2, True, "1"),  # of a run from before there were any
    ({}, {"processes": 4}, 2, True, "auto"),
    ({}, {"processes": 2, "threads": 2}, 4, True, "2"),
    ({}, {"processes": 2, "threads": 2}, 3, True, "auto"),
    ({"processes": "2"}, {"processes": 2}, 2, False, "auto"),
    ({}, {"processes": "2"}, 2, True, "auto"),
]


@pytest.mark.parametrize(("flags", "resolved", "cores", "starts", "expected"), STARTED)
def test_as_many_processes_are_started_as_then(
    flags: dict[str, Any], resolved: dict[str, Any], cores: int, starts: bool, expected: str
) -> None:
    values = Config().as_dict() | flags
    file = ConfigFile(Path("config.json"), values, "", {"resolved": resolved})
    assert with_resolved(file, set(), 1, cores, starts).flags["processes"] == expected


@pytest.mark.parametrize(("flags", "resolved", "given", "expected"), RESOLVED)
def test_what_a_run_left_to_its_machine_is_filled_in(
    flags: dict[str, Any], resolved: dict[str, Any], given: set[str], expected: dict[str, Any]
) -> None:
    values = Config().as_dict() | flags
    file = ConfigFile(Path("config.json"), values, "", {"resolved": resolved})
    found = with_resolved(file, given, processes=2, cores=2).flags
    assert {name: found[name] for name in expected} == expected
