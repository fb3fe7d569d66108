"""Show that a change leaves results alone: the same runs by two checkouts, compared bit for bit.

    python -m tests.same_results record CHECKOUT FILE     run the fixed set with that code
    python -m tests.same_results compare BEFORE AFTER     compare two such files; 1 if they differ

Recorded are the sha256 of every peer's safetensors, every loss and evaluation, the keys of the
files in a run folder, exit codes, and the flags of every command with their defaults. ``record
--resume FOLDER`` also resumes the interrupted run that an earlier ``record`` has left in FOLDER.
The set takes two minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARED = "--dataset digits --image-size 16 --batch-size 16 --lr 0.05 --max-steps 6 --cpu"
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
PAIR = "--cohort resnet8*2"
# name: how it is started, its flags. {pair} is the folder of the first run.
RUNS: dict[str, tuple[str, str]] = {
    "pair": ("", PAIR),
    "mixed": ("", "--cohort resnet8 wrn_16_2 mobilenet --grad-accum 2 --clip-norm 1"),
    "sequential": ("", f"{PAIR} --update sequential"),
    "official": ("", f"{PAIR} --update official"),
    "alone": ("", f"{PAIR} --kl-weight 0"),
    "low-memory": ("", f"{PAIR} --low-memory"),
    "semi": ("", f"{PAIR} --labelled-fraction 0.3 --kl-images labelled --val-fraction 0.1"),
    "ring": ("", "--cohort resnet8*3 --links ring --temperature 2 --kl-warmup 1"),
    "frozen": ("", f"{PAIR} --frozen-peers {{pair}}/peers/resnet8-0 --links frozen"),
    "mean-logit": ("", f"{PAIR} --target mean-logit"),
    "bf16": ("", f"{PAIR} --mixed-precision bf16"),
    "float64": ("", f"{PAIR} --float64"),
    "pretrained": ("", "--cohort resnet8[pretrained={pair}/peers/resnet8-1] resnet8"),
    "replicate": (LAUNCH, f"{PAIR} --placement replicate"),
    "split": (LAUNCH, "--cohort resnet8 wrn_16_2 --placement split"),
    "sum": (LAUNCH, "--cohort resnet8*3 --placement split --exchange sum"),
    "compiled": ("", f"{PAIR} --compile"),
}
STOPPED = "interrupted"
# Commands that are refused, or not: the exit code is the contract.
EXIT_CODES = (
    "train --cohort nothing",
    "train --lr -1",
    "train --cohrt 2",
    "train --cohort resnet8 --dataset missing/folder/x",
    "train --update official --target mean-prob",
    "evaluate nowhere",
    "plan --world 0",
    "plan --cohort resnet8*2 --cpu",
    "compare --seeds 0",
    "report nowhere",
    "export nowhere --to x",
    "predict nowhere x.png",
)
COMMANDS = ("train", "compare", "evaluate", "predict", "export", "report", "plan")


class Checkout:
    """The code of one checkout, run in a folder of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "HF_HUB_OFFLINE": "1",
            "DML_CACHE": str(folder / "cache"),
        }

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run Python in the folder, with the checkout's package."""
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )

    def train(self, launch: str, flags: str, name: str) -> Path:
        """Train one run of the set; return its folder."""
        folder, pair = self.folder / name, self.folder / "pair"
        words = f"{launch} {self.root / 'train.py'} {flags.format(pair=pair)}".split()
        done = self.run([*words, "--output-dir", str(folder)])
        if done.returncode:
            raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
        return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keys(value: Any) -> Any:
    """Return the keys of a JSON value, without their values."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in sorted(value.items())}
    return [keys(value[0])] if isinstance(value, list) and value else "value"


def outcome(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder that must not change."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"time", "seconds"}
    peers = sorted((folder / "peers").iterdir())
    checkpoint = max((folder / "checkpoints").iterdir())
    return {
        "sha256": {peer.name: sha256(peer / "model.safetensors") for peer in peers},
        "peer config": {
            peer.name: json.loads((peer / "config.json").read_text()) for peer in peers
        },
        "events": [{k: v for k, v in event.items() if k not in timed} for event in events],
        "files": sorted(path.name for path in folder.iterdir()),
        "checkpoint": sorted(path.name for path in checkpoint.iterdir()),
        "keys": {
            path.name: keys(json.loads(path.read_text()))
            for path in (folder / "config.json", folder / "status.json", folder / "results.json")
        }
        | {"state.json": keys(json.loads((checkpoint / "state.json").read_text()))},
    }


def flags(checkout: Checkout, command: str) -> list[str]:
    """Return the flags of a command, each with the words that it takes."""
    done = checkout.run(["-m", "dml_accel", command, "--help"])
    usage = done.stdout.partition("\n\n")[0]
    return sorted(re.findall(r"--[\w-]+(?: [^\]\[]+)?", " ".join(usage.split())))


def record(checkout: Checkout, resumed: Path | None) -> dict[str, Any]:
    """Run the whole set; return its outcomes."""
    found: dict[str, Any] = {"runs": {}}
    for name, (launch, words) in RUNS.items():
        folder = checkout.train(launch, f"{words} {SHARED}", name)
        found["runs"][name] = outcome(folder)
        print(f"{name}: {', '.join(one[:12] for one in found['runs'][name]['sha256'].values())}")
    found["defaults"] = json.loads((checkout.folder / "pair/config.json").read_text())["config"]
    resuming = f"{PAIR} {SHARED} --save-every 2".replace("--max-steps 6", "--max-steps {}")
    checkout.train("", resuming.format(4), STOPPED)
    keep = Path(f"{checkout.folder}-{STOPPED}")
    shutil.copytree(checkout.folder / STOPPED, keep)
    if resumed:
        shutil.rmtree(checkout.folder / STOPPED)
        shutil.copytree(resumed, checkout.folder / STOPPED)
    checkout.train("", resuming.format(8) + " --resume auto", STOPPED)
    found["runs"]["resumed"] = outcome(checkout.folder / STOPPED)
    found["flags"] = {command: flags(checkout, command) for command in COMMANDS}
    found["exit codes"] = {
        words: checkout.run(["-m", "dml_accel", *words.split()]).returncode for words in EXIT_CODES
    }
    words = f"compare {PAIR} {SHARED} --seeds 2 --output-dir comparison".split()
    done = checkout.run(["-m", "dml_accel", *words])
    found["exit codes"]["compare"] = done.returncode
    found["comparison"] = (checkout.folder / "comparison/results.csv").read_text()
    print(f"resumed from {resumed or keep}; an interrupted run is left in {keep}")
    return found


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return where two records differ, a line each."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        return [d for n in names for d in differences(a.get(n), b.get(n), f"{where}/{n}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{where}/{i}")
        ]
    return [] if a == b else [f"{where}: {a!r} before, {b!r} after"]


def main(words: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--resume", type=Path, help="an interrupted run of another checkout")
    given = parser.parse_args(words)
    if given.command == "record":
        folder = Path(tempfile.mkdtemp(prefix="same-results-"))
        given.second.write_text(json.dumps(record(Checkout(given.first, folder), given.resume)))
        return 0
    before, after = (json.loads(path.read_text()) for path in (given.first, given.second))
    found = differences(before, after)
    print("\n".join(found) or f"equal: {len(before['runs'])} runs, flags, defaults, exit codes")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
