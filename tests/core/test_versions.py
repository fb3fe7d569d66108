"""What a run records about the code that made it."""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from dml_accel.core import versions
from dml_accel.core.errors import UsageError
from tests.helpers import ROOT, run_program


def test_the_commit_is_that_of_this_checkout() -> None:
    if not (ROOT / ".git").exists():
        assert versions.commit() is None
        return
    found = versions.commit()
    head = run_program("git", "rev-parse", "HEAD").stdout.strip()
    assert found is not None and found.removesuffix("-dirty") == head


def test_a_copy_outside_of_a_checkout_has_no_commit(tmp_path: Path) -> None:
    # A checkout of somebody else that contains the package is not the package's.
    def commit_of(folder: Path) -> str:
        script = f"import sys; sys.path.insert(0, {str(folder)!r}); "
        script += "from dml_accel.core.versions import commit; print(commit())"
        done = run_program(sys.executable, "-I", "-c", script)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    left = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dml_accel", tmp_path / "project/env/dml_accel", ignore=left)
    assert commit_of(tmp_path / "project/env") == "None"
    subprocess.run(["git", "init", "-q", tmp_path / "project"], check=True)
    assert commit_of(tmp_path / "project/env") == "None"


def test_versions_of_all_that_results_depend_on() -> None:
    found = versions.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__.partition("+")[0]
    names = {"python", "dml-accel", "torch", "torchvision", "accelerate", "datasets", "timm"}
    assert set(found) == {*names, "safetensors", "numpy"}


def test_a_package_without_metadata_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_torch(name: str) -> str:
        if name == "torch":
            return "2.6.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", only_torch)
    found = versions.versions()
    assert found["torch"] == "2.6.0"
    assert found["datasets"] is None and found["dml-accel"] is None


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    versions.require_packages("this", "torch", "scikit-learn:sklearn")
    with pytest.raises(UsageError, match="^this needs p, q: pip install p q$"):
        versions.require_packages("this", "torch", "p", "q:no_such_module")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/x/train.py", "--cohort", "resnet8*2"], "python train.py --cohort 'resnet8*2'"),
        (["/x/dml_accel/__main__.py", "train"], "python -m dml_accel train"),
        (["/x/bin/dml-accel", "plan", "--world", "2"], "dml-accel plan --world 2"),
    ],
)
def test_the_command_line_can_be_pasted_into_a_shell(
    monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    assert versions.command_line() == said
