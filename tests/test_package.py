"""The package as others install it: what it contains, what it requires, that it runs anywhere."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment, run_program

# Names of distributions that are imported by another one.
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
# Of these, only a file is read.
NOT_IMPORTED = {"sklearn"}
# Extras: if one is missing, an error says how to install it.
OPTIONAL = {"onnx", "onnxruntime", "onnxscript"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source archive of a copy of the tree, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    left = shutil.ignore_patterns(".*", "*.egg-info", "build", "runs", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=left)
    make = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(folder / "tree", "-c", make, str(folder))
    (source,) = folder.glob("*.tar.gz")
    run(folder, *"-m pip wheel -q --no-deps --no-build-isolation -w".split(), ".", str(source))
    (wheel,) = folder.glob("*.whl")
    return {"source": source, "wheel": wheel}


def run(folder: Path, *words: str, python: str = sys.executable) -> str:
    """Run Python in a folder of its own; return what it prints."""
    done = subprocess.run(
        [python, *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_contains_all_of_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    found = {path for path in names if ".dist-info/" not in path}
    tree = [path for path in (ROOT / "dml_accel").rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in tree if "__pycache__" not in path.parts}
    assert found == expected
    assert {path.rpartition(".")[2] for path in found} == {"py", "typed", "j2", "csv"}


def test_the_source_archive_can_be_tested(built: dict[str, Path]) -> None:
    with tarfile.open(built["source"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = ("README.md", "CHANGELOG.md", "docs/training.md", "train.py", "launch/slurm.sh")
    for path in (*files, "tests/worker.py", "tests/data/folders.py"):
        assert path in names, path


def test_it_runs_as_a_module_from_an_environment_of_its_own(
    built: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    words = f"-m pip --python {python} install -q --no-deps {built['wheel']}"
    run(tmp_path, *words.split())
    # What it requires is found in this environment, which was installed from the same list.
    (ours,) = (Path(path) for path in sys.path if path.endswith("site-packages"))
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (packages / "needed.pth").write_text(f"{ours}\n")
    there = run(tmp_path, "-c", "import dml_accel; print(dml_accel.__file__)", python=str(python))
    assert there.strip() == str(packages / "dml_accel/__init__.py")
    train = "--cohort resnet8*2 --dataset digits --image-size 16 --batch-size 8 --max-steps 2 --cpu"
    words = f"-m dml_accel train {train} --output-dir run"
    run(tmp_path, *words.split(), python=str(python))
    assert (tmp_path / "run/results.json").is_file()


def test_exactly_what_is_imported_is_required() -> None:
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    required = re.findall(r"^([\w-]+)", found["options"]["install_requires"], re.M)
    declared = {IMPORTED_AS.get(name, name) for name in required}
    imported = set()
    for path in (ROOT / "dml_accel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    imported -= {*sys.stdlib_module_names, "dml_accel", *OPTIONAL}
    assert imported == declared - NOT_IMPORTED


def test_an_environment_is_not_made_in_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run_program(sys.executable, "launch/start.py", "--env", tmp_path, "lint")
    assert done.returncode == 2
    assert "holds what this script did not put there" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_lower_bounds_are_the_versions_that_are_tested() -> None:
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    sections = [found["options"]["install_requires"], *found["options.extras_require"].values()]
    bounds = re.findall(r"^([\w-]+)(>=.*)?$", "\n".join(sections[:-1]), re.M)
    tested = (ROOT / "tests/lower-bounds.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==(\S+)$", tested, re.M))
    # The builder and the linters come with any environment in their newest version.
    for name, bound in bounds:
        if name not in ("setuptools", "ruff", "mypy"):
            assert oldest[name] == bound[2:] or oldest[name].startswith(f"{bound[2:]}."), name
            assert "dev" not in oldest[name], "a bound of a release excludes what came before it"
