"""The shape of the code: one order of packages, a short train.py, nothing that unpickles."""

import ast
import re
from pathlib import Path

from tests.helpers import ROOT

PACKAGE = ROOT / "dml_accel"
# A package imports only from itself and from those before it.
ORDER = "core data models distributed mutual training inference analysis api cli".split()


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it, as dotted names."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dml_accel"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("dml_accel")}
    return names


def test_there_are_ten_packages_and_no_other_code() -> None:
    assert {path.parent.name for path in modules()} == {"dml_accel", *ORDER}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_packages_import_only_from_those_before_them() -> None:
    for path in modules():
        if path.parent == PACKAGE:
            continue
        allowed = ORDER[: ORDER.index(path.parent.name) + 1]
        for name in imported(path):
            assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imported(path)
    graph = {
        name: {
            one for one in graph for found in names if found == one or found.startswith(f"{one}.")
        }
        - {name, "dml_accel", *(f"dml_accel.{package}" for package in ORDER)}
        for name, names in graph.items()
    }
    while leaves := {name for name, names in graph.items() if not names & graph.keys()}:
        graph = {name: names for name, names in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_every_package_lists_its_modules_in_the_order_of_their_imports() -> None:
    for package in ORDER:
        path = PACKAGE / package / "__init__.py"
        text = ast.get_docstring(parse(path), clean=False) or ""
        listed = re.findall(r"^ {4}(\w+) {2,}\S", text, re.M)
        assert sorted(listed) == sorted(one.stem for one in path.parent.glob("[a-z]*.py"))
        for place, name in enumerate(listed):
            later = {f"dml_accel.{package}.{one}" for one in listed[place + 1 :]}
            found = {".".join(one.split(".")[:3]) for one in imported(path.with_stem(name))}
            assert not found & later, f"{package}/{name} imports from below: {found & later}"


def test_a_package_imports_nothing_by_itself() -> None:
    # So that a light module, such as the configuration, does not import heavy ones beside it.
    for package in ORDER:
        (docstring, *rest) = parse(PACKAGE / package / "__init__.py").body
        assert isinstance(docstring, ast.Expr)
        assert not rest or package == "cli"


def test_the_reference_shares_nothing_with_the_fast_path() -> None:
    reference = PACKAGE / "mutual/reference.py"
    assert not imported(reference)
    for path in modules():
        assert not any("reference" in name.split(".") for name in imported(path)), path.name


def test_train_py_is_short() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40


def test_nothing_here_can_unpickle() -> None:
    forbidden = re.compile(
        r"torch\.(save|load)\b|\bpickle\b|allow_pickle|_object_list|_object\(|save_state|load_state\("
    )
    assert len(modules()) > 40
    for path in modules():
        code = "\n".join(line.split("#")[0] for line in path.read_text().splitlines())
        assert not forbidden.search(re.sub(r'""".*?"""', "", code, flags=re.S)), path.name
