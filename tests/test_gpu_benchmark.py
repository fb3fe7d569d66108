"""The acceptance of a GPU: how parts are judged, given up, kept and reported; not the parts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.measuring import device
from dml_accel.core.errors import UsageError


def check(result: str, reason: str = "", name: str = "a") -> dict[str, Any]:
    return {"name": name, "result": result, "reason": reason, "seconds": 1.0}


PASSED, FAILED, SKIPPED = check("passed"), check("failed", "it differs"), check("skipped", "no GPU")


@pytest.mark.parametrize(
    ("checks", "code", "result", "reason"),
    [
        ([PASSED, PASSED], 0, "passed", "2 checks"),
        ([PASSED, SKIPPED, SKIPPED], 0, "passed", "1 checks; 2 skipped: no GPU"),
        ([SKIPPED, SKIPPED], 0, "skipped", "no GPU"),
        ([], 0, "skipped", "it made no check"),
        ([PASSED, FAILED], 0, "failed", "a: it differs"),
        ([FAILED, FAILED, SKIPPED], 0, "failed", "a: it differs (and 1 more)"),
        ([PASSED], None, "failed", "not done after 9 s in 'b'"),
        ([PASSED], -11, "failed", "its process ended with SIGSEGV in 'b': last words"),
        ([PASSED], 1, "failed", "its process ended with exit code 1 in 'b': last words"),
        ([FAILED], -9, "failed", "a: it differs (and 1 more)"),
    ],
)
def test_a_part_is_judged(checks: list, code: int | None, result: str, reason: str) -> None:
    found = {"checks": checks, "running": "b"}
    assert gpu.judge(found, code, 9, "more\nlast words\n\n") == (result, reason)


def test_a_part_that_hangs_is_given_up_and_what_it_printed_is_kept(tmp_path: Path) -> None:
    hangs = "import time; print('begun', flush=True); time.sleep(60)"
    code, log = gpu.run_child([sys.executable, "-c", hangs], tmp_path, 1.0)
    assert (code, log) == (None, "begun\n")


def test_every_check_is_written_and_a_failing_one_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "ON_CPU", True)
    found = []

    def crash() -> None:
        found.append(json.loads((tmp_path / gpu.FOUND).read_text())["running"])
        raise ValueError("two\nlines")

    def refuse() -> None:
        raise gpu_parts.SkippedError("needs scikit-learn")

    checks = gpu_parts.Checks(tmp_path)
    checks.run("crash", crash)
    checks.run("differ", lambda: gpu_parts.require(False, "differs by 1"))
    checks.run("numbers", lambda: {"images/s": 3.0})
    checks.run("refuse", refuse)
    checks.run("on a GPU", crash, on_gpu=True)
    written = json.loads((tmp_path / gpu.FOUND).read_text())
    assert found == ["crash"] and written["running"] is None
    told = [(one["name"], one["result"], one["reason"]) for one in written["checks"]]
    assert told == [
        ("crash", "failed", "ValueError: two lines"),
        ("differ", "failed", "differs by 1"),
        ("numbers", "passed", ""),
        ("refuse", "skipped", "needs scikit-learn"),
        ("on a GPU", "skipped", "needs a GPU"),
    ]
    assert written["checks"][2]["numbers"] == {"images/s": 3.0}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``ran`` and, by number, what a part comes to; nothing is run."""
    state: dict[str, Any] = {"ran": []}

    def run_part(number: int, seconds: float) -> dict[str, Any]:
        state["ran"].append(number)
        result = state.get(number, "passed")
        checks = [check(result) | {"numbers": {"images/s": 5.0}}] if number == 9 else []
        return {"result": result, "reason": "a | b", "seconds": 2.0, "checks": checks}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setenv("DML_TEST_DEVICE", "cpu")
    return state


def test_parts_that_passed_are_not_repeated(
    parts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rehearse", "--out", str(tmp_path / "new/gpu.json")]
    parts[5] = "failed"
    assert gpu.main([*words, "--parts", "1", "5"]) == 1
    assert parts["ran"] == [1, 5]
    assert gpu.main([*words, "--parts", "1", "9"]) == 1  # part 5 has still failed
    assert parts["ran"] == [1, 5, 9]
    parts[5] = "passed"
    assert gpu.main(words) == 0
    assert parts["ran"] == [1, 5, 9, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert gpu.main([*words, "--parts", "9", "--again"]) == 0
    assert parts["ran"][-1] == 9 and len(parts["ran"]) == 13
    said = capsys.readouterr().out
    assert "speed of four ResNet-32" in said and "images/s" in said
    report = (tmp_path / "new/gpu.md").read_text()
    assert "nothing here was run on a GPU" in report and r"a \| b" in report
    assert "| a      |          5 |" in report
    # Other versions: nothing that was kept counts.
    other = {"versions": {"torch": "9"}, "processor": "x", "cores": 1, "system": "y", "commit": "z"}
    monkeypatch.setattr("benchmarks.measuring.surroundings", lambda: other)
    assert gpu.main([*words, "--parts", "1"]) == 0
    assert parts["ran"][-1] == 1 and len(parts["ran"]) == 14
    assert list(json.loads((tmp_path / "new/gpu.json").read_text())["parts"]) == ["1"]


def test_no_part_is_begun_without_time(
    parts: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_text", None)  # a rehearsal writes nothing by itself
    assert gpu.main(["--rehearse", "--minutes", "0.1"]) == 0
    assert parts["ran"] == []
    assert capsys.readouterr().out.count("no time was left") == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rehearse", "--parts", "12"], "--parts 12: there are parts 1 to 11"),
        ([], "torch finds no GPU; --rehearse runs on a CPU"),
    ],
)
def test_what_cannot_be_run_is_refused(
    parts: dict,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        gpu.main(words)
    assert refusal.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("gpu", "it must be cpu or cuda"), ("cuda", "torch finds no GPU")]
)
def test_the_device_of_tests_and_benchmarks(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DML_TEST_DEVICE", name)
    with pytest.raises(UsageError, match=said):
        device()
