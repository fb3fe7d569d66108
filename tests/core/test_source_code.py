"""The hash of a function or class changes with what it uses of its file, and with nothing else."""

import importlib.util
import itertools
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dml_accel.core.errors import UsageError
from dml_accel.core.source_code import remember, source_sha256

SOURCE = '''
import math
from dataclasses import dataclass
from math import pi

import torch

SCALE = 2.0
WEIGHTS = torch.tensor([1.0, 2.0])
NAMES = {"a", "b"}
UNUSED = 1


def helper(x):
    return inner(x) * SCALE


def inner(x):
    return [math.sin(one) + pi for one in x]


def unused(x):
    return x


class Base:
    factor = 3

    def of_base(self):
        return helper([1])


@dataclass
class Numbers:
    first: int = 1


class Used(Base):
    def method(self):
        return self.of_base() + Numbers().first

    @property
    def value(self):
        return 1

    @staticmethod
    def other(x):
        return x


def function(x, y=1):
    """Text."""
    def nested(z):
        return helper(z)

    return nested(x) + WEIGHTS.sum() + len(NAMES) + recursive(y)


def recursive(n):
    return function(n) if n else 0


def make(factor):
    def made(x):
        return factor * x

    return made


three = make(3)
'''

_count = itertools.count()


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., Any]:
    """Import the source, with changes, as a new file of the same module name."""

    def build(*changes: tuple[str, str], source: str = SOURCE) -> Any:
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path = tmp_path / f"{next(_count)}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("mine", path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return build


def sha256(thing: Any) -> str:
    remember(thing)
    return source_sha256(thing)


SAME = [
    ("UNUSED = 1", "UNUSED = 2"),
    ("def unused(x):\n    return x", "def unused(x):\n    return -x"),
    ("import math\n", "# A comment.\nimport math\n\n\n"),
]
OTHER = {
    "function": [
        ('    """Text."""', '    """Another text."""'),
        ("len(NAMES)", "2 * len(NAMES)"),
        ("y=1", "y=2"),
        ("return helper(z)", "return helper(2 * z)"),  # inside it
        ("SCALE = 2.0", "SCALE = 2.5"),  # of a function that it uses
        ("[1.0, 2.0]", "[1.0, 3.0]"),
        ('{"a", "b"}', '{"a", "c"}'),
        ("math.sin(one)", "math.cos(one)"),  # two calls away
        ("function(n) if n else 0", "function(n) if n else 1"),
        ("from math import pi", "pi = 3"),
    ],
    "Used": [
        ("self.of_base() +", "self.of_base() -"),
        ("    def value(self):\n        return 1", "    def value(self):\n        return 2"),
        ("    def other(x):\n        return x", "    def other(x):\n        return -x"),
        ("factor = 3", "factor = 4"),  # of the class that it derives from
        ("return helper([1])", "return helper([2])"),
        ("math.sin(one)", "math.cos(one)"),
        ("first: int = 1", "first: int = 2"),
        ("class Used(Base):", "class Used(Base, Numbers):"),
    ],
    "three": [("return factor * x", "return factor + x"), ("make(3)", "make(4)")],
}


@pytest.mark.parametrize("name", OTHER)
def test_the_hash_changes_with_what_is_used_and_with_nothing_else(
    module: Callable[..., Any], name: str
) -> None:
    before = sha256(getattr(module(), name))
    assert len(before) == 64
    assert sha256(getattr(module(*SAME), name)) == before
    for change in OTHER[name]:
        assert sha256(getattr(module(change), name)) != before, change


def test_an_edit_while_a_run_lasts_changes_nothing(module: Callable[..., Any]) -> None:
    found = module()
    before = sha256(found.function)
    path = Path(found.__file__)
    path.write_text("# Line.\n" * 50 + path.read_text().replace("math.sin(one)", "math.cos(one)"))
    linecache.checkcache()  # as tracebacks do
    assert source_sha256(found.function) == before


def test_a_module_is_loaded_again(module: Callable[..., Any]) -> None:
    found = module()
    before = sha256(found.function)
    path = Path(found.__file__)
    path.write_text(path.read_text().replace("len(NAMES)", "-len(NAMES)"))
    found.__loader__.exec_module(found)
    assert sha256(found.function) != before


def test_cells_of_a_notebook() -> None:
    def cell(number: int, text: str, scope: dict[str, Any]) -> None:
        name = f"<cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), scope)

    scope: dict[str, Any] = {"__name__": "__main__"}
    cell(1, "def helper(x):\n    return x\n", scope)
    cell(2, "\ndef own(x):\n    return helper(x)\n\nclass Own:\n    use = own\n", scope)
    before = sha256(scope["own"]), sha256(scope["Own"])
    cell(3, "def other(x):\n    return x\n", scope)
    assert (source_sha256(scope["own"]), source_sha256(scope["Own"])) == before
    cell(4, "def helper(x):\n    return 2 * x\n", scope)
    assert source_sha256(scope["own"]) != before[0]
    assert source_sha256(scope["Own"]) != before[1]


@pytest.mark.parametrize(
    "text", ["def own(x):\n    return x\n", "class own:\n    def f(x): return x"]
)
def test_without_a_source_it_is_refused(text: str) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(text, scope)
    with pytest.raises(UsageError, match=r"own.* cannot be read.*a file or a notebook cell"):
        sha256(scope["own"])
