"""What a command was asked for: defaults, a preset, a recipe, a file, flags; the later ones win."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dml_accel.core.assignments import peer_settings, peer_text
from dml_accel.core.config import Config, same_family
from dml_accel.core.config_file import ConfigFile
from dml_accel.core.errors import UsageError
from dml_accel.core.host import expanded
from dml_accel.core.recipes import Flags, flags_of

# Of a run that is repeated: where it was is not where it is repeated.
_OF_ONE_RUN = ("output_dir", "resume")
# What a peer has with any optimizer.
_OF_ANY_OPTIMIZER = ("momentum", "weight_decay")


# Flags that name files or folders, beside --dataset, which may name one of the hub.
_PATHS = {"config", "folders", "frozen_peers", "links", "output_dir", "plot", "resume", "source"}
_PATHS |= {"to"}


def with_homes(values: dict[str, Any]) -> dict[str, Any]:
    """Put home directories in place; a shell leaves ``--to=~/x`` to us, and so does a file."""
    for name in _PATHS & values.keys():
        if isinstance(values[name], str):
            values[name] = _without_tilde(values[name])
        elif isinstance(values[name], (list, tuple)):
            values[name] = type(values[name])(map(_without_tilde, values[name]))
    return values


def _without_tilde(path: str) -> str:
    return str(expanded(path)) if path.startswith("~") else path


@dataclass(frozen=True)
class Settings:
    """What a command was asked for.

    Attributes:
        config: all flags.
        recipe: the name of the recipe behind them; empty if there is none.
        file: the file behind them, if there is one.
        given: names of the flags on the command line.
        chosen: the flags of the file and of the command line.
        left_out: flags of a repeated run that suit its optimizer only, not the one that is given.
    """

    config: Config
    recipe: str = ""
    file: ConfigFile | None = None
    given: frozenset[str] = frozenset()
    chosen: Flags = field(default_factory=dict)
    left_out: Flags = field(default_factory=dict)


def settle(
    given: Flags,
    recipe: str | None = None,
    file: ConfigFile | None = None,
    base: Flags | None = None,
) -> Settings:
    """Return what flags, file and recipe say together; each overrides what stands after it.

    Args:
        given: the flags on the command line.
        recipe: ``--recipe``, if it is given.
        file: that of ``--config``.
        base: what a preset sets, which everything else overrides.

    Raises:
        UsageError: the recipe is unknown, or values exclude each other; the text says which of
            them come from the recipe or the file.
    """
    read, name = dict(file.flags) if file else {}, recipe
    of_recipe: Flags = {}
    left_out: Flags = {}
    repeats = file is not None and file.description is not None
    if file is not None and repeats:
        if recipe is not None:
            raise UsageError(
                f"--recipe {recipe} would change nothing: {file.path} sets every flag; drop one"
            )
        read = {flag: value for flag, value in read.items() if flag not in _OF_ONE_RUN}
        read, left_out = _for_optimizer(read, given)
    if file is not None and name is None:
        name = file.recipe
    chosen, origins = read | given, dict.fromkeys(read, str(file.path if file else ""))
    try:
        if name is not None and not repeats:
            of_recipe = flags_of(name, chosen)
            origins = dict.fromkeys(of_recipe, f"--recipe {name}") | origins
        values = (base or {}) | of_recipe | chosen
        if "peer_opt" in of_recipe:
            values["peer_opt"] = (*of_recipe["peer_opt"], *chosen.get("peer_opt", ()))
        config = Config(**values)
        config.method.refuse_missing()
    except UsageError as error:
        raise UsageError(f"{error}{_whence(str(error), origins, given)}") from error
    return Settings(config, name or "", file, frozenset(given), chosen, left_out)


def _for_optimizer(read: Flags, given: Flags) -> tuple[Flags, Flags]:
    """Return a run's flags without those of its optimizer, if the given one is no kin; and those.

    A rate that suits SGD is a hundred times too high for AdamW.
    """
    was = str(read.get("optimizer", Config().optim.optimizer))
    if same_family(given.get("optimizer", was), was):
        return read, {}
    left_out: Flags = {name: read[name] for name in ("lr", "opt_args") if read.get(name)}
    kept = {name: value for name, value in read.items() if name not in left_out}
    of_peers = [peer_settings(text) for text in read.get("peer_opt", ())]
    have_one = {peer for peer, settings in of_peers if "optimizer" in settings}
    texts: dict[bool, list[str]] = {True: [], False: []}
    for peer, settings in of_peers:
        for keeps, found in texts.items():
            part = {
                key: value
                for key, value in settings.items()
                if keeps == (peer in have_one or key in _OF_ANY_OPTIMIZER)
            }
            found += [peer_text(peer, part)] if part else []
    if texts[False]:
        kept["peer_opt"], left_out["peer_opt"] = texts[True], texts[False]
    return kept, {name: value for name, value in left_out.items() if name not in given}


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
    file: ConfigFile, given: Collection[str], processes: int, cores: int, starts: bool = False
) -> ConfigFile:
    """Return the file of a run with what that run found out where its flags left it to the machine.

    Args:
        file: config.json of a run.
        given: names of the flags on the command line.
        processes: of this command.
        cores: that this process may use.
        starts: whether the command may start processes by itself, or has started this one.
    """
    # Of a file that anybody may have written; what becomes a flag is checked as one.
    flags, found = dict(file.flags), (file.description or {}).get("resolved")
    resolved: Mapping[str, Any] = found if isinstance(found, dict) else {}
    same = {"threads", "mixed_precision", "memory_format"}
    same |= {"augment"} if "dataset" not in given else set()
    for name in same & resolved.keys():
        if flags.get(name) is None:
            flags[name] = resolved[name]
    if flags.get("compile") == "auto" and "compile" in resolved:
        flags["compile"] = resolved["compile"]
    alike = resolved.get("world_size") == processes > 1 and "update" not in given
    if flags.get("placement") == "auto" and alike:
        flags["placement"] = resolved.get("placement", "auto")
    device = resolved.get("device")
    if isinstance(device, dict) and device.get("type") == "cpu":
        flags["cpu"] = True  # there was no accelerator; here may be one
    if isinstance(flags.get("threads"), int) and flags["threads"] > cores:
        flags["threads"] = None  # which the repeated run says
    count, threads = resolved.get("processes", 1), flags.get("threads") or 1
    known = type(count) is int and type(threads) is int and "threads" not in given
    fits = known and 1 <= count * threads <= cores
    flags["processes"] = str(count) if starts and fits else "auto"
    return ConfigFile(file.path, flags, file.recipe, file.description)
