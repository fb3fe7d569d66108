"""The run folder: its lock, its status, what may lie in it; and what a reader makes of it."""

import errno
import fcntl
import json
import os
import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dml_accel.core.errors import StoppedError, UsageError
from dml_accel.core.files import LARGEST_JSON
from dml_accel.training import status
from dml_accel.training.run_folder import RunFolder, SavedRun
from tests.helpers import load, status_of

HERE = socket.gethostname()
# By name, because the names of tests must be the same in every process.
PIDS: dict[object, int] = {"ours": os.getpid(), "parent": os.getppid()}
GONE = 2**22 + 1  # more than any process id
DEEP = "[" * 200_000  # deeper than Python's parser goes
OURS = '{"config": {}, "versions": {}}'


def seen(ago: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()


# ---------------------------------------------------------------- what may lie in the folder


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ([], ""),
        ([".DS_Store", ".gitkeep", "lost+found/", "run.lock", "logs/mine.out"], ""),
        (["slurm-123.out", "job.err", "nohup.log", "log.txt", "train.sh"], ""),
        (["cat.jpg"], "holds cat.jpg but no run; name another folder"),
        (["train/cat/1.jpg", "test/"], "holds test, train but no run; name another folder"),
        (["a", "b", "c", "d", "e", ".f"], "holds a, b, c and 2 more but no run; name"),
        (["peers/mine"], "holds peers but no run; name"),
        (["checkpoints/model.pt"], "holds checkpoints but no run; name"),
        (["config.json={}"], "holds config.json but no run; name"),
        (['config.json={"config": 1}'], "holds config.json but no run; name"),
        (['status.json={"status": "up"}'], "holds status.json but no run; name"),
        (["notes.txt/"], "holds notes.txt but no run; name"),
        ([f"config.json={OURS}"], r"already holds a run \(config.json\); name a new folder, or"),
        (["config.json/"], "holds config.json but no run; name"),
        (["config.json=" + DEEP], r"already holds a run \(config.json\)"),
        (["config.json=" + " " * (LARGEST_JSON + 1)], r"already holds a run \(config.json\)"),
        (["config.json="], r"already holds a run \(config.json\)"),
        (["checkpoints/step-00000001/"], r"already holds a run \(checkpoints\)"),
    ],
    ids=lambda one: str(one)[:60],
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, names: list[str], refused: str
) -> None:
    for name in names:
        path, _, content = name.partition("=")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (tmp_path / path).mkdir()
        else:
            (tmp_path / path).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    if not refused:
        for resumes in (False, True):
            RunFolder(tmp_path, "", resumes=resumes)
        return
    with pytest.raises(UsageError, match=refused):
        RunFolder(tmp_path, "")
    if "already holds a run" in refused:
        RunFolder(tmp_path, "", resumes=True)
    else:
        with pytest.raises(UsageError, match="but no run that could be resumed; name another fol"):
            RunFolder(tmp_path, "", resumes=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("inside", ["", "runs/new", "train/cat"])
def test_no_run_is_put_into_its_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "set").mkdir()
    said = "where images are read from, and would change what is read: name a folder elsewhere"
    with pytest.raises(UsageError, match=said):
        RunFolder(tmp_path / "set" / inside, "", images=[tmp_path / "link"])
    monkeypatch.chdir(tmp_path / "set")
    with pytest.raises(UsageError, match=said):
        RunFolder(None, "", images=[Path(".")])
    RunFolder(tmp_path / "settled", "", images=[tmp_path / "set"])


# ---------------------------------------------------------------- the lock


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_run_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_locks(monkeypatch)
    with RunFolder(tmp_path / "a", ""), RunFolder(tmp_path / "b", "", part=True):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'a'} cannot be locked (its file system has no flock: Function not "
        "implemented): make sure that no other process writes there\n"
    )
    (tmp_path / "a/run.lock").unlink()
    (tmp_path / "a/run.lock").mkdir()
    with pytest.raises(UsageError, match="run.lock cannot be opened: Is a directory; it shows"):
        RunFolder(tmp_path / "a", "", resumes=True).__enter__()


@pytest.mark.parametrize(
    ("host", "pid", "ago", "outcome"),
    [
        (HERE, "parent", 5, "refused"),
        (HERE, "parent", 500, "silent"),
        (HERE, GONE, 5, "silent"),
        (HERE, "ours", 5, "silent"),
        ("elsewhere", 42, 5, "named"),
        ("elsewhere", 42, 500, "silent"),
    ],
)
def test_without_locks_the_last_sign_of_life_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    pid: int | str,
    ago: float,
    outcome: str,
) -> None:
    refuse_locks(monkeypatch)
    pid = PIDS.get(pid, pid)
    found = {"status": "running", "step": 3, "host": host, "pid": pid, "heartbeat": seen(ago)}
    (tmp_path / "status.json").write_text(json.dumps(found))
    folder = RunFolder(tmp_path, "", resumes=True)
    if outcome == "refused":
        with pytest.raises(UsageError, match=f"is in use by process {pid} on {host}, last sign"):
            folder.__enter__()
        return
    with folder:
        pass
    assert (f"such as process {pid} on {host}" in capsys.readouterr().err) == (outcome == "named")


# ---------------------------------------------------------------- the status


def test_a_running_run_shows_its_steps_and_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_SECONDS_BETWEEN_BEATS", 0.01)
    renewed, whole = threading.Event(), status.write_json

    def note(path: Path, content: dict) -> None:
        whole(path, content)
        if content["step"] == 7:
            renewed.set()

    monkeypatch.setattr(status, "write_json", note)
    with pytest.raises(StoppedError), RunFolder(tmp_path, "") as folder:
        folder.begin(None, again=False)
        folder.has_taken(7)  # within an epoch: no event
        assert renewed.wait(20)
        found = load(tmp_path / "status.json")
        assert (found["status"], found["step"]) == ("running", 7)
        assert (found["host"], found["pid"]) == (HERE, os.getpid())
        for name in ("time", "heartbeat"):
            at = datetime.fromisoformat(found[name])
            assert abs((datetime.now(UTC) - at).total_seconds()) < 60
        assert SavedRun(tmp_path).state == "running at step 7"
        raise StoppedError("stopped by SIGTERM")
    after = {"status": "stopped", "reason": "stopped by SIGTERM", "step": 7}
    assert status_of(tmp_path) == after
    assert [thread for thread in threading.enumerate() if "_beat" in str(thread)] == []


def test_a_status_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(tmp_path, "") as folder:
        folder.begin(None, again=False)
        folder.write("results.json", {"steps": 1})
        monkeypatch.setattr(status, "write_json", full)
    assert "status.json: [Errno 28] No space left on device\n" in capsys.readouterr().err
    assert SavedRun(tmp_path).status == "done"  # it has results
    folder = RunFolder(tmp_path, "", resumes=True)
    monkeypatch.undo()
    folder.set_done()
    assert load(tmp_path / "status.json")["status"] == "done"


def test_a_failure_after_the_results_leaves_the_run_done(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="tracker"), RunFolder(tmp_path, "") as folder:
        folder.begin(None, again=False)
        folder.write("results.json", {"steps": 1})
        raise OSError("the tracker cannot be closed")
    assert load(tmp_path / "status.json")["status"] == "done"


@pytest.mark.parametrize(
    ("lock", "host", "pid", "ago", "alive"),
    [
        ("held", HERE, 42, 5, True),
        ("held", HERE, 42, 5000, True),
        ("free", HERE, "ours", 5, False),
        ("free", "elsewhere", 42, 5, True),  # whose locks may not be seen here
        ("free", "elsewhere", 42, 500, False),
        ("none", HERE, "ours", 5, True),
        ("none", HERE, "ours", 500, False),
        ("none", HERE, GONE, 5, False),
        ("none", HERE, 10**30, 5, False),
        ("none", "elsewhere", 42, 5, True),
        ("none", "elsewhere", 42, 500, False),
        ("absent", "elsewhere", 42, 500, False),
    ],
)
def test_a_run_that_was_killed_is_told_from_one_that_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lock: str,
    host: str,
    pid: int | str,
    ago: float,
    alive: bool,
) -> None:
    at, pid = seen(ago), PIDS.get(pid, pid)
    found = {"status": "running", "step": 3, "host": host, "pid": pid, "heartbeat": at}
    (tmp_path / "status.json").write_text(json.dumps(found))
    if lock != "absent":
        (tmp_path / "run.lock").write_text("")
    if lock == "none":
        refuse_locks(monkeypatch)
    expected = "running at step 3" if alive else f"interrupted at step 3, last sign of life {at}"
    with open(tmp_path / "status.json" if lock != "held" else tmp_path / "run.lock") as file:
        if lock == "held":
            fcntl.flock(file, fcntl.LOCK_EX)
        assert SavedRun(tmp_path).state == expected
    (tmp_path / "results.json").write_text("{}")
    assert (SavedRun(tmp_path).state, SavedRun(tmp_path).is_done) == ("done at step 3", True)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"status": "running", "heartbeat": "x"}'])
def test_a_damaged_status_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert SavedRun(tmp_path).state in ("not started", "interrupted, last sign of life x")


def test_control_sequences_in_a_folder_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\n"
    found = {"status": "running", "heartbeat": f"x{evil}", "host": evil, "pid": evil}
    (tmp_path / "run.lock").write_bytes(f"process 1 on {evil * 999}\xe9".encode("latin-1"))
    said = [status.writer_of(found)]
    for words in ("running", f"up{evil}"):
        (tmp_path / "status.json").write_text(json.dumps(found | {"status": words}))
        said.append(SavedRun(tmp_path).state)
    (tmp_path / "status.json").unlink()
    folder = RunFolder(tmp_path, "")
    with open(tmp_path / "run.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is in use by process 1 on ") as refused, folder:
            pass
    said.append(str(refused.value))
    assert all(text.isprintable() and len(text) < 999 for text in said), said


@pytest.mark.parametrize("line", [DEEP, "[3]", "torn", '{"step": NaN}', "\xe9"])
def test_records_that_cannot_be_read_are_refused_or_replaced(tmp_path: Path, line: str) -> None:
    records = tmp_path / "metrics.jsonl"
    records.write_bytes(b'{"event": "step", "step": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match="metrics.jsonl (is not valid JSON|does not hold a JSON)"):
        _ = SavedRun(tmp_path).events
    (tmp_path / "config.json").write_text(OURS)
    for more in ("", '{"event": "step", "step": 1e999}\n'):
        records.write_bytes(records.read_bytes() + more.encode())
        with pytest.raises(StoppedError), RunFolder(tmp_path, "", resumes=True) as folder:
            folder.begin(2, again=False)
            raise StoppedError("enough")
        assert SavedRun(tmp_path).events == [{"event": "step", "step": 1}]
