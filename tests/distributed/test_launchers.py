"""The launchers that users use, from their command lines: every launch file, two hosts, a death."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dml_accel.core.config import Config
from dml_accel.models.build import build
from dml_accel.models.spec import parse
from tests.test_launch import ACCELERATE, WORKERS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = "--dataset digits --image-size 16 --batch-size 9 --lr 0.001 --cohort resnet8*2".split()
TINY += ["--placement", "replicate"]


def environment() -> dict[str, str]:
    """This process's environment, free of launchers, one thread a process."""
    names = {*ACCELERATE, *WORKERS, "ACCELERATE_USE_CPU"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return clean | {"OMP_NUM_THREADS": "1"}


def run(*words: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["config"]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("file", "words", "processes", "precision"),
    [
        ("laptop_cpu", [], 1, "no"),
        ("cpu_processes", [], 2, "no"),
        ("one_gpu", [], 1, "bf16"),
        ("many_gpus", ["--num_processes", "2"], 2, "bf16"),
    ],
)
def test_every_launch_file_starts(
    tmp_path: Path, file: str, words: list[str], processes: int, precision: str
) -> None:
    launch = [BIN / "accelerate", "launch", "--config_file", f"launch/{file}.yaml", *words]
    done = run(*launch, "train.py", *TINY, "--max-steps", "2", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(tmp_path / "run")
    assert (found["world_size"], found["mixed_precision"]) == (processes, precision)
    assert found["placement"]["ranks"]["resnet8-1"] == list(range(processes))
    assert done.stdout.count("run folder:") == 1  # rank 0 speaks
    assert done.stderr.count("test top-1:") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_the_trap_of_one_process_is_refused_by_its_launcher(tmp_path: Path) -> None:
    launch = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"]
    done = run(*launch, *TINY, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert "started one process whatever --num_processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_is_said_once_by_several_processes(tmp_path: Path) -> None:
    launch = [BIN / "torchrun", "--nproc_per_node", "2", "train.py", *TINY]
    done = run(*launch, "--lr", "-1", "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("--lr is -1.0; it must be 0 or more") == 1
    assert not (tmp_path / "run").exists()


def test_two_hosts_take_the_steps_of_one_process(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 for network namespaces")
    if run("ip", "netns", "add", "dml-probe").returncode:
        pytest.skip("network namespaces cannot be made here")
    run("ip", "netns", "del", "dml-probe")
    words = [*TINY, "--float64", "--max-steps", "5"]
    alone = run(sys.executable, "train.py", *words, "--output-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr[-2000:]
    both = ["tests/two_hosts.sh", BIN / "accelerate", *words, "--output-dir", tmp_path / "two"]
    done = run("bash", *both)
    assert done.returncode == 0, done.stderr[-3000:]
    start = build(parse(["resnet8*2"])[0], Config.from_dict(config_of(tmp_path / "two")), 10)
    moved = load_file(tmp_path / "two" / "peers" / "resnet8-0" / "model.safetensors")
    for key, weight in start.named_parameters():
        assert not torch.equal(moved[key], weight), key
    assert "10.77.0.1/24" in done.stdout and "10.77.0.2/24" in done.stdout
    sent = [int(line.split()[-2]) for line in done.stdout.splitlines() if " sent " in line]
    assert len(sent) == 2 and min(sent) > 5 * 8 * 75_290  # every step's gradients crossed
    assert (results(tmp_path / "one")["world_size"], results(tmp_path / "two")["world_size"]) == (
        1,
        2,
    )
    for name in ("resnet8-0", "resnet8-1"):
        one, two = (
            load_file(tmp_path / run_ / "peers" / name / "model.safetensors")
            for run_ in ("one", "two")
        )
        placed = results(tmp_path / "two")["placement"]
        assert placed == {"kind": "replicate", "ranks": {f"resnet8-{i}": [0, 1] for i in (0, 1)}}
        for key, value in one.items():
            assert (two[key].double() - value.double()).abs().max() < 1e-9, key


# ---------------------------------------------------------------- a rank that dies


def workers(launcher: int) -> dict[int, int]:
    """Return the pid of every rank that runs below the process ``launcher``."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
            if ranks and parent == launcher:
                found[ranks[0]] = int(entry.name)
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("death", "timeout", "within"),
    [(signal.SIGKILL, "10", 45), (signal.SIGSTOP, "0.1", 60)],
    ids=["killed", "stuck"],
)
def test_a_lost_rank_ends_the_run_with_its_name(
    tmp_path: Path, death: signal.Signals, timeout: str, within: float
) -> None:
    launch = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "3", "train.py"]
    words = [*TINY, "--timeout", timeout, "--output-dir", tmp_path / "run"]
    launcher = subprocess.Popen(
        [str(word) for word in (*launch, *words)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, ranks = tmp_path / "run" / "metrics.jsonl", {}
    try:
        deadline = time.monotonic() + 90
        while not (metrics.exists() and '"step": 4' in metrics.read_text()):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.2)
        ranks = workers(launcher.pid)
        assert sorted(ranks) == [0, 1, 2]
        os.kill(ranks[1], death)
        _, said = launcher.communicate(timeout=within)
    finally:
        for pid in workers(launcher.pid).values() if not ranks else ranks.values():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()
    assert launcher.returncode != 0
    assert said.count("error: rank 1 no longer answers, so the run ends") == 1
    assert not any(alive(pid) for pid in ranks.values())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "rank 1 no longer answers" in status["reason"]


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
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
    job |= {
        "ASKED": str(tmp_path / "asked"),
        "DML_PROCESSES": "2",
        "PATH": f"{folder}:{BIN}:{os.environ['PATH']}",
    }
    return environment() | job


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_job_that_is_told_of_its_end_is_queued_again(
    tmp_path: Path, scheduler: dict[str, str]
) -> None:
    folder, asked = tmp_path / "run", tmp_path / "asked"
    words = ["bash", "launch/slurm.sh", folder, *TINY, "--save-every", "5", "--max-steps", "90"]

    def job(told: signal.Signals | None) -> str:
        """Run the job, tell its launcher so after the next checkpoint; return what it says."""
        known = set(folder.glob("checkpoints/step-*"))
        script = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=scheduler,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until = time.monotonic() + 90
        while told and not set(folder.glob("checkpoints/step-*")) - known:
            assert script.poll() is None and time.monotonic() < until, script.communicate()
            time.sleep(0.05)
        if told:
            os.kill(next(pid for pid in children(script.pid) if workers(pid)), told)
        said, _ = script.communicate(timeout=90)
        return said.strip().splitlines()[-1]

    assert f"the run in {folder} is stopped (stopped by SIGTERM)" in job(signal.SIGTERM)
    assert not asked.exists()  # the end was meant
    assert f"the run in {folder} is stopped (stopped by SIGUSR1)" in job(signal.SIGUSR1)
    assert asked.read_text() == "requeue 77\n"
    assert job(None) == f"the run in {folder} is done; exit code 0"
    assert asked.read_text() == "requeue 77\n"
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    begun = [event["event"] for event in events if event["event"] in ("start", "resume")]
    assert begun == ["start", "resume", "resume"]


def children(parent: int) -> list[int]:
    """Return the pids of the processes that ``parent`` started."""
    listed = run("ps", "-o", "pid=", "--ppid", str(parent)).stdout
    return [int(pid) for pid in listed.split()]
