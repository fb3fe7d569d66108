"""A run, and a comparison of methods over seeds: their functions, and what these return.

torch is imported when they are called: the commands print usage errors at once.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dml_accel.analysis.methods import DEFAULT_METHODS, PRESETS, SET_BY_METHODS, refuse_unknown
from dml_accel.core import recipes
from dml_accel.core.config import Config, flag_types, near, typed
from dml_accel.core.config_file import read_config_file
from dml_accel.core.errors import UsageError
from dml_accel.core.files import read_json
from dml_accel.core.flags import require
from dml_accel.core.host import cores, expanded, importing_for_good
from dml_accel.core.recipes import Flags
from dml_accel.core.settings import Settings, settle, with_homes, with_resolved
from dml_accel.core.versions import Caller, call_text, require_packages
from dml_accel.distributed import environment
from dml_accel.distributed.launch import launched_processes, launched_rank, own_processes

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame

    from dml_accel.api.trained import Networks

PathLike = str | os.PathLike[str]
# What tables and figures over seeds need.
_ANALYSIS = ("scipy", "matplotlib")
_ENSEMBLE, _TRAIN, _LAST = "ensemble", "train", "last"
# The columns of ``Run.metrics`` that every row has; those of metrics follow, as they are found.
_WORDS = {
    "split",
    "weights",
    "peer",
    "cohort",
    "method",
    "of",
    "name",
    "metric",
    "step",
    "epoch",
    "n",
}
_COLUMNS = ("step", "epoch", "split", "weights", "peer", "time", "lr")


# ---------------------------------------------------------------- what is returned


@dataclass(frozen=True, init=False)
class Run:
    """A run, finished or not, as its folder holds it. It stands for that folder where one is named.

        run = dml_accel.Run("runs/pair")
        run.metrics.query("split == 'test'").pivot(index="epoch", columns="peer", values="top1")

    Everything is read when it is asked for, so that a run can be watched while it goes on.

    Args:
        path: of the folder.

    Raises:
        UsageError: the folder does not hold a run.
    """

    path: Path

    def __init__(self, path: PathLike) -> None:
        object.__setattr__(self, "path", expanded(os.fspath(path)))
        from dml_accel.training.run_folder import mark_of_a_run

        if not mark_of_a_run(self.path):
            raise UsageError(f"{self.path} does not hold a run; name the folder of one")

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def status(self) -> str:
        """``running``, ``stopped``, ``done`` or ``failed``."""
        return self._saved.status

    @property
    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            UsageError: config.json cannot be read, or is of another version.
        """
        return self._saved.config

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json: fractions in [0, 1], NLL in nats, memory in bytes.

        ``results["peers"]`` has an entry for each network, ``results["ensemble"]`` that of their
        mean posterior.

        Raises:
            UsageError: the run is not finished; the text says how far it is.
        """
        if not self._saved.is_done:
            raise UsageError(f"{self.path} is not finished ({self._saved.state}): no results yet")
        return self._saved.results

    @property
    def metrics(self) -> "DataFrame":
        """The records of metrics.jsonl: a row for each network in each record.

        Columns that every row has:

            step      optimizer steps that were taken
            epoch     as people count: the first is 1
            split     train: means over the steps since the last such row; val, test: evaluations
            weights   last; or ema, the averages of the weights
            peer      the network; ensemble: the mean posterior of all
            time      seconds since 1970
            lr        learning rate, of rows of training

        Then those of the numbers: ``cross_entropy``, ``kl`` and ``loss`` (nats; missing where the
        network skipped all steps) and ``seconds`` of a step in rows of training; ``top1``,
        ``top5``, ``ece``, ``macro_f1`` (fractions), ``nll`` (nats) and ``n`` (images) in rows of
        evaluations. A run without records has no rows.

        Raises:
            UsageError: metrics.jsonl cannot be read.
        """
        import pandas as pd

        rows = [row for event in self._saved.events for row in _rows(event)]
        names = dict.fromkeys((*_COLUMNS, *(name for row in rows for name in row)))
        found = pd.DataFrame(rows, columns=list(names))
        return found.astype(dict.fromkeys(set(names) - _WORDS, float))  # also where all are missing

    def networks(
        self,
        checkpoint: PathLike | int | None = None,
        weights: str | None = None,
        device: "str | torch.device | None" = None,
    ) -> "Networks":
        """Return the trained networks, ready to predict; see ``dml_accel.load``."""
        from dml_accel.api.trained import load

        return load(self, checkpoint=checkpoint, weights=weights, device=device)

    @property
    def _saved(self) -> Any:
        from dml_accel.training.run_folder import SavedRun

        return SavedRun(self.path)


def _rows(event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``Run.metrics`` that a line of metrics.jsonl makes."""
    base = {name: event.get(name) for name in ("step", "epoch", "time")}
    if event.get("event") == "step":
        seconds = event["seconds"] / event["steps"]
        for peer, losses in event["peers"].items():
            lr = event.get("lrs", {}).get(peer, event["lr"])
            row = {"split": _TRAIN, "weights": _LAST, "peer": peer, "lr": lr}
            yield base | row | losses | {"seconds": seconds}
    elif event.get("event") == "eval":
        found = {_LAST: event, "ema": event.get("ema") or {}}
        for weights, splits in found.items():
            for split in ("val", "test"):
                metrics = splits.get(split)
                if metrics:
                    named = metrics["peers"] | {_ENSEMBLE: metrics["ensemble"]}
                    for peer, values in named.items():
                        plain = {n: one for n, one in values.items() if not isinstance(one, dict)}
                        yield base | {"split": split, "weights": weights, "peer": peer} | plain


@dataclass(frozen=True, init=False)
class Comparison:
    """A comparison of methods, as its folder holds it.

    Args:
        path: of the folder.

    Raises:
        UsageError: there is no such folder.
    """

    path: Path

    def __init__(self, path: PathLike) -> None:
        object.__setattr__(self, "path", expanded(os.fspath(path)))
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is not a folder; name that of a comparison")

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            UsageError: it cannot be read, or the folder does not hold a comparison.
        """
        found = read_json(self.path / "results.json")
        if not isinstance(found.get("cohorts"), list):
            raise UsageError(f"{self.path} does not hold a comparison; name the folder of one")
        return found

    @property
    def failed(self) -> dict[str, str]:
        """The runs that ended without results, by folder, and why."""
        return dict(self.results["failed"])

    @property
    def table(self) -> "DataFrame":
        """Means over seeds, and paired differences to independent training.

        A row for each cohort, method, group of networks and metric:

            cohort, method       as they were asked for
            of, name             the group: architecture, peer, cohort (the mean over its networks)
                                 or ensemble; and which one
            metric               top1, top5, ece, macro_f1 (fractions in [0, 1]) or nll (nats)
            n, mean, sd          over seeds
            low, high            the 95% t-interval of the mean
            difference           to independent training, paired by seed
            difference_low, difference_high, p, p_holm      its interval and p-values

        What cannot be computed, such as the interval of one seed, is missing.
        """
        import pandas as pd

        from dml_accel.analysis.statistics import METRICS

        rows = []
        for cohort in self.results["cohorts"]:
            for one in cohort["summaries"]:
                for metric in METRICS:
                    found, than = one[metric], (one["difference"] or {}).get(metric, {})
                    rows.append(
                        {"cohort": cohort["cohort"], "method": one["method"], "of": one["of"]}
                        | {"name": one["name"], "metric": metric}
                        | {name: found[name] for name in ("n", "mean", "sd", "low", "high")}
                        | {"difference": than.get("mean")}
                        | {f"difference_{name}": than.get(name) for name in ("low", "high")}
                        | {name: than.get(name) for name in ("p", "p_holm")}
                    )
        found = pd.DataFrame(rows)
        return found.astype(dict.fromkeys(set(found.columns) - _WORDS, float))

    @property
    def scores(self) -> "DataFrame":
        """The content of results.csv: a row for each network of each run."""
        import pandas as pd

        return pd.read_csv(self.path / "results.csv")

    @property
    def runs(self) -> list[Run]:
        """The finished runs, in the order of the methods."""
        found = self.results["runs"]
        return [
            Run(self.path / one["folder"]) for last in found for one in (*last["earlier"], last)
        ]


_Folder = TypeVar("_Folder", Run, Comparison)


# ---------------------------------------------------------------- what is asked for


def settled(
    function: str, values: Mapping[str, Any], base: Flags | None = None, in_python: bool = False
) -> Settings:
    """Return what flags, a configuration or a file, and a recipe say together.

    Args:
        function: ``train``, ``compare`` or ``plan``.
        values: of all flags that are given, and ``config`` and ``recipe``.
        base: what a preset sets.
        in_python: whether a function was called in Python, not a command.

    Raises:
        UsageError: a name is unknown, or values are wrong or exclude each other.
    """
    flags = dict(values)
    recipe, config, file = flags.pop("recipe", None), flags.pop("config", None), None
    _refuse_unknown(function, flags)
    given = with_homes({name: typed(name, value) for name, value in flags.items()})
    if isinstance(config, Config):
        if recipe is not None:
            raise UsageError(
                f"recipe={recipe!r} would change nothing: a Config sets every flag; drop one"
            )
        own = {name: typed(name, value) for name, value in config.as_dict().items()}
        _take_out(function, own, "Config")
        given = with_homes(own) | given
    elif config is not None:
        if not isinstance(config, (str, os.PathLike)):
            raise UsageError(
                f"config is a {type(config).__name__}; it must be a Config or the path of a file, "
                "and flags are keywords: lr=0.05"
            )
        file = read_config_file(expanded(os.fspath(config)))
        with_homes(file.flags)
        if file.description is not None:
            started, alone = own_processes() > 1, not (in_python or environment.has_launcher())
            file = with_resolved(file, given, launched_processes(), cores(), started or alone)
        _take_out(function, file.flags, str(file.path), repeats=file.description is not None)
    asked = settle(given, recipe, file, base)
    if asked.left_out and file and launched_rank() == 0:
        print(
            f"{file.path}: left out, as it is meant for another optimizer than "
            f"{asked.config.optim.optimizer}: {recipes.in_words(asked.left_out)}",
            file=sys.stderr,
            flush=True,
        )
    return asked


def _take_out(function: str, flags: dict[str, Any], where: str, repeats: bool = False) -> None:
    """Take out of flags from elsewhere what the function does not have.

    Args:
        function: its name.
        flags: from a file or a ``Config``; changed in place.
        where: they are from.
        repeats: whether they are those of a run, whose ``resume`` does not count.

    Raises:
        UsageError: they say something of it.
    """
    usual = Config().as_dict()
    for name in SET_BY_METHODS if function == "compare" else ():
        found = flags.pop(name, usual[name])
        if typed(name, found) != typed(name, usual[name]):
            raise UsageError(f"{where}: compare has no {name.replace('_', '-')}: use --methods")
    if function != "train" and flags.pop("resume", None) and not repeats:
        raise UsageError(f"{where}: {function} has no resume")


def _refuse_unknown(function: str, flags: Iterable[str]) -> None:
    lacks = {"compare": {"resume", *SET_BY_METHODS}, "plan": {"resume"}}.get(function, set())
    own = {"config", "recipe"} | (
        {"methods", "seeds", "preset"} if function == "compare" else set()
    )
    known = (flag_types().keys() | own) - lacks
    for name in flags:
        if name in known:
            continue
        meant = near(name, sorted(known))
        hint = "its keywords are the flags of the command, with underscores for dashes"
        if name == "resume":
            hint = "the same call with the same output_dir resumes by itself"
        elif name in SET_BY_METHODS and function == "compare":
            hint = "use methods"
        elif meant:
            hint = f"did you mean {' or '.join(meant)}?"
        raise UsageError(f"{function} has no {name}: {hint}")


# ---------------------------------------------------------------- train


def train(
    config: Config | PathLike | None = None, *, recipe: str | None = None, **flags: Any
) -> Run:
    """Train a cohort of networks that learn from the labels and from each other.

        run = dml_accel.train(cohort="resnet8*2", dataset="digits", epochs=8, lr=0.05)
        run.results["ensemble"]["top1"]

    It does what ``dml-accel train`` does: the same checks, the same folder, the same weights bit
    for bit. Progress is on stderr, and in a notebook a bar. Interrupted (Ctrl-C, or the button of
    a notebook), it writes a checkpoint and raises ``StoppedError``; a second interrupt raises
    ``KeyboardInterrupt`` at once. In a thread that is not the main one it cannot be interrupted.

    Started by ``accelerate launch``, all processes call it. Each gets the run of the same folder,
    once its records are written; a host that does not have the folder cannot read them.

    Args:
        config: a ``Config``, or the path of a file as for ``--config``; keywords override it.
        recipe: as for ``--recipe``.
        flags: those of ``dml-accel train --help``, with underscores for dashes.

    Raises:
        UsageError: the input does not allow the run; nothing has been written.
        StoppedError: the run was stopped; the text says how to resume it.
        RunError: it has ended without results: its subclasses ``DivergedError`` and others say why.
    """
    values = _values(config, recipe, flags)
    caller = Caller(call_text("train", _told(values)), in_python=True)
    from dml_accel.api.process import borrowed

    with borrowed("train"):
        return start_training(values, caller)[0]


def start_training(values: Mapping[str, Any], caller: Caller) -> tuple[Run, dict[str, Any] | None]:
    """Train as a command or call asks; return the run, and its results where they are made.

    Args:
        values: see ``settled``.
        caller: who asks.
    """
    asked = settled("train", values, in_python=caller.in_python)
    # A caller in Python has objects of its own, as has whoever imported torch before.
    is_ours = not (caller.in_python or "torch" in sys.modules)
    with importing_for_good() if is_ours else contextlib.nullcontext():
        from dml_accel.training import train as training

    path, results = training.train(asked.config, caller, asked)
    return _at(Run, path), results


def _at(kind: type[_Folder], path: Path) -> _Folder:
    """Return what is in a folder, which this host need not have."""
    found = object.__new__(kind)
    object.__setattr__(found, "path", path)
    return found


def _values(config: Any, recipe: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call is given, without what it is not."""
    own = {"config": config, "recipe": recipe}
    return {name: value for name, value in own.items() if value is not None} | dict(flags)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call for the record: of a Config what it changes."""
    told = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in values.items()}
    if isinstance(config := told.get("config"), Config):
        usual, own = Config().as_dict(), config.as_dict()
        del told["config"]
        told = {name: value for name, value in own.items() if value != usual[name]} | told
    return told


# ---------------------------------------------------------------- compare


def compare(
    config: Config | PathLike | None = None,
    *,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    seeds: int = 5,
    preset: str | None = None,
    recipe: str | None = None,
    **flags: Any,
) -> Comparison:
    """Train every method with the same seeds, initial weights, data order and augmentation.

        found = dml_accel.compare(cohort="resnet8*2", dataset="digits", seeds=2, epochs=8, lr=0.05)
        found.table.query("of == 'cohort' and metric == 'top1'")

    It does what ``dml-accel compare`` does. The same call with the same ``output_dir`` resumes an
    interrupted comparison. A run that diverges does not end it: see ``Comparison.failed``.

    Args:
        config: as for ``train``.
        methods: as for ``--methods``; a single one may stand alone.
        seeds: how many, counted from ``seed``.
        preset: as for ``--preset``.
        recipe: as for ``--recipe``.
        flags: those of ``dml-accel compare --help``, with underscores for dashes.

    Raises:
        UsageError: the input does not allow one of the runs, or the folder holds others.
        StoppedError: it was stopped; the text says how to resume it.
        RunError: it could not go on.
    """
    values = _values(config, recipe, flags)
    chosen = (methods,) if isinstance(methods, str) else tuple(methods)
    own = {"methods": list(chosen), "seeds": seeds}
    own |= {"preset": preset} if preset is not None else {}
    caller = Caller(call_text("compare", _told(values | own)), in_python=True)
    from dml_accel.api.process import borrowed

    with borrowed("compare"):
        found, record = start_comparison(values, chosen, seeds, preset, caller)
    for name, reason in (record or {}).get("failed", {}).items():
        print(f"warning: {name} failed: {reason}", file=sys.stderr)
    return found


def start_comparison(
    values: Mapping[str, Any],
    methods: Sequence[str],
    seeds: int,
    preset: str | None,
    caller: Caller,
) -> tuple[Comparison, dict[str, Any] | None]:
    """Compare as a command or call asks; return the comparison, and its results where it is made.

    Args:
        values: see ``settled``.
        methods: names of methods.
        seeds: how many.
        preset: the name of one, if there is one.
        caller: who asks.

    Raises:
        UsageError: see ``compare``.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset is {preset}; it must be one of {', '.join(PRESETS)}")
    if preset is not None and isinstance(values.get("config"), Config):
        raise UsageError(f"preset={preset!r} would change nothing: a Config sets every flag")
    refuse_unknown(methods)  # here, before torch is imported
    if not isinstance(seeds, int) or isinstance(seeds, bool):
        raise UsageError(f"seeds is {seeds!r}; it must be a whole number")
    named = PRESETS.get(preset or "")
    base = named.changes if named else None
    asked = settled("compare", values, base, caller.in_python)
    several = named if named and "cohort" not in asked.chosen else None
    if any(
        "peer_opt" in recipes.flags_of(asked.recipe, asked.chosen | {"cohort": cohort})
        for cohort in (several.cohorts if several and asked.recipe else ())
    ):
        raise UsageError(
            f"--recipe {asked.recipe} sets --peer-opt by the names of a cohort, and the preset has "
            "cohorts of its own: name one with --cohort"
        )
    require(seeds >= 1, "seeds", seeds, "at least 1")  # also here, before torch is imported
    require_packages("compare", *_ANALYSIS)
    cohorts = several.cohorts if several else (asked.config.cohort,)
    from dml_accel.analysis import compare as comparing

    path, record = comparing.compare(asked.config, cohorts, methods, seeds, caller, asked.recipe)
    return _at(Comparison, path), record
