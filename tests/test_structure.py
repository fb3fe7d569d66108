"""The shape of the code: one reading order, a short train.py, nothing that unpickles."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dml_accel"
# A file imports only from those above it; the README lists them in this order.
ORDER = [
    "config",
    "files",
    "keys",
    "trackers",
    "launching",
    "decoding",
    "sources",
    "data",
    "networks",
    "pretrained",
    "losses",
    "reference",
    "metrics",
    "cohort",
    "building",
    "packing",
    "checkpoint",
    "links",
    "teaching",
    "batchnorm",
    "allocation",
    "processes",
    "compiling",
    "placement",
    "frozen",
    "schedules",
    "agenda",
    "engine",
    "workload",
    "export",
    "costs",
    "planning",
    "provenance",
    "saved",
    "runfolder",
    "progress",
    "report",
    "checking",
    "origin",
    "resuming",
    "keeping",
    "preparing",
    "recording",
    "training",
    "api",
    "intervals",
    "published",
    "methods",
    "subruns",
    "comparison",
    "comparison_report",
    "plots",
    "comparison_folder",
    "compare",
    "history",
    "analysis",
    "pictures",
    "page",
    "trained",
    "evaluation",
    "predicting",
    "onnx_model",
    "exporting",
    "using",
    "flags",
    "cli",
]
FRAME = {"__init__", "__main__"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dml_accel"):
            below = node.module.partition(".")[2]
            names |= {below} if below else {alias.name for alias in node.names}
    return names


def test_every_file_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER) | FRAME


def test_a_file_imports_only_from_those_above_it() -> None:
    for place, name in enumerate(ORDER):
        assert imported(PACKAGE / f"{name}.py") <= set(ORDER[:place]), name


def test_the_reference_shares_nothing_with_the_fast_path() -> None:
    assert not imported(PACKAGE / "reference.py")
    for name in ORDER:
        assert "reference" not in imported(PACKAGE / f"{name}.py"), name


def test_the_readme_lists_the_files_in_order() -> None:
    listed = re.findall(r"^    dml_accel/(\w+)\.py", (ROOT / "README.md").read_text(), re.M)
    assert [name for name in listed if name not in FRAME] == ORDER


def test_train_py_is_short() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40


def test_nothing_here_can_unpickle() -> None:
    forbidden = re.compile(
        r"torch\.(save|load)\b|\bpickle\b|allow_pickle|_object_list|_object\(|save_state|load_state\("
    )
    for path in PACKAGE.glob("*.py"):
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        assert not forbidden.search(re.sub(r'""".*?"""', "", code, flags=re.S)), path.name
