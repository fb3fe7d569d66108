"""Files of flags, for ``--config``: JSON or YAML, or the config.json of a run.

    cohort: [resnet8*2, resnet20]
    lr-schedule: cosine
    optim:              # a section of the configuration may hold its flags
      weight-decay: 5e-4

A file is untrusted: its size is limited, and nothing in it can execute code.
"""

import difflib
import json
import re
import typing
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dml_accel.core.config import flag_groups, flag_types, typed
from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import LARGEST_JSON, read_at_most, text_of
from dml_accel.core.lessons import allow_recorded

RECIPE = "recipe"  # the key that names one
_LONGEST_REASON = 200  # characters
_LARGEST_YAML = 2**16  # bytes: it is read by a slow parser, and holds flags only
_ENDINGS = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}


@dataclass(frozen=True)
class ConfigFile:
    """What a file says.

    Attributes:
        path: of the file.
        flags: by name, with their values.
        recipe: the name of one, if there is one.
        description: the whole file, if it is the config.json of a run.
    """

    path: Path
    flags: dict[str, Any]
    recipe: str | None = None
    description: dict[str, Any] | None = None


def read_config_file(path: Path) -> ConfigFile:
    """Read a file of flags.

    Raises:
        UsageError: it cannot be read, or says what no flag can have; the text names the key.
    """
    if path.is_dir():
        raise UsageError(f"--config {path} is a folder; the flags of a run are in its config.json")
    language = _ENDINGS.get(path.suffix.lower())
    if language is None:
        raise UsageError(f"--config {path}: its name must end in {', '.join(_ENDINGS)}")
    most = LARGEST_JSON if language == "JSON" else _LARGEST_YAML
    text = text_of(path, read_at_most(path, most))
    try:
        found = _from_json(text) if language == "JSON" else yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, _TwiceError):
            raise UsageError(f"{path} says {error} twice") from error
        why = one_line(error)[:_LONGEST_REASON]
        raise UsageError(f"{path} is not valid {language}: {why}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold flags by name, such as lr: 0.1")
    if isinstance(found.get("config"), dict):  # no flag is called so
        allow_recorded(found.get("registered"))
        flags, _ = _flags(path, found["config"])
        recipe = found.get(RECIPE)
        return ConfigFile(path, flags, recipe if isinstance(recipe, str) else None, found)
    return ConfigFile(path, *_flags(path, found))


# ---------------------------------------------------------------- keys and values


def _flags(path: Path, found: Mapping[Any, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the flags and the recipe of a mapping whose keys are flags or sections."""
    flags: dict[str, Any] = {}
    sections = {group.title: [one.name for one in group.fields] for group in flag_groups()}
    recipe: str | None = None

    def take(key: Any, value: Any, known: Iterable[str], section: str = "") -> None:
        name = str(key).replace("-", "_")
        if name not in known:
            _refuse_key(path, str(key), section, sections)
        if name in flags:
            raise UsageError(f"{path} says {key} twice")
        flags[name] = _value(path, str(key), name, value)

    for key, value in found.items():
        if key == RECIPE:
            if not isinstance(value, str):
                raise UsageError(f"{path}: {RECIPE} must be the name of one")
            recipe = value
        elif key in sections and isinstance(value, dict):
            for inner, one in value.items():
                take(inner, one, sections[key], key)
        else:
            take(key, value, flag_types())
    return flags, recipe


def _refuse_key(
    path: Path, key: str, section: str, sections: Mapping[str, Iterable[str]]
) -> NoReturn:
    searched = {section: sections[section]} if section else sections
    owner = {name.replace("_", "-"): title for title, names in searched.items() for name in names}
    near = difflib.get_close_matches(key.replace("_", "-"), owner, n=1)
    shown = (section or owner[near[0]],) if section or near else tuple(sections)
    keys = "; ".join(
        f"{title}: {', '.join(name for name in owner if owner[name] == title)}" for title in shown
    )
    where = f" in {section}" if section else ""
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"{path}: unknown key {key[:40]!r}{where}: {hint}The keys of {keys}")


def _value(path: Path, key: str, name: str, value: Any) -> Any:
    """Return the value of a flag; where it takes several, a single one may stand alone."""
    hint = flag_types()[name]
    parts = [hint, *typing.get_args(hint)]
    several = next((part for part in parts if typing.get_origin(part) is tuple), None)
    if several and value is not None:
        values = value if isinstance(value, list) else [value]
        words = typing.get_args(several)[0] is str
        value = [str(one) if words and type(one) is int else one for one in values]
    if isinstance(value, dict) or any(
        isinstance(one, (dict, list)) for one in (value if isinstance(value, list) else ())
    ):
        raise UsageError(f"{path}: {key} holds more than a value or a list of values")
    try:
        return typed(name, value)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


# ---------------------------------------------------------------- JSON and YAML


class _TwiceError(ValueError):
    """A key that stands twice in a mapping."""


def _from_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _TwiceError(key)
            found[key] = value
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


class _Loader(yaml.SafeLoader):
    """YAML as people read it: ``5e-4`` is a number, and ``no`` and ``off`` are words."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping whose keys are all different."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # others cannot be keys, as is said below
                if key.value in seen:
                    raise _TwiceError(str(key.value))
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(null|~|)$"), ["n", "~", ""])
_DIGITS = list("-+.0123456789")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), _DIGITS)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"),
    _DIGITS,
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))
