"""Types of the public names: ``mypy --strict`` accepts users' scripts that call all of them."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dml_accel
from tests.helpers import ROOT

SCRIPTS = [ROOT / "tests/api/user_script.py", ROOT / "tests/api/user_methods_script.py"]


def test_the_scripts_call_every_public_name() -> None:
    nodes = [node for path in SCRIPTS for node in ast.walk(ast.parse(path.read_text()))]
    called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(dir(dml_accel)) <= called


def test_users_scripts_are_accepted_in_strict_mode(tmp_path: Path) -> None:
    for path in SCRIPTS:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "wrong.py").write_text('import dml_accel\n\ndml_accel.Run("x").where\n')
    # As for a user: without our settings, from another folder, with the package installed.
    words = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent"]
    words += ["--cache-dir", str(tmp_path / "cache"), *map(str, sorted(tmp_path.glob("*.py")))]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    run: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(words, **run)
    assert len(done.stdout.splitlines()) == 2, done.stdout + done.stderr
    (line, total) = done.stdout.splitlines()
    assert line.startswith("wrong.py:3: ") and '"Run" has no attribute "where"' in line
    assert total.startswith("Found 1 error in 1 file")
