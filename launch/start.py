"""Set up .venv next to this project, or reuse it, and run something in it.

    python3 launch/start.py demo     train two small networks on real images, offline, in a minute
    python3 launch/start.py test     run the tests (further words go to pytest)
    python3 launch/start.py lint     run the linter, the formatter's check and the type checker
    python3 launch/start.py train    train.py with the words that follow

Needs Python 3.11 and nothing else. Packages come from wherever pip is configured to look.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
DEMO = "--cohort resnet8*2 --dataset digits --epochs 8 --batch-size 16 --lr 0.05".split()
# Two tests at a time, of one thread each: on networks of a test's size threads only wait.
WORKERS = "-n 2 --dist loadfile".split()
LINT = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


def set_up() -> None:
    """Create .venv and install the project, unless that was done for these very requirements."""
    wanted = hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in ("setup.cfg", "pyproject.toml"))
    ).hexdigest()
    stamp = VENV / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"setting up {VENV}: a few minutes the first time", flush=True)
    if not stamp.is_file():  # nothing here, or what an installation that failed has left
        venv.create(VENV, with_pip=True, clear=True)
    install = [BIN / "python", "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test]"]
    subprocess.run(install, check=True)
    stamp.write_text(wanted)


def main(task: str, *words: str) -> int:
    """Run one task in the environment; return its exit code."""
    python = str(BIN / "python")
    commands = {
        "demo": [[python, "train.py", *DEMO, *words]],
        "test": [[python, "-m", "pytest", *WORKERS, *words]],
        "train": [[python, "train.py", *words]],
        "lint": [[python, "-m", *tool] for tool in LINT],
    }
    if task not in commands:
        print(__doc__, end="")
        return 2
    if sys.version_info[:2] != (3, 11):
        print(f"Python 3.11 is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    try:
        set_up()
    except subprocess.CalledProcessError as error:
        print(f"the installation failed (exit code {error.returncode})", file=sys.stderr)
        return 1
    environment = dict(os.environ)
    if task == "test":
        environment.setdefault("OMP_NUM_THREADS", "1")
    runs = (subprocess.run(command, cwd=ROOT, env=environment) for command in commands[task])
    return max(run.returncode for run in runs)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["help"])))
