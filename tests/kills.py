"""Kill runs at random moments, resume them, and compare their results.

    python -m tests.kills [--kills 50] [--seed 0]

One run of each case is left undisturbed. Then, again and again, a run is killed (kill -9, the whole
run or one rank of it) and its command repeated; its weights, buffers and momentum must be those of
the undisturbed run, bit for bit. Writes benchmarks/kills.json and .md.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.measuring import HERE, processor
from dml_accel.core.versions import commit, versions
from tests.helpers import BIN, PATIENCE, ROOT, environment, run_program, workers

SAVE_EVERY = 7
WORDS = (
    "--cohort resnet8 wrn_16_2 --dataset digits --image-size 8 --train-limit 240 --batch-size 12 "
    f"--epochs 3 --lr 0.05 --save-every {SAVE_EVERY} --eval-every 10 --cpu"
).split()
# name: processes, placement
CASES = {
    "one process": (1, "auto"),
    "2 processes, replicate": (2, "replicate"),
    "2 processes, split": (2, "split"),
    "3 processes, replicate": (3, "replicate"),
    "3 processes, split": (3, "split"),
}
PHASES = ("steps", "evaluation", "writing")
_TRIES = 20  # until a kill meets its phase


def command(case: str, folder: Path) -> list[str]:
    """Return the command of a case; the same one starts and resumes it."""
    processes, _ = CASES[case]
    launch = [BIN / "torchrun", "--nproc_per_node", processes]
    program = [*(launch if processes > 1 else [sys.executable]), "train.py"]
    return [str(word) for word in (*program, *words(case), "--output-dir", folder)]


def words(case: str) -> list[str]:
    """Return the flags of a case, without a run folder."""
    return [*WORDS, "--placement", CASES[case][1], "--resume", "auto"]


def complete(case: str, folder: Path) -> None:
    """Run to the end."""
    done = run_program(*command(case, folder))
    if done.returncode:
        raise RuntimeError(f"{case} ended with {done.returncode}: {done.stderr[-3000:]}")


def outcome(folder: Path) -> dict[str, str]:
    """Return a digest of every file that training leaves: weights, buffers, momentum."""
    files = [*folder.glob("peers/*/*.safetensors"), *folder.glob("checkpoints/*/*.safetensors")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, without an incomplete one at the end."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def kill(case: str, folder: Path, phase: str, chance: random.Random) -> dict[str, Any] | None:
    """Start a run and kill it in a phase; return what was killed, None if it was too late."""
    run = subprocess.Popen(
        command(case, folder),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = folder / "checkpoints"
    # Steps: there is a checkpoint then, and there are more to come.
    at = chance.randrange(SAVE_EVERY, 40)
    until = time.monotonic() + PATIENCE
    try:
        while not _is_there(folder, checkpoints, phase, at):
            if run.poll() is not None or time.monotonic() > until:
                return None
            # Often only once a checkpoint could be caught: looking takes time from the run.
            time.sleep(0.0005 if list(checkpoints.glob("step-*")) else 0.1)
        time.sleep(chance.uniform(0, {"steps": 0.2, "evaluation": 0.1, "writing": 0.015}[phase]))
        ranks = workers(run.pid) or {0: run.pid}
        found = "writing" if list(checkpoints.glob(".new-*")) else phase
        victims = sorted(ranks) if chance.random() < 0.5 else [chance.choice(sorted(ranks))]
        if len(victims) == len(ranks):
            os.kill(run.pid, signal.SIGKILL)
        for rank in victims:
            os.kill(ranks[rank], signal.SIGKILL)
        run.wait(timeout=PATIENCE)
    finally:
        for pid in [run.pid, *workers(run.pid).values()]:
            if run.poll() is None:
                os.kill(pid, signal.SIGKILL)
        run.wait()
    if (folder / "results.json").exists():
        return None
    return {"case": case, "phase": found, "ranks": victims}


def _is_there(folder: Path, checkpoints: Path, phase: str, at: int) -> bool:
    metrics = folder / "metrics.jsonl"
    if not list(checkpoints.glob("step-*")) or not metrics.exists():
        return False
    last = events(folder)[-1]
    if last["step"] < at:
        return False
    if phase == "writing":
        return bool(list(checkpoints.glob(".new-*")))
    return phase == "steps" or (last["step"] % 10 == 0 and last["event"] == "step")


def trial(case: str, phase: str, straight: Path, chance: random.Random) -> dict[str, Any]:
    """Kill a run, resume it to the end and compare it with the undisturbed one."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        for _ in range(_TRIES):
            shutil.rmtree(folder, ignore_errors=True)
            done = kill(case, folder, phase, chance)
            if done:
                break
        else:
            raise RuntimeError(f"{case} was {_TRIES} times too fast to be killed in phase {phase}")
        reached = events(folder)[-1]["step"]
        complete(case, folder)
        resumed = [event["step"] for event in events(folder) if event["event"] == "resume"]
        return done | {
            "reached": reached,
            "resumed": resumed[0] if resumed else 0,
            "equal": outcome(folder) == outcome(straight),
        }


def holds(one: dict[str, Any]) -> bool:
    """Whether a killed run ended as it should."""
    lost = one["reached"] - one["resumed"]
    return bool(one["equal"]) and one["resumed"] > 0 and lost <= SAVE_EVERY


def main() -> int:
    """Run all cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    given = parser.parse_args()
    chance, trials = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as root:
        straight = {case: Path(root) / str(place) for place, case in enumerate(CASES)}
        for case, folder in straight.items():
            complete(case, folder)
        for number in tqdm(range(given.kills), "kills"):
            case = list(CASES)[number % len(CASES)]
            phase = PHASES[number // len(CASES) % len(PHASES)]
            trials.append(trial(case, phase, straight[case], chance))
    write(trials, given)
    return 0 if all(map(holds, trials)) else 1


def write(trials: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Write benchmarks/kills.json and .md."""
    command = shlex.join(["python", "-m", "tests.kills", *sys.argv[1:]])
    record = {
        "command": command,
        "kills": given.kills,
        "seed": given.seed,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "trials": trials,
    }
    (HERE / "kills.json").write_text(json.dumps(record, indent=1) + "\n")
    rows = []
    for case in CASES:
        ours = [one for one in trials if one["case"] == case]
        phases = Counter(one["phase"] for one in ours)
        lost = max((one["reached"] - one["resumed"] for one in ours), default=0)
        rows.append(
            [case, len(ours), *(phases[phase] for phase in PHASES), lost, sum(map(holds, ours))]
        )
    headers = ["case", "kills", *(f"in {phase}" for phase in PHASES), "most steps lost", "held"]
    held = sum(map(holds, trials))
    text = f"""# Killed and resumed

`{command}`: {held} of {len(trials)} runs that were killed (kill -9 of all processes or of one)
ended with the weights, buffers and momentum of the undisturbed run, bit for bit, from a checkpoint
above step 0 and without losing more than the {SAVE_EVERY} steps between two checkpoints.

{tabulate(rows, headers, tablefmt="github")}

{processor()}, {os.cpu_count()} cores, {platform.platform()}; torch {versions()["torch"]}, commit
{record["commit"]}. Every trial is in [kills.json](kills.json).
"""
    (HERE / "kills.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
