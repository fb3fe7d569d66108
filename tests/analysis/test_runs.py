"""Finished runs are found once, read, and grouped by what can be compared."""

import shutil
from pathlib import Path

import pytest

from dml_accel import cli
from dml_accel.analysis.runs import find_runs, group_by_method, group_comparable, read_run
from dml_accel.core.errors import UsageError


def test_runs_are_found_once_and_grouped_by_what_may_be_compared(runs: Path) -> None:
    found = find_runs([runs, runs / "pair"])
    assert len(found) == 5
    groups = group_comparable(found)
    assert sorted(len(group) for group in groups) == [1, 4]
    methods = group_by_method(max(groups, key=len))
    assert [(name, len(ours)) for name, ours in methods.items()] == [
        ("independent", 2),
        ("mutual", 2),
    ]


def test_a_run_knows_its_cohort_and_what_it_took(runs: Path) -> None:
    run = read_run(runs / "alone")
    assert (run.cohort, run.nets, run.peers) == ("resnet8", ["resnet8"], ["resnet8-0"])
    assert list(run.peer_folders) == ["resnet8-0"]
    assert 0 < run.training_seconds < run.seconds
    assert not run.began_elsewhere


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
def test_a_run_that_cannot_be_read_is_named(runs: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    with pytest.raises(UsageError, match=str(tmp_path / "run")):
        find_runs([tmp_path])


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "there is no finished run in or below" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "x")]) == 2
    assert "is not a folder; name a folder of runs" in capsys.readouterr().err
