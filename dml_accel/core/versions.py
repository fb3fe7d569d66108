"""Where results come from: package versions, the commit of the code, the command line."""

import importlib.util
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dml_accel.core.errors import UsageError

_PACKAGES = (
    *("dml-accel", "torch", "torchvision", "accelerate", "datasets", "timm", "safetensors"),
    "numpy",  # draws the shares of --mixup and --cutmix
)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on.

    None for a package that is not installed: datasets, where runs read no data set with it, and
    this one, where it is run from its checkout.
    """
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_release() -> tuple[int, ...]:
    """Return the first two numbers of torch's version: (2, 15)."""
    import torch

    return tuple(map(int, torch.__version__.split(".")[:2]))


def require_packages(purpose: str, *packages: str) -> None:
    """Refuse to continue without packages that only some commands need.

    Args:
        purpose: what needs them, for the message: ``--format onnx``.
        packages: their names; ``distribution:module`` where the two differ.

    Raises:
        UsageError: one is not installed.
    """
    missing = []
    for package in packages:
        name, _, module = package.partition(":")
        try:
            found = importlib.util.find_spec(module or name)
        except ValueError:  # it is being replaced or blocked in sys.modules
            found = None
        if found is None:
            missing.append(name)
    if missing:
        names = " ".join(missing)
        raise UsageError(f"{purpose} needs {', '.join(missing)}: pip install {names}")


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


@dataclass(frozen=True)
class Caller:
    """Who asks for a run: a command, or a function called in Python.

    Attributes:
        text: the command line or the call, for the record.
        in_python: whether it is a call. Then this process goes on after the run, whatever happens.
        arguments: of a command, without the program's name.
    """

    text: str
    in_python: bool = False
    arguments: tuple[str, ...] = ()

    def again_with(self, **flags: str) -> str:
        """Return how to say the same again with other flags, for messages."""
        if self.in_python:
            return "the same call with " + ", ".join(f"{n}={value!r}" for n, value in flags.items())
        words = (f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
        return "the same command with " + " ".join(words)


def call_text(function: str, arguments: Mapping[str, object]) -> str:
    """Return a call in Python, for the record: ``dml_accel.train(cohort='resnet8*2', lr=0.05)``."""
    return f"dml_accel.{function}({', '.join(f'{n}={one!r}' for n, one in arguments.items())})"


def command_line() -> str:
    """Return the command that started this process, quoted for a shell."""
    script = Path(sys.argv[0]).name
    names = {"__main__.py": ["python", "-m", "dml_accel"], "dml-accel": ["dml-accel"]}
    return shlex.join([*names.get(script, ["python", script]), *sys.argv[1:]])
