"""The launchers that users use, from their command lines: launch files, a lost rank, SLURM."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.run import get_args_parser

from tests.helpers import (
    BIN,
    PATIENCE,
    ROOT,
    accelerate_launch,
    environment,
    events,
    free_port,
    launched,
    load,
    run_program,
    saved_steps,
    wait_until,
    workers,
)

TINY = "--dataset digits --image-size 8 --batch-size 9 --lr 0.001 --cohort resnet8*2".split()
TINY += ["--placement", "replicate"]
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs Linux's /proc"
)


@pytest.mark.parametrize(
    ("file", "words", "processes", "precision"),
    [
        ("laptop_cpu", [], 1, "no"),
        ("cpu_processes", [], 2, "no"),
        ("many_gpus", ["--num_processes", "2", "--mixed_precision", "bf16"], 2, "bf16"),
    ],
)
def test_launch_files_start(
    tmp_path: Path, file: str, words: list[str], processes: int, precision: str
) -> None:
    launch = [BIN / "accelerate", "launch", "--config_file", f"launch/{file}.yaml", *words]
    launch += ["--main_process_port", str(free_port()), "train.py"]
    done = run_program(*launch, *TINY, "--max-steps", "2", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    found = load(tmp_path / "run/results.json")
    assert (found["world_size"], found["mixed_precision"]) == (processes, precision)
    assert found["placement"]["ranks"]["resnet8-1"] == list(range(processes))
    assert done.stdout.count("run folder:") == 1  # by rank 0
    assert done.stderr.count("test top-1:") == 1
    assert len(events(tmp_path / "run")) == 5


def test_the_file_for_one_gpu_asks_for_one_process_on_a_gpu() -> None:
    # It starts as laptop_cpu does, but where there is a GPU, it is used.
    words = ["--config_file", str(ROOT / "launch/one_gpu.yaml"), "train.py"]
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (found.num_processes, found.mixed_precision) == (1, "no")
    assert not (found.cpu or found.multi_gpu)


def test_a_launch_that_ignores_the_number_of_processes_is_refused(tmp_path: Path) -> None:
    launch = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"]
    done = run_program(*launch, *TINY, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert "started a single process and ignored --num_processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_print_a_usage_error_once(tmp_path: Path) -> None:
    launch = [BIN / "torchrun", "--nproc_per_node", "2", "train.py", *TINY]
    done = run_program(*launch, "--lr", "-1", "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("--lr is -1.0; it must be at least 0") == 1
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- a rank that dies


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# A run in which a process counts as lost after 4 seconds, and rank 2 pauses for 8 in its step 2.
IMPATIENT = """
import sys, time
sys.path.insert(0, {root!r})
from dml_accel import cli
from dml_accel.distributed import launch, liveness
from dml_accel.training import loop
liveness.LOOK_SECONDS, liveness.LOOKS = 0.5, 8
whole = loop.train_step
def train_step(cohort, number, *words):
    if number == 1 and launch.launched_rank() == 2:
        time.sleep(8)
    return whole(cohort, number, *words)
loop.train_step = train_step
sys.exit(cli.main(sys.argv[1:]))
"""


@needs_proc
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_a_lost_rank_ends_the_run_with_its_name(tmp_path: Path, death: signal.Signals) -> None:
    # A killed process fails the collective of the others. With one that is stuck they wait in
    # native code for 10 minutes, as they do with NCCL, and the thread has to end them.
    program = ["train.py"]
    if death == signal.SIGSTOP:
        (tmp_path / "impatient.py").write_text(IMPATIENT.format(root=str(ROOT)))
        program = [str(tmp_path / "impatient.py"), "train"]
    words = [*TINY, "--save-every", "3", "--output-dir", str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with launched(*accelerate_launch(3, *program, *words)) as launcher:
        wait_until(lambda: metrics.exists() and '"step": 4' in metrics.read_text(), launcher)
        ranks = workers(launcher.pid)
        assert sorted(ranks) == [0, 1, 2]
        os.kill(ranks[1], death)
        deadline = time.monotonic() + 90  # not the 10 minutes
        while alive(ranks[0]) or alive(ranks[2]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        if death == signal.SIGSTOP:
            os.kill(ranks[1], signal.SIGKILL)  # the launcher would wait for it for 30 seconds
        _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0
    assert said.count("error: rank 1 stopped responding, so the run ends") == 1
    assert said.count("stopped responding") == 1
    # Rank 2 was slow before, while the others waited.
    assert said.count("waiting for rank 2 (host ") == (death == signal.SIGSTOP)
    assert said.count("waiting for") == said.count("seconds: alive but behind")
    assert not any(alive(pid) for pid in ranks.values())
    status = load(tmp_path / "run" / "status.json")
    assert status["status"] == "failed" and "rank 1 stopped responding" in status["reason"]
    assert ("no sign of life" in status["reason"]) == (death == signal.SIGSTOP)
    assert 3 in saved_steps(tmp_path / "run")


# ---------------------------------------------------------------- SLURM


@pytest.fixture
def scheduler(tmp_path: Path) -> dict[str, str]:
    """An environment in which a job of two processes runs, without SLURM behind it."""
    stubs = {
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift\nSLURM_NODEID=0 exec "$@"\n',
        "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$ASKED"\n',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (folder / name).chmod(0o755)
    # slurm.sh makes the port from the job's number.
    number = free_port(random.sample(range(20_001, 40_000), 100)) - 20_000
    job = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    job |= {
        "ASKED": str(tmp_path / "asked"),
        "DML_PROCESSES": "2",
        "PATH": f"{folder}:{BIN}:{os.environ['PATH']}",
    }
    return environment() | job


@needs_proc
def test_a_job_near_its_time_limit_is_queued_again(
    tmp_path: Path, scheduler: dict[str, str]
) -> None:
    if "--signals-to-handle" not in get_args_parser()._option_string_actions:
        done = run_program("bash", "launch/slurm.sh", tmp_path / "run", *TINY, **scheduler)
        assert (done.returncode, done.stdout) == (2, "")
        assert "does not pass SIGUSR1 on" in done.stderr
        return
    folder, asked = tmp_path / "run", tmp_path / "asked"
    words = ["bash", "launch/slurm.sh", folder, *TINY, "--save-every", "5", "--max-steps", "90"]

    def job(sent: signal.Signals | None, processes: int) -> str:
        """Run the job, signal its launcher after the next checkpoint; return its last line."""
        known = set(folder.glob("checkpoints/step-*"))
        with launched(*words, **scheduler | {"DML_PROCESSES": str(processes)}) as script:
            if sent:
                wait_until(lambda: set(folder.glob("checkpoints/step-*")) - known, script)
                os.kill(next(pid for pid in children(script.pid) if workers(pid)), sent)
            said, _ = script.communicate(timeout=PATIENCE)
        return said.strip().splitlines()[-1]

    assert f"the run in {folder} is stopped (stopped by SIGUSR1)" in job(signal.SIGUSR1, 2)
    assert asked.read_text() == f"requeue {scheduler['SLURM_JOB_ID']}\n"
    assert job(None, 1) == f"the run in {folder} is done; exit code 0"
    assert asked.read_text() == f"requeue {scheduler['SLURM_JOB_ID']}\n"
    begun = [one["event"] for one in events(folder) if one["event"] in ("start", "resume")]
    assert begun == ["start", "resume"]


# A launcher that leaves what a run leaves that was stopped.
STOPPED = """#!/usr/bin/env bash
[ "$1" = --help ] && echo --signals-to-handle && exit
mkdir -p "$RUN" && echo '{{
 "status": "stopped",
 "reason": "stopped by {signal}"
}}' > "$RUN/status.json"
exit 1
"""


@pytest.mark.parametrize(("signal", "is_queued"), [("SIGTERM", False), ("SIGUSR1", True)])
def test_only_a_job_near_its_time_limit_is_queued_again(
    tmp_path: Path, scheduler: dict[str, str], signal: str, is_queued: bool
) -> None:
    torchrun = tmp_path / "bin/torchrun"
    torchrun.write_text(STOPPED.format(signal=signal))
    torchrun.chmod(0o755)
    folder = tmp_path / "run"
    done = run_program("bash", "launch/slurm.sh", folder, **scheduler | {"RUN": str(folder)})
    assert done.returncode == 1
    assert f"the run in {folder} is stopped (stopped by {signal}); exit code 1" in done.stdout
    assert (tmp_path / "asked").exists() == is_queued  # SIGTERM means the end


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set: run this with sbatch"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set: run this with sbatch"),
        ({"DML_PROCESSES": "0"}, "DML_PROCESSES (SLURM_GPUS_ON_NODE) is '0'"),
        ({"DML_ENVIRONMENT": "/nowhere"}, "DML_ENVIRONMENT is '/nowhere', but there is no bin/act"),
        ({"PATH": "/usr/bin:/bin"}, "there is no torchrun: submit from an active environment"),
    ],
)
def test_a_job_that_cannot_start_says_why_in_one_line(
    scheduler: dict[str, str], changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", "launch/slurm.sh", tmp_path / "run"],
        cwd=ROOT,
        env=scheduler | changes,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def children(parent: int) -> list[int]:
    """Return the pids of the processes that ``parent`` started."""
    listed = run_program("ps", "-o", "pid=", "--ppid", str(parent)).stdout
    return [int(pid) for pid in listed.split()]
