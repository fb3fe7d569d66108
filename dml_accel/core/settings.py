"""What a command was asked for: defaults, then a recipe, then a file, then its flags."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dml_accel.core.config import Config
from dml_accel.core.config_file import ConfigFile
from dml_accel.core.errors import UsageError
from dml_accel.core.recipes import Flags, flags_of

# Of a run that is repeated: where it was is not where it is repeated.
_OF_ONE_RUN = ("output_dir", "resume")


@dataclass(frozen=True)
class Settings:
    """What a command was asked for.

    Attributes:
        config: all flags.
        recipe: the name of the recipe behind them; empty if there is none.
        file: the file behind them, if there is one.
        given: names of the flags on the command line.
    """

    config: Config
    recipe: str = ""
    file: ConfigFile | None = None
    given: frozenset[str] = frozenset()


def settle(
    given: Flags, recipe: str = "", file: ConfigFile | None = None, base: Flags | None = None
) -> Settings:
    """Return what flags, file and recipe say together; each overrides what stands after it.

    Args:
        given: the flags on the command line.
        recipe: ``--recipe``; empty if it is not given.
        file: that of ``--config``.
        base: what a preset sets, which everything else overrides.

    Raises:
        UsageError: the recipe is unknown, or values exclude each other; the text says which of
            them come from the recipe or the file.
    """
    read = dict(file.flags) if file else {}
    if file and file.description is not None:
        if recipe:
            raise UsageError(
                f"--recipe {recipe} would change nothing: {file.path} sets every flag; drop one"
            )
        read = {name: value for name, value in read.items() if name not in _OF_ONE_RUN}
        name, from_recipe = file.recipe, {}
    else:
        name = recipe or (file.recipe if file else "")
        from_recipe = flags_of(name, (base or {}) | read | given) if name else {}
    try:
        config = Config(**(base or {}) | from_recipe | read | given)
    except UsageError as error:
        origins = dict.fromkeys(from_recipe, f"--recipe {name}")
        origins |= {flag: str(file.path) for flag in read} if file else {}
        raise UsageError(f"{error}{_whence(str(error), origins, given)}") from error
    return Settings(config, name, file, frozenset(given))


def _whence(text: str, origins: Mapping[str, str], given: Collection[str]) -> str:
    """Return which flags in an error's text come from elsewhere than the command line."""
    named = [name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", text)]
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(named):
        if name in origins and name not in given:
            found.setdefault(origins[name], []).append(f"--{name.replace('_', '-')}")
    said = [f"{' and '.join(flags)} from {origin}" for origin, flags in found.items()]
    return f" ({', '.join(said)})" if said else ""


def with_resolved(
    file: ConfigFile, given: Collection[str], processes: int, cores: int
) -> ConfigFile:
    """Return the file of a run with what that run found out where its flags left it to the machine.

    Args:
        file: config.json of a run.
        given: names of the flags on the command line.
        processes: of this command.
        cores: that this process may use.
    """
    flags, found = dict(file.flags), (file.description or {}).get("resolved")
    resolved: Mapping[str, Any] = found if isinstance(found, dict) else {}
    same = {"threads", "mixed_precision", "memory_format"}
    same |= {"augment"} if "dataset" not in given else set()
    for name in same & resolved.keys():
        if flags.get(name) is None:
            flags[name] = resolved[name]
    if flags.get("compile") == "auto" and "compile" in resolved:
        flags["compile"] = resolved["compile"]
    if flags.get("placement") == "auto" and resolved.get("world_size") == processes > 1:
        flags["placement"] = resolved["placement"]
    if isinstance(flags.get("threads"), int) and flags["threads"] > cores:
        flags["threads"] = None  # which the repeated run says
    return ConfigFile(file.path, flags, file.recipe, file.description)
