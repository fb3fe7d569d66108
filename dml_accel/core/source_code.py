"""A hash of what users register: of a function or class, and of all of its file that it uses.

Hashed is the text of the function, or of the methods of the class, and with it every function,
class and plain constant of the same module that it uses, and what those use. An edit elsewhere in
the file changes nothing. What it imports from other files is not part of it.
"""

import dis
import functools
import hashlib
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from dml_accel.core.errors import UsageError

# Instructions of Python 3.11 to 3.13 that read a name from around a function.
_READS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"}
_READS |= {"LOAD_FROM_DICT_OR_GLOBALS", "LOAD_FROM_DICT_OR_DEREF"}
# Lines of each file as they were when it registered something: it may be edited while a run lasts.
_LINES: dict[str, list[str]] = {}


def remember(thing: Callable[..., Any]) -> None:
    """Read the file or the notebook cell of a function or class, as it is now."""
    for function in _functions(thing):
        file = function.__code__.co_filename
        linecache.checkcache(file)  # a module may be loaded again
        _LINES[file] = linecache.getlines(file, function.__globals__)


def file_of(thing: Callable[..., Any]) -> str:
    """Return the file or the notebook cell that defines a function or class; empty if unknown."""
    return next((one.__code__.co_filename for one in _functions(thing)), "")


def source_sha256(thing: Callable[..., Any]) -> str:
    """Return the hash of a function or class that was remembered.

    Raises:
        UsageError: its source cannot be read; the text says what to do.
    """
    if not any(_functions(thing)):
        raise _unreadable(thing.__qualname__)
    parts: dict[str, str] = {}
    _collect(thing.__name__, thing, thing.__module__, parts, set())
    whole = "\0".join(f"{name}\0{text}" for name, text in sorted(parts.items()))
    return hashlib.sha256(whole.encode()).hexdigest()


def _collect(name: str, value: Any, module: str, parts: dict[str, str], seen: set[int]) -> None:
    """Add a function, class or constant, and what it uses, to ``parts``: texts by name."""
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, (type, FunctionType)):
        if value.__module__ != module or id(value) in seen:
            return
        seen.add(id(value))
        name = value.__qualname__
    if isinstance(value, FunctionType):
        parts[name] = _text(value)
        scope = value.__globals__ | {
            free: cell.cell_contents
            for free, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            if free != "__class__"
        }
        for used in sorted(_names(value.__code__) & scope.keys()):
            local = f"{name}.{used}" if used in value.__code__.co_freevars else used
            _collect(local, scope[used], module, parts, seen)
        defaults = (value.__defaults__, sorted((value.__kwdefaults__ or {}).items()))
        _collect(f"{name}()", defaults, module, parts, seen)
    elif isinstance(value, type):
        parts[name] = "class " + " ".join(base.__qualname__ for base in value.__bases__)
        for base in value.__bases__:
            _collect(base.__name__, base, module, parts, seen)
        for function in _functions(value):
            _collect(function.__name__, function, module, parts, seen)
        for key, item in vars(value).items():  # constants and classes
            if not key.startswith("__"):
                _collect(f"{name}.{key}", item, module, parts, seen)
    elif not name.startswith("__"):
        text = _plain(value)
        if text is not None:
            parts[name] = text


def _functions(thing: Any) -> Iterator[FunctionType]:
    """Yield a function, or those of a class."""
    if not isinstance(thing, type):
        thing = inspect.unwrap(thing)
        if isinstance(thing, FunctionType):
            yield thing
        return
    for item in vars(thing).values():
        parts = (item.fget, item.fset) if isinstance(item, property) else (item,)
        for part in parts:
            if isinstance(part, functools.cached_property):
                part = part.func
            part = getattr(part, "__func__", part)
            # What dataclasses write themselves has no source.
            if isinstance(part, FunctionType) and part.__code__.co_filename != "<string>":
                yield part


def _names(code: CodeType) -> set[str]:
    """Return the names that code takes from around it, with those of the functions inside it."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname in _READS}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _text(function: FunctionType) -> str:
    code = function.__code__
    lines = _LINES.get(code.co_filename)
    if lines is None:
        lines = linecache.getlines(code.co_filename, function.__globals__)
    block = inspect.getblock(lines[code.co_firstlineno - 1 :]) if lines else []
    name = "lambda" if function.__name__ == "<lambda>" else function.__name__
    if not any(name in line for line in block):
        raise _unreadable(function.__qualname__)
    return "\n".join(line.rstrip() for line in textwrap.dedent("".join(block)).splitlines())


def _unreadable(name: str) -> UsageError:
    return UsageError(
        f"the source of {name} cannot be read, and a run records its hash: define it in a file or "
        "a notebook cell"
    )


def _plain(value: Any) -> str | None:
    """Return a constant as text; None if it is another kind of object."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        found = [text for one in value if (text := _plain(one)) is not None]
        if len(found) < len(value):
            return None
        is_set = isinstance(value, (set, frozenset))
        return f"{type(value).__name__} {sorted(found) if is_set else found}"
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of torch or numpy
        return f"{value.dtype} {value.tolist()}"
    return None
