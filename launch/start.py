"""Set up an environment for this project, or reuse it, and run something in it.

    python3 launch/start.py demo     train two small networks on real images, offline, in a minute
    python3 launch/start.py test     run the tests (further words go to pytest)
    python3 launch/start.py lint     run the linter, the formatter's check and the type checker
    python3 launch/start.py train    train.py with the words that follow
    python3 launch/start.py setup    nothing more than the environment

The environment is .venv. Before the task, --env FOLDER names another one, and --oldest installs the
oldest supported packages in it (default: .venv-oldest):

    python3.13 launch/start.py --env .venv-3.13 test
    python3.12 launch/start.py --oldest test

Needs Python 3.11 or newer and nothing else. Packages come from wherever pip is configured to look.
"""

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
OLDEST_PACKAGES = ROOT / "tests" / "lower-bounds.txt"
DEMO = "--cohort resnet8*2 --dataset digits --epochs 8 --batch-size 16 --lr 0.05 --lr-step 5"
# What Python runs for each task. Three tests at a time, of one thread each: on networks of a test's
# size threads only wait, and tests that start processes wait for those.
TASKS = {
    "demo": [f"train.py {DEMO}".split()],
    "test": ["-m pytest -n 3 --dist loadfile".split()],
    "lint": ["-m ruff check".split(), "-m ruff format --check".split(), "-m mypy".split()],
    "train": [["train.py"]],
    "setup": [],
}
AsWritten = argparse.RawDescriptionHelpFormatter


class SetUpError(RuntimeError):
    """The environment cannot be used; the text says why."""


def set_up(folder: Path, oldest: bool) -> Path:
    """Create the environment, unless that was done for these very requirements; return its Python.

    Args:
        folder: of the environment.
        oldest: whether to install the oldest supported packages.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    files = ["setup.cfg", "pyproject.toml", *([OLDEST_PACKAGES] if oldest else [])]
    content = b"".join((ROOT / name).read_bytes() for name in files)
    wanted = hashlib.sha256(content).hexdigest()
    stamp, version = folder / "installed.txt", f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = stamp.read_text() if stamp.is_file() else ""
    if found and f"\nversion = {version}." not in (folder / "pyvenv.cfg").read_text():
        raise SetUpError(
            f"{folder} was made by another Python than {version}: start with that one, remove the "
            "folder, or name another with --env"
        )
    if found == wanted:
        return python
    if not stamp.exists() and folder.exists() and any(folder.iterdir()):
        raise SetUpError(
            f"{folder} holds what this script did not put there: name another folder with --env"
        )
    print(f"setting up {folder}: a few minutes the first time", flush=True)
    if not found:  # nothing here, or what an installation that failed has left
        venv.create(folder, with_pip=True, clear=True)
        stamp.touch()
    install = [python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[test]"]
    # A module is compiled when it is first imported: compiling all 14,000 takes 40 seconds.
    install += ["--no-compile"]
    install += ["--constraint", OLDEST_PACKAGES] if oldest else []
    try:
        subprocess.run(install, check=True)
    except subprocess.CalledProcessError as error:
        raise SetUpError(f"the installation failed (exit code {error.returncode})") from error
    stamp.write_text(wanted)
    return python


def main() -> int:
    """Run one task in the environment; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=AsWritten)
    parser.add_argument("--env", metavar="FOLDER", help="the environment's folder, in this project")
    parser.add_argument("--oldest", action="store_true", help="with the oldest packages")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="passed on")
    asked = parser.parse_args()
    try:
        if sys.version_info[:2] < OLDEST_PYTHON:
            raise SetUpError(f"Python 3.11 or newer is needed; this is {platform.python_version()}")
        folder = asked.env or (".venv-oldest" if asked.oldest else ".venv")
        python = set_up(ROOT / folder, asked.oldest)
    except SetUpError as error:
        print(error, file=sys.stderr)
        return 2
    environment = dict(os.environ)
    # Nothing is compiled yet (see above): where it may not be kept, every process would take 20
    # seconds for it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if asked.task == "test":
        environment.setdefault("OMP_NUM_THREADS", "1")
    commands = [[python, *command, *asked.words] for command in TASKS[asked.task]]
    codes = [subprocess.run(command, cwd=ROOT, env=environment).returncode for command in commands]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
