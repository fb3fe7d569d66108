"""Let runs of 16 processes fail on this machine: one is killed, a link is cut, one is slow.

    sudo python -m tests.failures [killed] [cut] [slow]

``killed``: one process is killed (kill -9) in the middle of training, and the command is repeated
on 12 processes. ``cut``: the link between two hosts of 8 processes goes down (see two_hosts.sh,
which needs root). ``slow``: one process sleeps between two steps. Weights are compared with those
of an undisturbed run of one process. Writes benchmarks/failures.json and .md; cases that are not
run stay there as they are.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file
from tabulate import tabulate

from benchmarks.measuring import HERE, processor
from dml_accel.core.versions import commit, versions
from tests.helpers import (
    BIN,
    PATIENCE,
    ROOT,
    events,
    launched,
    load,
    run_program,
    saved_steps,
    wait_until,
    workers,
)

PROCESSES, FEWER = 16, 12
STEPS, SAVE_EVERY, FAILS_AT = 40, 10, 24
MINUTES = 1  # --timeout
WORDS = (
    "--cohort resnet8*4 --dataset digits --image-size 8 --train-limit 640 --batch-size 64 "
    f"--float64 --lr 0.001 --max-steps {STEPS} --save-every {SAVE_EVERY} --eval-every 100ep --cpu "
    f"--placement split --resume auto --timeout {MINUTES}"
).split()
VICTIM, SLOW, SLEEPS = 11, 5, 25
TOLERANCE = 1e-9  # of law 2, for weights and running statistics
# The program of a run in which one rank sleeps before a step.
SLEEPER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from dml_accel import cli
from dml_accel.distributed.launch import launched_rank
from dml_accel.training import loop
whole = loop.train_step
def train_step(cohort, number, *words):
    if number == {FAILS_AT} and launched_rank() == {SLOW}:
        time.sleep({SLEEPS})
    return whole(cohort, number, *words)
loop.train_step = train_step
sys.exit(cli.main(sys.argv[1:]))
"""


def command(processes: int, folder: Path, program: str = "train.py") -> list[str]:
    """Return the words that start or resume a run."""
    start = [BIN / "torchrun", "--nproc_per_node", processes] if processes > 1 else [sys.executable]
    train = [] if program == "train.py" else ["train"]
    return [str(word) for word in (*start, program, *train, *WORDS, "--output-dir", folder)]


def complete(processes: int, folder: Path, program: str = "train.py") -> str:
    """Run to the end; return what was said."""
    done = run_program(*command(processes, folder, program))
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stderr


def difference(folder: Path, straight: Path) -> float:
    """Return the largest difference of any weight or running statistic of two runs."""
    worst = 0.0
    for path in sorted(folder.glob("peers/*/model.safetensors")):
        other = load_file(straight / path.relative_to(folder))
        for name, value in load_file(path).items():
            worst = max(worst, (value.double() - other[name].double()).abs().max().item())
    return worst


def has_taken(folder: Path, step: int) -> bool:
    """Whether a run has recorded a step."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and f'"step": {step}' in metrics.read_text()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may not have been waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def lost_lines(said: str) -> list[str]:
    """Return the errors that name lost ranks."""
    return re.findall(r"^error: (.* stopped responding, .*)$", said, re.M)


def killed(root: Path) -> dict[str, Any]:
    """Kill a process of many, and resume on fewer."""
    folder = root / "killed"
    with launched(*command(PROCESSES, folder)) as run:
        wait_until(lambda: has_taken(folder, FAILS_AT), run)
        ranks = workers(run.pid)
        os.kill(ranks.pop(VICTIM), signal.SIGKILL)
        start = time.monotonic()
        while any(map(is_alive, ranks.values())):
            if time.monotonic() - start > PATIENCE:
                raise RuntimeError("the others do not end")
            time.sleep(0.05)
        seconds = time.monotonic() - start
        _, said = run.communicate(timeout=PATIENCE)
    # The launcher lists the first failure twice.
    codes = Counter(re.findall(r"exitcode\s*: (-?\d+)", said))
    status, newest = load(folder / "status.json"), saved_steps(folder)[-1]
    complete(FEWER, folder)
    resumed = [event["step"] for event in events(folder) if event["event"] == "resume"]
    found: dict[str, Any] = {
        "rank": VICTIM,
        "seconds until all others had ended": seconds,
        "errors printed": lost_lines(said),
        "exit code of the launcher": run.returncode,
        "exit codes that it reports": dict(codes),
        "status": [status["status"], status["reason"]],
        "newest checkpoint": newest,
        "resumed on": load(folder / "results.json")["world_size"],
        "resumed from": resumed,
        "largest difference": difference(folder, root / "straight"),
    }
    name = f"rank {VICTIM} stopped responding"
    found["holds"] = (
        seconds < 60 * MINUTES
        and len(found["errors printed"]) == 1
        and all(name in text for text in (found["errors printed"][0], status["reason"]))
        and run.returncode != 0
        and set(codes) <= {"1", "-9", "-15"}
        and status["status"] == "failed"
        and resumed == [newest]
        and found["resumed on"] == FEWER
        and found["largest difference"] < TOLERANCE
    )
    return found


def cut(root: Path) -> dict[str, Any]:
    """Cut the link between two hosts."""
    folder = root / "cut"
    hosts = ["bash", "tests/two_hosts.sh", BIN / "accelerate", "train.py", *WORDS]
    metrics = str(folder / "metrics.jsonl")
    done = run_program(*hosts, "--output-dir", folder, CUT_WHEN=metrics, PROCESSES=str(PROCESSES))
    ended = time.time()
    when = re.search(r"link cut: (.*)", done.stdout)
    codes = re.search(r"exit codes: (\d+) (\d+)", done.stdout)
    if not (when and codes):
        raise RuntimeError(f"the link was not cut: {done.stdout} {done.stderr[-3000:]}")
    cut_at, status = datetime.fromisoformat(when[1]).timestamp(), load(folder / "status.json")
    half = PROCESSES // 2
    found: dict[str, Any] = {
        "processes on each host": half,
        "seconds until rank 0 had ended": datetime.fromisoformat(status["time"]).timestamp()
        - cut_at,
        "seconds until both launchers had ended": ended - cut_at,
        "errors printed": lost_lines(done.stderr),
        "exit codes of the launchers": [int(code) for code in codes.groups()],
        "status": [status["status"], status["reason"]],
    }
    named = sorted(text.partition(" stopped")[0] for text in found["errors printed"])
    others = ", ".join(f"rank {rank}" for rank in range(half, PROCESSES))
    found["holds"] = (
        named == ["rank 0", others]
        and min(codes.groups()) != "0"
        and status["status"] == "failed"
        and found["seconds until both launchers had ended"] < 60 * MINUTES + 45
    )
    return found


def slow(root: Path) -> dict[str, Any]:
    """Let one process sleep between two steps."""
    folder, program = root / "slow", root / "sleeper.py"
    program.write_text(SLEEPER)
    said = complete(PROCESSES, folder, str(program))
    found: dict[str, Any] = {
        "rank": SLOW,
        "seconds asleep": SLEEPS,
        "lines printed": re.findall(r"waiting for .*", said),
        "status": load(folder / "status.json")["status"],
        "largest difference": difference(folder, root / "straight"),
    }
    found["holds"] = (
        len(found["lines printed"]) == 1
        and f"waiting for rank {SLOW} (host " in found["lines printed"][0]
        and found["status"] == "done"
        and found["largest difference"] < TOLERANCE
    )
    return found


CASES = {"killed": killed, "cut": cut, "slow": slow}


def main() -> int:
    """Run the cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (all)")
    asked = parser.parse_args().cases or list(CASES)
    path = HERE / "failures.json"
    outcomes = load(path) if path.exists() else {}
    with tempfile.TemporaryDirectory() as root:
        complete(1, Path(root) / "straight")
        for name in asked:
            outcomes[name] = CASES[name](Path(root)) | {
                "command": shlex.join(["python", "-m", "tests.failures", name]),
                "n": 1,
                "processor": processor(),
                "cores": os.cpu_count(),
                "system": platform.platform(),
                "versions": versions(),
                "commit": commit(),
            }
            print(json.dumps(outcomes[name], indent=1))
    text = json.dumps({name: outcomes[name] for name in CASES if name in outcomes}, indent=1)
    text = text.replace(f"(host {socket.gethostname()})", "(host HOST)")
    path.write_text(text + "\n")
    write(json.loads(text))
    return 0 if all(outcomes[name]["holds"] for name in asked) else 1


def write(outcomes: dict[str, Any]) -> None:
    """Write benchmarks/failures.md."""
    sections = []
    for name, one in outcomes.items():
        about = ("versions", "processor", "system", "cores", "command", "n", "commit")
        rows = [[what, _shown(value)] for what, value in one.items() if what not in about]
        sections.append(
            f"## {name}\n\n{CASES[name].__doc__} n = {one['n']}.\n\n"
            f"{tabulate(rows, ['what', 'measured'], tablefmt='github', disable_numparse=True)}\n\n"
            f"`{one['command']}`: {one['processor']}, {one['cores']} cores, {one['system']}; torch "
            f"{one['versions']['torch']}, commit {one['commit']}.\n"
        )
    head = f"""# Failures of {PROCESSES} processes

{PROCESSES} gloo processes on one machine train four ResNet-8 on digits (`{" ".join(WORDS)}`).
Each case is one launch: what happened once, not how often. Differences are those of any weight or
running statistic to a run of one process that nobody disturbed; law 2 allows {TOLERANCE:g}. Every
number is in [failures.json](failures.json).

"""
    (HERE / "failures.md").write_text(head + "\n".join(sections))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{number} times {code}" for code, number in value.items())
    return f"{value:.2g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
