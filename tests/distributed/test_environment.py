"""What launchers say in environment variables: one process, a world, or one line (law 9)."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dml_accel.cli import main
from dml_accel.core.errors import UsageError
from dml_accel.distributed import environment
from dml_accel.distributed.environment import World
from tests.helpers import ROOT
from tests.helpers import environment as clean_environment

# Rank 1 of 2, as torchrun starts it.
PAIR = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
PAIR |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
ALONE = World()
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs Linux's /proc"
)


def but(**changes: str | None) -> dict[str, str]:
    """The variables of ``PAIR`` with changes; None leaves one out."""
    return {name: value for name, value in (PAIR | changes).items() if value is not None}


@pytest.fixture(autouse=True)
def only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from an environment without any launcher, and leave it as it was."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    launcher = ("ACCELERATE_", "TORCHELASTIC_", "SLURM_", "PMI", "OMPI_", "MV2_", "MPI_")
    for name in list(os.environ):
        if name.startswith(launcher) or name in {*PAIR, "OMP_NUM_THREADS"}:
            del os.environ[name]


# ---------------------------------------------------------------- the world

WORLDS = {
    "plain": ({}, ALONE),
    "empty": (dict.fromkeys(PAIR, ""), ALONE),
    "blank": (dict.fromkeys(PAIR, " "), ALONE),
    "an address is left over": ({"MASTER_ADDR": "x", "MASTER_PORT": "99999"}, ALONE),
    "a restart is left over": ({"TORCHELASTIC_RESTART_COUNT": "3"}, ALONE),
    "a world of one": ({"WORLD_SIZE": "1"}, ALONE),
    "Kubernetes": ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": ""}, ALONE),
    "torchrun with one": (
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        World(local_size=1, local_rank=0),
    ),
    "torchrun": (PAIR, World(2, 1, 2, 1)),
    "with spaces": (but(RANK=" 1 "), World(2, 1, 2, 1)),
    "restarted": (but(TORCHELASTIC_RESTART_COUNT="2"), World(2, 1, 2, 1, restarts=2)),
    "srun that says it all": (
        but(LOCAL_WORLD_SIZE=None, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"),
        World(2, 1, None, 1),
    ),
    "torch's own port": (but(MASTER_PORT=None), World(2, 1, 2, 1)),
    "no local rank": (but(LOCAL_RANK=""), World(2, 1, 2)),
    "mpirun around torchrun": (but(OMPI_COMM_WORLD_SIZE="2", PMI_SIZE="junk"), World(2, 1, 2, 1)),
    "runs of their own": ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, ALONE),
    "a batch script of four tasks": (
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"},
        ALONE,
    ),
    "an allocation": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, ALONE),
    "a step of one": ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
    "mpirun of one": ({"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0", "PMI_RANK": "0"}, ALONE),
}

REFUSED = [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be a whole number of at least 1"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
    ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9"),
    ({"RANK": "0"}, "RANK is '0' but WORLD_SIZE is not set"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK is '0' but WORLD_SIZE is not set"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1' but WORLD_SIZE is not set"),
    (but(WORLD_SIZE=""), "RANK is '1' but WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set: start with torchrun"),
    (but(RANK=""), "WORLD_SIZE is 2 but RANK is not set"),
    (but(MASTER_ADDR=None), "but MASTER_ADDR is not set: start with torchrun"),
    (but(MASTER_ADDR=""), "but MASTER_ADDR is not set"),
    (but(RANK="2"), "RANK is '2'; it must be a whole number from 0 to 1: WORLD_SIZE is 2"),
    (but(RANK="-1"), "RANK is '-1'"),
    (but(RANK="x"), "RANK is 'x'"),
    ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK is '1'; it must be a whole number from 0 to 0"),
    (but(LOCAL_RANK="2"), "LOCAL_RANK is '2'; it must be a whole number from 0 to 1"),
    (but(LOCAL_RANK="x"), "LOCAL_RANK is 'x'"),
    (but(LOCAL_WORLD_SIZE="3"), "LOCAL_WORLD_SIZE is '3'"),
    (but(LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE is '0'"),
    (but(MASTER_PORT="0"), "MASTER_PORT is '0'; it must be a whole number from 1 to 65535"),
    (but(MASTER_PORT="99999"), "MASTER_PORT is '99999'"),
    (but(MASTER_PORT="http"), "MASTER_PORT is 'http'"),
    (but(TORCHELASTIC_RESTART_COUNT="x"), "TORCHELASTIC_RESTART_COUNT is 'x'"),
    (but(TORCHELASTIC_RESTART_COUNT="-1"), "TORCHELASTIC_RESTART_COUNT is '-1'"),
    *[
        ({"OMP_NUM_THREADS": value}, f"OMP_NUM_THREADS is '{value}'; it must be a whole number")
        for value in ("abc", "0", "-2", "1.5", "4,0", ",")
    ],
    (but(OMP_NUM_THREADS="all"), "OMP_NUM_THREADS is 'all'"),
    ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU is 'perhaps'; it must be true or fal"),
    ({"ACCELERATE_DEBUG_MODE": "2"}, "ACCELERATE_DEBUG_MODE is '2'"),
    ({"ACCELERATE_CPU_AFFINITY": "x"}, "ACCELERATE_CPU_AFFINITY is 'x'"),
    ({"ACCELERATE_LOG_LEVEL": "loud"}, "ACCELERATE_LOG_LEVEL is 'LOUD'; use INFO or WARNING"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "choose a GPU with CUDA_VISIBLE_DEVICES"),
    # Copies.
    (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        "SLURM_STEP_NUM_TASKS is 2 but WORLD_SIZE",
    ),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "SLURM_NTASKS is 4 but WORLD_SIZE is not set"),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, "SLURM_PROCID is 3"),
    ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x'"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2 but WORLD_SIZE is not set: mpirun"),
    ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE is 'x'"),
    ({"PMI_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "PMI_SIZE is 2"),
    ({"MV2_COMM_WORLD_SIZE": "3"}, "MV2_COMM_WORLD_SIZE is 3"),
    ({"MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS is 2"),
    ({"PMIX_RANK": "1"}, "start torchrun once on each machine, as launch/slurm.sh does"),
]


@pytest.mark.parametrize("case", WORLDS)
def test_a_sound_environment_is_one_process_or_a_world(case: str) -> None:
    variables, expected = WORLDS[case]
    os.environ.update(variables)
    environment.check()
    assert environment.world() == environment.launched() == expected
    assert not any(name in os.environ for name, value in variables.items() if not value.strip())


@pytest.mark.parametrize(("variables", "message"), REFUSED)
def test_every_command_refuses_the_rest_in_one_line(
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    os.environ.update(variables)
    monkeypatch.setattr("dml_accel.cli.commands._SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.chdir(tmp_path)
    for command in ("train", "compare", "plan", "report x", "evaluate x", "predict x y"):
        words = [*command.split(), *["--cohort", "resnet8"] * (" " not in command)]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    capsys.readouterr()
    assert main(["train", "--lr", "abc"]) == 2  # an error of another kind can be printed
    assert "--lr" in capsys.readouterr().err


def test_no_combination_of_values_is_an_error_of_another_kind() -> None:
    """A world, one process, or a line that names a variable: for each of 15,552 environments."""
    values = {
        "WORLD_SIZE": (None, "", "1", "2", "x", "0"),
        "RANK": (None, "0", "1", "-1"),
        "LOCAL_RANK": (None, "0", "2", "x"),
        "LOCAL_WORLD_SIZE": (None, "1", "3"),
        "MASTER_ADDR": (None, "here"),
        "MASTER_PORT": (None, "0", "29500"),
        "OMP_NUM_THREADS": (None, "2,1", "0"),
        "SLURM_STEP_NUM_TASKS": (None, "2", "x"),
    }
    before, found = os.environ.copy(), set()
    for chosen in itertools.product(*values.values()):
        given = {
            name: value for name, value in zip(values, chosen, strict=True) if value is not None
        }
        os.environ.clear()
        os.environ.update(given)
        launched = environment.launched()
        try:
            environment.check()
        except UsageError as error:
            text = str(error)
            assert "\n" not in text and any(name in text for name in given), text
            found.add("refused")
        else:
            size = int(given.get("WORLD_SIZE") or 1)
            assert launched == environment.world() and launched.size == size
            assert launched.rank < size and given.get("OMP_NUM_THREADS") != "0"
            assert size == 1 or {"RANK", "MASTER_ADDR"} <= given.keys()
            assert given.get("WORLD_SIZE") or given.get("SLURM_STEP_NUM_TASKS") is None
            found.add(size)
    os.environ.clear()
    os.environ.update(before)
    assert found == {"refused", 1, 2}


# ---------------------------------------------------------------- what else launchers set


@pytest.mark.parametrize(
    ("name", "value", "read", "expected"),
    [
        ("ACCELERATE_MIXED_PRECISION", "", environment.precision, "no"),
        ("ACCELERATE_MIXED_PRECISION", "BF16", environment.precision, "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "NO", environment.precision, "no"),
        ("ACCELERATE_USE_CPU", "1", environment.uses_cpu, True),
        ("ACCELERATE_USE_CPU", "yes", environment.uses_cpu, True),
        ("ACCELERATE_USE_CPU", "False", environment.uses_cpu, False),
        ("ACCELERATE_USE_CPU", "", environment.uses_cpu, False),
        ("OMP_NUM_THREADS", "", environment.threads, None),
        ("OMP_NUM_THREADS", "4,2", environment.threads, 4),
    ],
)
def test_words_are_read_as_accelerate_and_openmp_read_them(
    name: str, value: str, read: object, expected: object
) -> None:
    os.environ[name] = value
    environment.check()
    environment.check_launcher()
    assert callable(read) and read() == expected


def test_accelerate_sees_a_world_or_nothing() -> None:
    left_over = {"PMI_SIZE": "x", "MPI_LOCALRANKID": "3", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "?"}
    one = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(left_over | one)
    with environment.shown_to_accelerate(3):
        assert not (left_over | one).keys() & os.environ.keys()
        assert "OMP_NUM_THREADS" not in os.environ
    assert (left_over | one).items() <= os.environ.items()
    os.environ.update(but(OMP_NUM_THREADS="4,2", MASTER_PORT=None))
    with environment.shown_to_accelerate(3):
        assert (os.environ["RANK"], os.environ["OMP_NUM_THREADS"]) == ("1", "4")
        assert os.environ["MASTER_PORT"] == "29500" and "PMI_SIZE" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "4,2"
    del os.environ["OMP_NUM_THREADS"]
    with environment.shown_to_accelerate(3):  # Accelerate would choose a number of its own
        assert os.environ["OMP_NUM_THREADS"] == "3"


@needs_proc
@pytest.mark.parametrize(
    ("exported", "set_by_launcher", "words", "refused"),
    [
        # accelerate launch sets both for several processes, and neither for one.
        ({}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "", True),
        ({"MASTER_ADDR": "10.0.0.1"}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "", True),
        ({"MASTER_ADDR": "10.0.0.1"}, {}, "", False),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, {}, "--num_processes 1", False),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, {}, "--num_processes=2", True),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, {}, "--num-machines 2", True),
    ],
)
def test_an_exported_address_is_told_from_a_world_that_was_not_started(
    exported: dict[str, str], set_by_launcher: dict[str, str], words: str, refused: bool
) -> None:
    # A shell in place of accelerate launch, which gives its process these variables and no rank.
    check = "from dml_accel.distributed import environment as e; e.check(); e.check_launcher()"
    given = {"ACCELERATE_MIXED_PRECISION": "no"} | set_by_launcher
    settings = " ".join(f"{name}={value}" for name, value in given.items())
    script = f"{settings} {sys.executable} -c '{check}'; exit $?"
    done = subprocess.run(
        ["sh", "-c", script, "sh", *words.split()],
        cwd=ROOT,
        env=clean_environment(**exported),
        capture_output=True,
        text=True,
    )
    assert ("started a single process and ignored" in done.stderr) == refused, done.stderr
    assert (done.returncode != 0) == refused


def test_a_signal_ends_a_process_that_waits_for_the_others() -> None:
    # In a process of its own, because it dies: rank 1 of 2, whose rank 0 never comes.
    program = """
import os, signal, sys, threading
from dml_accel.core.config import Config
from dml_accel.distributed.launch import Stop
from dml_accel.distributed.processes import Processes
config = Config(cpu=True)
with Stop() as stop:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    Processes(config.numerics, config.compute)
"""
    variables = clean_environment(**PAIR)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables, timeout=60)
    assert done.returncode == -15
