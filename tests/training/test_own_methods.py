"""A file of the user's with a divergence and a target: trained, launched, compared, resumed."""

import importlib.util
import itertools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.core.lessons import DIVERGENCES, TARGETS, allow_recorded
from dml_accel.training.resume import changed_sources
from dml_accel.training.setup import Checked, refuse_other_files
from tests.helpers import (
    DIGITS,
    ROOT,
    accelerate_launch,
    assert_same_state,
    launched,
    load,
    run_program,
    saved_steps,
    train,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("registry")

MINE = '''
import sys

import torch

import dml_accel
from dml_accel import cli

POWER = 2


@dml_accel.register_divergence("hellinger")
def hellinger(log_p, log_q):
    """1 - sum sqrt(p q)."""
    return 1 - ((log_p + log_q) / POWER).exp().sum(-1)


@dml_accel.register_divergence("brier")
class Brier(dml_accel.Divergence):
    """sum (p - q)^2."""

    def teach(self, log_p, labels):
        p = log_p.exp()
        return torch.cat([p, (p * p).sum(-1, keepdim=True), torch.ones_like(p[..., :1])], -1)

    def learn(self, log_q, taught, labels):
        p, squares, one = taught[..., :-2], taught[..., -2], taught[..., -1]
        q = log_q.exp()
        return squares - 2 * (p * q).sum(-1) + one * (q * q).sum(-1)


@dml_accel.register_target("largest")
def largest(logits, weights):
    """Class by class, the largest logit."""
    return logits.masked_fill((weights == 0)[..., None], -1e9).amax(0)


def unused():
    return 1


dml_accel.register_method("mine", "Hellinger at 2", divergence="hellinger", temperature=2)

if __name__ == "__main__":
    for words in sys.argv[1:-1] if sys.argv[-1] == "in turn" else ():
        assert cli.main(words.split()) == 0
    sys.exit(0 if sys.argv[-1] == "in turn" else cli.main())
'''
RUN = [*DIGITS, "--cohort", "resnet8*2", "--threads", "1"]
_count = itertools.count()


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., Path]:
    """Write the user's file, with changes, and import it here, as if it started the commands."""

    def write(*changes: tuple[str, str]) -> Path:
        path, text = tmp_path / "mine.py", MINE
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path.write_text(text)
        # A new file each time, because imports are kept by the time of the file.
        copy = tmp_path / f"mine-{next(_count)}.py"
        copy.write_text(text)
        spec = importlib.util.spec_from_file_location("mine", copy)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return path

    return write


def forget() -> None:
    """Be a command that the user's file has not started."""
    for name in ("hellinger", "brier"):
        DIVERGENCES.pop(name, None)
    TARGETS.pop("largest", None)


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in folder.glob("peers/*/model.safetensors")}


EDIT = ("POWER = 2\n", "POWER = 3\n")
OF_RUNS = {
    "pairs": "--divergence hellinger --placement replicate",
    "linear": "--divergence brier --placement split --exchange sum",
    "target": "--target largest --placement split",
}


def test_two_processes_take_the_steps_of_one(mine: Callable[..., Path], tmp_path: Path) -> None:
    path = mine()
    shared = [*RUN[:-2], "--batch-size", "11", "--max-steps", "3", "--float64"]
    words = {name: " ".join([*shared, flags]) for name, flags in OF_RUNS.items()}
    launch = accelerate_launch(2, path)
    runs = [f"train {one} --output-dir {tmp_path}/{name}-2" for name, one in words.items()]
    done = run_program(*launch, *runs, "in turn", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    for name, one in words.items():
        assert train(tmp_path / f"{name}-1", *one.split()) == 0
        single, both = (weights(tmp_path / f"{name}-{count}") for count in (1, 2))
        assert single.keys() == both.keys() and len(single) == 2
        for peer, right in single.items():
            for key, value in right.items():
                torch.testing.assert_close(both[peer][key], value, rtol=1e-9, atol=1e-9)
        descriptions = [load(tmp_path / f"{name}-{count}/config.json") for count in (1, 2)]
        # Imported or started, wherever it lies: what is hashed is the text.
        assert descriptions[0]["registered"] == descriptions[1]["registered"]
        assert descriptions[1]["placement"]["kind"] == ("replicate" if name == "pairs" else "split")


def test_a_killed_run_resumes_bit_for_bit_but_not_with_another_source(
    mine: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mine()
    words = [*RUN, "--divergence", "hellinger", "--max-steps", "24", "--save-every", "4"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, path, "train", *words, "--output-dir", killed]
    with launched(*command, PYTHONPATH=str(ROOT)) as run:
        wait_until(lambda: saved_steps(killed), run)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not (killed / "results.json").exists()
    assert train(whole, *words) == 0
    mine(EDIT)
    capsys.readouterr()
    assert train(killed, *words, "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert "another source of --divergence hellinger (sha256 " in said and "restore it" in said
    mine(("def unused():\n    return 1", "def unused():\n    return 2"))
    assert train(killed, *words, "--resume", "auto") == 0
    for peer, right in weights(whole).items():
        assert_same_state(weights(killed)[peer], right)
    # The finished run is compared as well.
    mine(EDIT)
    assert train(killed, *words, "--resume", "auto") == 2
    capsys.readouterr()
    forget()
    assert train(killed, *words, "--resume", "auto") == 2
    assert "python FILE.py" in capsys.readouterr().err


def test_methods_are_compared_over_seeds_and_read_without_the_file(
    mine: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine()
    folder = tmp_path / "compared"
    methods = "independent mutual hellinger largest mine".split()
    words = ["compare", *RUN, "--max-steps", "2", "--seeds", "2", "--output-dir", str(folder)]
    words += ["--methods", *methods]
    assert cli.main(words) == 0
    assert "Hellinger at 2" in (folder / "results.md").read_text()
    table = load(folder / "results.json")
    assert len(table["runs"]) == 10 and set(table["methods"]) == set(methods)
    assert "finished" in capsys.readouterr().err
    # An edit refuses the runs that use it, and nothing is trained or written.
    mine(EDIT)
    assert cli.main(words) == 2
    assert "hellinger/seed-0 was started with another source" in capsys.readouterr().err
    mine()
    run = folder / "mine/seed-1"
    again = ["train", "--config", str(run / "config.json"), "--max-steps", "1"]
    mine(EDIT)
    assert cli.main([*again, "--output-dir", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().err
    assert "the source of its --divergence hellinger (sha256 " in said and "has changed" in said
    # Commands that the file has not started read the runs, and train nothing.
    forget()
    assert cli.main(["report", str(folder), "--analyse", "0"]) == 0
    assert "hellinger" in (folder / "report.html").read_text()
    assert cli.main(["evaluate", str(run), "--cpu"]) == 0
    assert cli.main(["evaluate", str(run), "--cpu", "--checkpoint", "2"]) == 0
    assert cli.main(["export", str(run), "--peer", "resnet8-0", "--to", str(tmp_path / "x")]) == 0
    capsys.readouterr()
    assert cli.main([*again, "--output-dir", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "--divergence hellinger is not registered: start from the file" in said
    assert "from " + str(run / "config.json") in said
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- records


def test_a_forged_record_registers_nothing(tmp_path: Path) -> None:
    before = dict(DIVERGENCES), dict(TARGETS)
    forged: list[Any] = [None, [], {"divergence": []}, {"divergence": {"name": 1}}, {"target": "x"}]
    for record in forged:
        allow_recorded(record)
        allow_recorded({"divergence": record, "target": {"name": "a b"}})
    assert (dict(DIVERGENCES), dict(TARGETS)) == before
    allow_recorded({"divergence": {"name": "kl"}})
    assert dict(DIVERGENCES) == before[0]


def test_records_are_compared() -> None:
    one, other = {"name": "a", "sha256": "1" * 64}, {"name": "a", "sha256": "2" * 64}
    assert changed_sources({}, {}) == []  # of an older run, too
    assert changed_sources({"target": one}, {"registered": {"target": one}}) == []
    for ours, theirs, words in (
        ({"target": one}, {"target": other}, "222222222222, now 111111111111"),
        ({"target": one}, {}, "none, now 111111111111"),
        ({}, {"target": other}, "222222222222, now none"),
        ({"target": one}, {"target": 7}, "none, now"),
        ({"target": one}, [], "none, now"),
    ):
        (found,) = changed_sources(ours, {"registered": theirs})
        assert found.startswith("--target a (sha256 ") and words in found


class _Other:
    """The second of two processes, as ``refuse_other_files`` sees it: rank 0 has other sources."""

    def __init__(self, *records: object) -> None:
        self._records = [json.dumps(one) for one in records]

    def broadcast_text(self, text: str) -> str:
        return self._records.pop(0) if self._records[:1] != [""] else text

    def failed_rank(self, failed: bool) -> int | None:
        return 1 if failed else None


def test_ranks_with_other_sources_are_refused(digits: Any) -> None:
    mine = {"divergence": {"name": "own", "sha256": "a"}}
    checked = Checked([], digits, {}, {}, None, {}, registered=mine)
    starts: list[Any] = [{}, checked.teachers]
    facts = (digits.feed[0], checked.fingerprint, starts)
    refuse_other_files(checked, _Other(*facts, mine))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rank 1 has another source of the registered"):
        refuse_other_files(checked, _Other(*facts, {}))  # type: ignore[arg-type]
