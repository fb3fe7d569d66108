"""The package as others install it: what is in it, what it needs, that it runs without its tree."""

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

ROOT = Path(__file__).parent.parent
# Names of distributions that are imported by another one.
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL"}
# Extras: where one is missing a line says how to install it.
OPTIONAL = {"onnx", "onnxruntime", "onnxscript"}
# timm imports it; named because it must be the one that belongs to torch.
THROUGH_OTHERS = {"torchvision"}


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
    done = subprocess.run([python, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_the_package_alone(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    package = {path for path in names if ".dist-info/" not in path}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dml_accel").rglob("*.py")}
    template = "dml_accel/analysis/templates/report.html.j2"
    assert package == expected | {"dml_accel/py.typed", template}


def test_the_source_archive_can_be_tested(built: dict[str, Path]) -> None:
    with tarfile.open(built["source"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("README.md", "CHANGELOG.md", "train.py", "launch/slurm.sh", "tests/worker.py"):
        assert path in names, path


def test_it_is_launched_as_a_module_from_an_environment_of_its_own(
    built: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    words = f"-m pip --python {python} install -q --no-deps {built['wheel']}"
    run(tmp_path, *words.split())
    # What it needs is this environment's, which installed that by the same list.
    (ours,) = (Path(path) for path in sys.path if path.endswith("site-packages"))
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (packages / "needed.pth").write_text(f"{ours}\n")
    there = run(tmp_path, "-c", "import dml_accel; print(dml_accel.__file__)", python=str(python))
    assert there.strip() == str(packages / "dml_accel/__init__.py")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 -m dml_accel train"
    train = "--cohort resnet8*2 --dataset digits --image-size 16 --batch-size 8 --max-steps 2 --cpu"
    words = f"{launch} {train} --output-dir run"
    run(tmp_path, *words.split(), python=str(python))
    assert (tmp_path / "run/results.json").is_file()


def test_what_is_imported_is_required_and_nothing_else() -> None:
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
    assert imported == declared - THROUGH_OTHERS
