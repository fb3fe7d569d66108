"""The commands: from parsed flags to what is printed and to the exit code.

Each command imports what it needs when it runs: torch takes seconds, and usage errors need none.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dml_accel.api.runs import settled, start_comparison, start_training
from dml_accel.cli.parser import parse
from dml_accel.core import recipes, streams
from dml_accel.core.config import Config
from dml_accel.core.errors import DivergedError, RunError, StoppedError, UsageError
from dml_accel.core.flags import refuse, require
from dml_accel.core.host import (
    forget_empty_variables,
    ignoring_hangup,
    is_on_hub,
    name_user,
    wait_briefly,
)
from dml_accel.core.settings import with_homes
from dml_accel.core.streams import choose_encodings, drain, only_displayed
from dml_accel.core.versions import Caller, command_line, require_packages
from dml_accel.distributed import environment
from dml_accel.distributed.launch import launched_processes, launched_rank

# How long a process waits for rank 0 to print an error that all of them have.
_SECONDS_FOR_RANK_0 = 20.0
_INTERRUPTED = 130  # as shells report SIGINT
_MOST_PLANNED = 65_536  # processes; a plan of so many takes ten seconds
# Their results are what they print; those of the other commands are in files.
_PRINT_RESULTS = ("cache", "check-data", "evaluate", "plan", "predict")
_TRAIN = ("train", "compare")
# What tables and figures over seeds need.
_ANALYSIS = ("scipy", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code.

    Args:
        arguments: the words after the program's name (default: this process's).
    """
    forget_empty_variables()
    name_user()
    wait_briefly()  # before anything imports torch
    choose_encodings()
    with only_displayed("stderr"):
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        values = _parsed(arguments)
        command = values.pop("subcommand")
        if values.get("recipe") == recipes.LIST:
            if launched_rank() == 0:
                print(recipes.listed(values))
            return 0
        environment.check()
        if command in _PRINT_RESULTS and "stdout" in streams.missing:
            raise UsageError(f"the standard output is closed, where {command} prints its results")
        with contextlib.ExitStack() as contexts:
            if command not in _PRINT_RESULTS:
                contexts.enter_context(only_displayed("stdout"))
            # A launcher ends with its terminal, and asks its processes to stop.
            if command in _TRAIN and launched_processes() == 1:
                contexts.enter_context(ignoring_hangup())
            if command in _TRAIN:
                values["caller"] = Caller(command_line(), arguments=tuple(arguments))
            code = _COMMANDS[command](values)
        sys.stdout.flush()
        return code
    except UsageError as error:
        _print_for_all(str(error))
        return error.exit_code
    except RunError as error:
        prints = launched_rank() == 0 if error.prints is None else error.prints
        if prints:
            prefix = "" if isinstance(error, StoppedError) else "error: "
            print(f"{prefix}{error}", file=sys.stderr, flush=True)
        if isinstance(error, DivergedError) and launched_rank():
            time.sleep(_SECONDS_FOR_RANK_0)  # all processes have this error; rank 0 prints it
        return _leave(error.exit_code)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whoever reads our output has stopped
            print(f"error: {error}", file=sys.stderr, flush=True)
        return _leave(1)
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return _leave(_INTERRUPTED)
    finally:
        drain(sys.stdout)


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of all flags that are given."""
    return with_homes(parse(arguments))


def _leave(code: int) -> int:
    """End this process if others may be gone: an orderly exit would wait for them."""
    if launched_processes() > 1:
        drain(sys.stdout)
        os._exit(code)
    return code


def _print_for_all(message: str) -> None:
    """Print an error that every process has: once, by rank 0.

    The others wait, and the launcher ends them once rank 0 has left. A process that is still alive
    after that has an error of its own.
    """
    rank = launched_rank()
    if rank:
        time.sleep(_SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the commands


def _train(values: dict[str, Any]) -> int:
    from dml_accel.core.tables import results_table

    caller = values.pop("caller")
    run, results = start_training(values, caller)
    if results is not None:
        images, split = results["ensemble"]["n"], results["splits"]["test"]
        print(f"on the {images:,} images of the split {split}:\n")
        print(results_table(results))
        print(f"\nrun folder: {run.path}\npeers:      {run.path}/peers/<name>/model.safetensors")
    return 0


def _compare(values: dict[str, Any]) -> int:
    names = ("methods", "seeds", "preset", "caller")
    methods, seeds, preset, caller = (values.pop(name) for name in names)
    found, record = start_comparison(values, methods, seeds, preset, caller)
    if record is None:
        return 0
    from dml_accel.analysis.tables import comparison_table, comparison_title

    print(f"{comparison_title(record)}\n\n{comparison_table(record)}")
    print(f"\ntables and plot: {found.path}/results.md\nruns:            {found.path}/*/seed-<n>/")
    for name, reason in record["failed"].items():
        print(f"error: {name} failed: {reason}", file=sys.stderr)
    return 1 if record["failed"] else 0


def _plan(values: dict[str, Any]) -> int:
    names = ("world", "classes", "gpus", "bandwidth", "latency", "step_ms", "plot")
    worlds, classes, assumes_gpus, bandwidth, latency, step_ms, plot = map(values.pop, names)
    config = settled("plan", values).config
    worlds = list(dict.fromkeys(worlds))
    allowed = f"at least 1 and at most {_MOST_PLANNED:,}"
    for world in worlds:
        require(1 <= world <= _MOST_PLANNED, "world", world, allowed)
    require(classes is None or classes >= 1, "classes", classes, "at least 1")
    for name, value in (("bandwidth", bandwidth), ("latency", latency), ("step_ms", step_ms)):
        require(value is None or 0 < value < math.inf, name, value, "above 0, and finite")
    _refuse_to_plan(config, worlds, assumes_gpus, step_ms)
    drawn = None if plot is None else _figure_file(plot)
    import dataclasses

    from dml_accel.distributed.device import choose_device
    from dml_accel.distributed.launch import share_cores
    from dml_accel.distributed.plan import cpus, gpus
    from dml_accel.training.planning import Question, plan

    share_cores(config.compute)  # the assumed speed of a process follows from its threads
    on_gpus = assumes_gpus or choose_device(config.compute.cpu).type == "cuda"
    machine = gpus() if on_gpus else cpus()
    machine = dataclasses.replace(
        machine,
        bandwidth=machine.bandwidth if bandwidth is None else 1e9 * bandwidth,
        latency=machine.latency if latency is None else 1e-6 * latency,
    )
    seconds = None if step_ms is None else 1e-3 * step_ms
    text, scales = plan(config, Question(worlds, classes, seconds, machine))
    print(text)
    if drawn is not None:
        from dml_accel.analysis.plots import save, scaling

        points = [
            (one.world_size, 1e3 * one.chosen.step_seconds, 100 * one.efficiency)
            for one in scales
            if one.chosen is not None
        ]
        save(scaling(points), drawn)
        print(f"\nplot: {drawn}")
    return 0


def _refuse_to_plan(
    config: Config, worlds: Sequence[int], assumes_gpus: bool, step_ms: float | None
) -> None:
    """Refuse flags of ``plan`` that exclude each other."""
    measures = config.compute.measure
    if measures and step_ms is not None:
        raise UsageError(
            f"--measure times the networks here, and --step-ms {step_ms:g} is of elsewhere: drop "
            "one"
        )
    refuse(
        assumes_gpus and (measures or config.compute.cpu),
        f"--gpus assumes rates, and {'--measure' if measures else '--cpu'} is about this machine: "
        "drop one",
    )
    least = config.optim.smallest_micro_batch
    refuse(
        min(worlds) > least,
        f"--world {min(worlds)} is more than the {least} images of a micro-batch (--batch-size, "
        f"--grad-accum): --batch-size {min(worlds) * config.optim.grad_accum} would do",
    )


def _figure_file(name: str) -> Path:
    """Return the file of ``--plot``, which can be written as far as is known."""
    path = Path(name)
    require(path.suffix in (".png", ".svg"), "plot", name, "a .png or .svg file")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    require_packages("--plot", "matplotlib")
    return path


def _report(values: dict[str, Any]) -> int:
    require(values["analyse"] >= 0, "analyse", values["analyse"], "at least 0")
    folders = [Path(folder) for folder in values["folders"]]
    path = Path(values["to"] or folders[0] / "report.html")
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; name a folder of runs")
    if not path.parent.is_dir():
        raise UsageError(f"--to {path}: there is no folder {path.parent}")
    require_packages("report", *_ANALYSIS)
    from dml_accel.analysis.page import write_page
    from dml_accel.analysis.runs import find_runs

    runs = find_runs(folders)
    write_page(runs, path, values["analyse"])
    print(f"report of {len(runs)} run{'s' * (len(runs) > 1)}: {path}")
    return 0


def _check_data(values: dict[str, Any]) -> int:
    if launched_processes() > 1:
        raise UsageError("check-data runs in a single process; start it without a launcher")
    from dml_accel.cli import check_data

    return check_data.run(values)


def _cache(values: dict[str, Any]) -> int:
    from dml_accel.cli import cache

    return cache.run(values)


def _use(command: str) -> Callable[[dict[str, Any]], int]:
    """Return the command that uses trained networks."""

    def run(values: dict[str, Any]) -> int:
        if launched_processes() > 1:
            raise UsageError(f"{command} runs in a single process; start it without a launcher")
        source = values["source"]
        if not is_on_hub(source) and not Path(source).is_dir():
            raise UsageError(f"{source} is not a folder; name a run, or peers/<name> of one")
        from dml_accel.cli import inference

        return inference.run(command, values)

    return run


_COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "train": _train,
    "compare": _compare,
    "plan": _plan,
    "report": _report,
    "check-data": _check_data,
    "cache": _cache,
    "evaluate": _use("evaluate"),
    "predict": _use("predict"),
    "export": _use("export"),
}
