"""Processes that a command starts by itself: signals, exit codes, and the run that they train."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import dml_accel
from dml_accel import cli
from dml_accel.analysis import compare as comparing
from dml_accel.analysis.planned import plan_runs
from dml_accel.cli.parser import parse
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.core.host import cores, ignoring_hangup
from dml_accel.core.versions import Caller
from dml_accel.distributed import children, environment, launch
from dml_accel.distributed.children import _Children
from dml_accel.distributed.rules import Work
from dml_accel.training import setup
from dml_accel.training import train as training
from dml_accel.training.run_folder import SavedRun
from tests import helpers
from tests.helpers import (
    BIN,
    PATIENCE,
    assert_same_state,
    launched,
    load,
    saved_steps,
    status_of,
    wait_until,
    workers,
)

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes in /proc")
needs_two_cores = pytest.mark.skipif(cores() < 2, reason="--processes 2 needs two cores")
AGAIN = "the same command with --resume auto"


# ---------------------------------------------------------------- starting and waiting


def started(script: str, *words: str, count: int = 2) -> _Children:
    """Children that run a script of Python, which finds its rank in RANK."""
    return _Children(count, [sys.executable, "-c", script, *words])


def soon(act: Callable[[], object], when: Callable[[], object]) -> threading.Thread:
    """Do something in another thread as soon as something is so."""

    def wait() -> None:
        until = time.monotonic() + PATIENCE
        while not when():
            assert time.monotonic() < until
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


SHOWN = """
import json, os, sys
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR DML_OWN_PROCESSES".split()
os.write(1, (json.dumps([[os.environ[name] for name in names], sys.argv[1:]]) + "\\n").encode())
"""


def test_children_are_as_under_torchrun_and_print_for_themselves(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = dict(os.environ)
    assert started(SHOWN, "a $$ b", "${local_rank}").wait(AGAIN) == 0
    said, errors = capfd.readouterr()
    assert errors == "" and dict(os.environ) == before
    own = [str(os.getpid())]
    assert sorted(map(json.loads, said.splitlines())) == [
        [[rank, rank, "2", "2", "localhost", *own], ["a $$ b", "${local_rank}"]] for rank in "01"
    ]


@pytest.mark.parametrize(("rank", "code"), [(0, 2), (1, 75)])
def test_the_exit_code_is_that_of_the_first_to_fail_which_ends_the_others(
    rank: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"import os, sys, time\nif os.environ['RANK'] == '{rank}': sys.exit({code})\n"
    begun = time.monotonic()
    assert started(script + "time.sleep(600)").wait(AGAIN) == code
    assert time.monotonic() - begun < 30
    assert capfd.readouterr() == ("", "")


# Ends with 75 one second after the first signal, and writes which ones it has got.
STOPPING = """
import os, signal, sys, time
got = []
for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(one, lambda number, _: got.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
path = sys.argv[1] + os.environ["RANK"]
open(path, "w").close()
while not got:
    time.sleep(0.01)
time.sleep(1)
with open(path, "w") as file:
    file.write(str(got))
# As a launcher ends all once one has failed, all wait for each other.
while not all(os.path.exists(name) and open(name).read() for name in sys.argv[2:]):
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_waited_for(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"got{rank}" for rank in range(2)]
    handlers = {one: signal.getsignal(one) for one in children._FORWARDED}

    def twice() -> None:  # as a scheduler sends it to a process, and to the group of it
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    sender = soon(twice, lambda: all(file.exists() for file in files))
    code = started(STOPPING, str(tmp_path / "got"), *map(str, files)).wait(AGAIN)
    sender.join()
    assert code == 75 and capfd.readouterr() == ("", "")
    assert [file.read_text() for file in files] == [str([int(number)])] * 2
    assert handlers == {one: signal.getsignal(one) for one in children._FORWARDED}


def test_a_signal_that_comes_before_the_children_is_not_lost() -> None:
    waiting = started("import time; time.sleep(600)")
    waiting._receive(signal.SIGTERM, None)
    assert waiting.wait(AGAIN) == 128 + signal.SIGTERM


def test_a_second_signal_ends_everything_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1] + '.got', 'w').close())\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').close()\n"
        "while True: time.sleep(600)\n"
    )
    files = [tmp_path / f"here{rank}" for rank in range(2)]
    first = soon(
        lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: all(file.exists() for file in files)
    )

    def later() -> None:
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)

    second = soon(later, (tmp_path / "here.got").exists)
    begun = time.monotonic()
    assert started(script, str(tmp_path / "here")).wait(AGAIN) == 128 + signal.SIGINT
    assert time.monotonic() - begun < 20  # the agent alone would wait for 30 seconds
    first.join()
    second.join()
    assert "Traceback" not in capfd.readouterr().err


def test_a_child_that_is_killed_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600)\n"
    )
    assert started(script).wait(AGAIN) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == (
        "error: rank 1 of 2 was killed by SIGKILL, so the run ends; the same command with --resume "
        "auto resumes it\n"
    )


# A child that is asked to stop says so; it ignores that its terminal is gone.
ORPHAN = """
import os, signal, sys, time
from dml_accel.distributed.children import begin
begin()
def stop(*_):
    open(sys.argv[1] + os.environ["RANK"] + ".stopped", "w").close()
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + os.environ["RANK"], "w").close()
time.sleep(600)
"""


def test_children_stop_if_their_command_is_killed(tmp_path: Path) -> None:
    parent = (
        "import sys\n"
        "from dml_accel.distributed.children import _Children\n"
        "_Children(2, [sys.executable, '-c', *sys.argv[1:]]).wait('')\n"
    )
    files = [tmp_path / f"here{rank}" for rank in range(2)]
    with launched(sys.executable, "-c", parent, ORPHAN, tmp_path / "here") as run:
        wait_until(lambda: all(file.exists() for file in files), run)
        run.kill()
        until = time.monotonic() + 20
        while not all(file.with_suffix(".stopped").exists() for file in files):
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_closed_terminal_ends_neither_the_command_nor_its_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "import signal, sys; sys.exit(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)"
    with ignoring_hangup():
        assert started(script).wait(AGAIN) == 0
    for name, value in {**LAUNCHED, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for starter in ("7", ""):
        monkeypatch.setenv(environment.OWN, starter)
        before = signal.getsignal(signal.SIGHUP)
        with launch.Stop() as stop:
            stop.listen()
            assert (signal.getsignal(signal.SIGHUP) == before) == bool(starter)


def test_a_process_that_nobody_has_started_so_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, handler = threading.active_count(), signal.getsignal(signal.SIGINT)
    monkeypatch.setenv(environment.OWN, "1")  # left over, without a world
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    children.begin()
    assert (threads, handler) == (threading.active_count(), signal.getsignal(signal.SIGINT))


PROGRAMS = [
    (["python", "train.py", "--lr", "1"], ["train.py", "--lr", "1"], ["train", "--lr", "1"]),
    (["python", "-O", "-m", "dml_accel", "plan"], ["/x/__main__.py", "plan"], ["plan"]),
    (["python", "/bin/dml-accel", "train"], ["/bin/dml-accel", "train"], ["train"]),
]


@pytest.mark.parametrize(("original", "words", "arguments"), PROGRAMS)
def test_the_program_is_started_as_this_one_was(
    original: list[str], words: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", words)
    assert children._program(arguments) == [sys.executable, *original[1:]]
    # Some other program has called ``cli.main`` with words of its own.
    command = [sys.executable, "-m", "dml_accel", "train", "--lr", "2"]
    assert children._program(["train", "--lr", "2"]) == command


# ---------------------------------------------------------------- how many, and what is refused


TINY = (
    "--cohort resnet8*2 --dataset digits --image-size 8 --train-limit 240 --batch-size 12 "
    "--epochs 3 --lr 0.05 --save-every 7 --eval-every 30 --compile off --cpu"
).split()
ALONE: dict[str, str] = {}
LAUNCHED = {"WORLD_SIZE": "1", "RANK": "0"}
REFUSED: list[tuple[str, dict[str, str], str]] = [
    ("--processes 0", ALONE, "--processes is 0; it must be auto or a whole number of at least 1"),
    ("--processes=-2", ALONE, "--processes is -2; it must be auto or a whole number"),
    ("--processes two", ALONE, "--processes is two; it must be auto or a whole number"),
    ("--processes 5", ALONE, "--processes 5 needs 5 cores, and this process can use 4"),
    ("--processes 3 --threads 2", ALONE, "--processes 3 of 2 threads needs 6 cores"),
    ("--processes 2", {"OMP_NUM_THREADS": "3"}, "--processes 2 of 3 threads needs 6 cores"),
    ("--processes 2", LAUNCHED, "but a launcher has started this one (1 in all): use one of the"),
    ("--processes 2", {"ACCELERATE_MIXED_PRECISION": "no"}, "but a launcher has started this one"),
    ("--processes 4 --grad-accum 4", ALONE, "4 processes, but only 3 images in a micro-batch"),
]


@pytest.mark.parametrize(("words", "variables", "message"), REFUSED)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_refused_in_one_line_before_anything_is_started(
    command: str,
    words: str,
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 4)
    monkeypatch.setattr(subprocess, "Popen", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = str(tmp_path / "run")
    assert cli.main([command, *TINY, *words.split(), "--output-dir", folder]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_a_call_in_python_and_a_gpu_are_refused_with_what_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="processes=2: a call in Python starts no processes; use"):
        dml_accel.train(cohort="resnet8*2", dataset="digits", processes=2, cpu=True)
    monkeypatch.setattr(launch, "runs_on_cpu", lambda _: False)
    config = Config(processes=2)
    with pytest.raises(UsageError, match="add --cpu, or for GPUs use accelerate launch --multi_gp"):
        launch.check_launch(config.numerics, config.compute, config.optim)


COMMAND = Caller("python train.py", arguments=("train",))
# What is not left to the rule: flags, variables, the number of a resumed run, the outcome.
FIXED: list[tuple[dict[str, Any], dict[str, str], int | None, int | None]] = [
    ({}, ALONE, None, None),
    ({}, ALONE, 3, 3),
    ({}, ALONE, 1, 1),
    ({}, ALONE, 5, 1),  # more than there are cores
    ({"threads": 2}, ALONE, 3, 1),
    ({"threads": 2}, ALONE, 2, 2),
    ({"processes": 2}, ALONE, 3, 2),
    ({"processes": 1}, ALONE, 3, 1),
    ({}, LAUNCHED, 3, 1),
    ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, 3, 1),
    ({}, {"OMP_NUM_THREADS": "1"}, None, 1),
    ({}, {"OMP_NUM_THREADS": "1"}, 2, 2),
    ({"threads": 1}, ALONE, None, 1),
    ({"placement": "replicate"}, ALONE, None, 1),
    ({"placement": "split"}, ALONE, None, None),
    ({"measure": True}, ALONE, None, 1),
    ({"processes": 2}, LAUNCHED | {"WORLD_SIZE": "2", environment.OWN: "7"}, 2, 1),
]


@pytest.mark.parametrize(("flags", "variables", "recorded", "expected"), FIXED)
def test_when_the_rule_does_not_decide(
    flags: dict[str, Any],
    variables: dict[str, str],
    recorded: int | None,
    expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "cores", lambda: 4)
    monkeypatch.setattr(setup, "can_repeat", lambda _: True)
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = Config(cpu=True, **flags)
    assert setup.processes_without_rule(config, COMMAND, recorded) == expected
    if "processes" not in flags:
        in_python = Caller("dml_accel.train()", in_python=True)
        assert setup.processes_without_rule(config, in_python, recorded) == 1
        monkeypatch.setattr(setup, "runs_on_cpu", lambda _: False)
        assert setup.processes_without_rule(config, COMMAND, recorded) == 1


@pytest.mark.parametrize(
    ("started", "arguments", "expected"),
    [
        (["train.py", "--cohort", "2"], ("train", "--cohort", "2"), True),
        (["dml-accel", "train", "--cohort", "2"], ("train", "--cohort", "2"), True),
        (["mine.py"], ("train", "--cohort", "2"), False),
        (["-"], ("train",), False),  # python - < mine.py
    ],
)
def test_only_a_command_that_can_be_repeated_starts_others(
    started: list[str], arguments: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", started)
    assert children.can_repeat(arguments) == expected


def test_images_that_do_not_fit_several_times_are_in_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "processes_to_start", lambda *_: 2)
    config = Config(cohort="resnet8*2", dataset="digits", image_size=8, cpu=True)
    for feed, images, expected in (
        ("memory", 10**6, 2),
        ("memory", 10**12, 1),
        ("loader", 10**12, 2),
    ):
        source: Any = SimpleNamespace(
            train=range(images), test=range(9), classes=range(10), feed=(feed, "")
        )
        assert setup.processes_by_rule(config, source, {}, 100) == expected


class StartedError(Exception):
    """In place of starting processes."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What processes would be started with; there are four cores, and nothing fixes a number."""
    found: list[Any] = []

    def start(count: int, arguments: tuple[str, ...], again: str) -> None:
        found[:] = [count, arguments, again]
        raise StartedError

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for owner in (training, comparing):
        monkeypatch.setattr(owner, "replace_by", start)
    monkeypatch.setattr(setup, "can_repeat", lambda _: True)
    for owner in (setup, launch):
        monkeypatch.setattr(owner, "cores", lambda: 4)
    return found


def test_the_rule_starts_processes_before_anything_is_written(
    tmp_path: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = iter([2, 1])
    monkeypatch.setattr(setup, "processes_to_start", lambda *_: next(counts))
    words = ["train", *TINY, "--output-dir", str(tmp_path / "run"), "--max-steps", "1"]
    with pytest.raises(StartedError):
        cli.main(words)
    assert asked[:2] == [2, tuple(words)]
    assert asked[2] == f"the same command with --output-dir {tmp_path / 'run'} --resume auto"
    assert not (tmp_path / "run").exists()
    line = "processes: 2 of 2 threads each, each for a part of the cohort (--processes 1 for one)"
    assert line in capsys.readouterr().err.splitlines()
    assert cli.main(words) == 0
    assert load(tmp_path / "run/results.json")["processes"] == 1


def test_a_comparison_is_one_choice_which_it_keeps(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[Work] = []

    def rule(work: Work, *_: Any) -> int:
        works.append(work)
        return 3

    monkeypatch.setattr(setup, "processes_to_start", rule)
    folder, methods = tmp_path / "runs", ["--methods", "independent", "mutual", "--seeds", "2"]
    words = ["compare", *TINY, "--max-steps", "1", *methods, "--output-dir", str(folder)]
    with pytest.raises(StartedError):
        cli.main(words)
    assert asked == [3, tuple(words), f"the same command with --output-dir {folder}"]
    (work,) = works
    assert (work.steps, set(work.costs)) == (4, {"resnet8-0", "resnet8-1"})
    assert not folder.exists()
    # One run has begun, in two.
    begun = folder / "mutual/seed-0"
    begun.mkdir(parents=True)
    flags = parse(["train", *words[1 : len(TINY) + 3]])
    flags.pop("subcommand")
    description = {"config": Config(**flags).as_dict(), "versions": {}}
    description["resolved"] = {"processes": 2}
    (begun / "config.json").write_text(json.dumps(description))
    with pytest.raises(StartedError):
        cli.main(words)
    assert asked[0] == 2 and len(works) == 1


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["independent"], 3),
        (["independent", "mutual", "jeffreys"], 3),
        (["mutual", "sequential"], 1),  # peers that take turns are in every process
    ],
)
def test_which_comparisons_have_processes(
    methods: list[str], expected: int, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "processes_to_start", lambda *_: 3)
    config = Config(cohort="resnet8*2", dataset="digits", image_size=8, cpu=True)
    plan = plan_runs(config, [config.cohort], methods, 2)
    source: Any = SimpleNamespace(
        train=range(240), test=range(60), classes=range(10), feed=("memory", "")
    )
    folder: Any = SimpleNamespace(unfinished=lambda: plan, saved=lambda _: SavedRun(Path("none")))
    costs: Any = defaultdict(dict)
    found = comparing._choose_processes(config, plan, source, costs, folder, COMMAND)
    assert found == expected
    folder.unfinished = list  # nothing is left to train
    assert comparing._choose_processes(config, plan, source, costs, folder, COMMAND) == 1


# ---------------------------------------------------------------- a whole run


@needs_proc
@needs_two_cores
def test_a_run_in_own_processes_is_that_of_torchrun_however_it_is_interrupted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Started beside another, stopped, resumed, killed, resumed: the same weights bit for bit."""
    own, other = tmp_path / "own", tmp_path / "torchrun"
    words = [*TINY, "--float64", "--resume", "auto"]
    launcher = [BIN / "torchrun", "--nproc_per_node", "2", "train.py"]
    with (
        launched(*launcher, *words, "--output-dir", other) as straight,
        launched(
            *(sys.executable, "train.py", *words, "--processes", "2", "--output-dir", own)
        ) as run,
    ):
        wait_until(lambda: '"event": "step"' in _text(own / "metrics.jsonl"), run)
        run.send_signal(signal.SIGUSR1)
        said, errors = run.communicate(timeout=PATIENCE)
        assert run.returncode == 75 and said == ""
        remedy = f"the same command with --output-dir {own} --resume auto resumes it"
        assert errors.splitlines()[-1] == f"stopped by SIGUSR1; {remedy}"
        assert errors.count("digits: 10 classes") == 1 and "Traceback" not in errors
        assert straight.communicate(timeout=PATIENCE) and straight.returncode == 0
    stopped = saved_steps(own)[-1]
    assert status_of(own)["status"] == "stopped" and 0 < stopped < 60

    # It goes on in as many, with --processes auto, and one of them is killed.
    def kill() -> None:
        os.kill(workers(os.getpid())[1], signal.SIGKILL)

    killer = soon(kill, lambda: saved_steps(own)[-1] > stopped)
    assert helpers.train(own, *words) == 128 + signal.SIGKILL
    killer.join()
    said, errors = capfd.readouterr()
    assert "processes: 2 of " in errors and "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        f"error: rank 1 of 2 was killed by SIGKILL, so the run ends; {remedy}"
    )
    assert helpers.train(own, *words) == 0
    said, _ = capfd.readouterr()
    assert said.count("peers:      ") == 1
    found, expected = (load(path / "results.json") for path in (own, other))
    assert (found["processes"], expected["processes"]) == (2, 1)
    assert found["world_size"] == expected["world_size"] == 2
    assert found["placement"] == expected["placement"]
    assert load(own / "config.json")["resolved"]["processes"] == 2
    assert helpers.train(tmp_path / "alone", *words) == 0
    for name in ("resnet8-0", "resnet8-1"):
        weights = [
            load_file(path / f"peers/{name}/model.safetensors")
            for path in (own, other, tmp_path / "alone")
        ]
        assert_same_state(*weights[:2])
        for key, value in weights[2].items():
            assert (value - weights[0][key]).abs().max() < 1e-9


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
