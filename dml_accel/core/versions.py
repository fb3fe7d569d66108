"""Where results come from: package versions, the commit of the code, the command line."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("dml-accel", "torch", "torchvision", "accelerate", "datasets", "timm", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Return the commit of this source tree, with ``-dirty`` appended if files were changed.

    None if the package is not in a checkout of its own.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """Return the command that started this process, quoted for a shell."""
    script = Path(sys.argv[0]).name
    names = {"__main__.py": ["python", "-m", "dml_accel"], "dml-accel": ["dml-accel"]}
    return shlex.join([*names.get(script, ["python", script]), *sys.argv[1:]])
