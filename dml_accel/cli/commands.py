"""The command line: what each command does, one line per error, exit codes.

0 done; 2 wrong usage or input; 75 stopped on request with a checkpoint; anything else failed.
"""

import dataclasses
import os
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path

from dml_accel.analysis import runs as history
from dml_accel.analysis.compare import compare
from dml_accel.analysis.page import write_page
from dml_accel.analysis.subruns import PRESETS
from dml_accel.analysis.tables import comparison_table, comparison_title
from dml_accel.cli.parser import parse
from dml_accel.cli.using import run as use
from dml_accel.core.config import Config, UsageError
from dml_accel.core.tables import results_table
from dml_accel.core.versions import command_line
from dml_accel.distributed.launch import (
    StoppedError,
    launched_processes,
    launched_rank,
    share_cores,
)
from dml_accel.distributed.plan import this_machine
from dml_accel.distributed.processes import MemoryShortError, ProcessLostError
from dml_accel.training.agenda import DivergedError
from dml_accel.training.keeping import NotKeptError
from dml_accel.training.setup import plan
from dml_accel.training.train import train

_SECONDS_FOR_RANK_0 = 20.0
_STOPPED = 75  # what schedulers know as "try again": sysexits.h's EX_TEMPFAIL


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; return the process's exit code.

    Args:
        arguments: the words after the program's name (default: this process's).
    """
    try:
        values = parse(sys.argv[1:] if arguments is None else arguments)
        todo = {"train": _train, "compare": _compare, "plan": _plan, "report": _report}
        command = values.pop("subcommand")
        return todo[command](values) if command in todo else use(command, values)
    except StoppedError as error:
        if launched_rank() == 0:
            print(error, file=sys.stderr, flush=True)
        return _leave(_STOPPED)
    except BrokenPipeError:  # who reads has seen enough; nothing is left to flush at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except (DivergedError, MemoryShortError, NotKeptError, ProcessLostError, OSError) as error:
        if getattr(error, "speaks", launched_rank() == 0 or isinstance(error, OSError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, DivergedError) and launched_rank():
            time.sleep(_SECONDS_FOR_RANK_0)  # all processes meet it; the first one says why
        return _leave(1)
    except UsageError as error:
        _say_for_all(str(error))
        return 2
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return _leave(130)


def _leave(code: int) -> int:
    """End this process where the others may be gone: leaving their group in order would wait."""
    if launched_processes() > 1:
        sys.stdout.flush()
        os._exit(code)
    return code


def _train(values: dict[str, typing.Any]) -> int:
    finished = train(Config.from_dict(values), command_line())
    if finished is not None:
        folder, results = finished
        print(results_table(results))
        print(f"\nrun folder: {folder}\npeers:      {folder}/peers/<name>/model.safetensors")
    return 0


def _compare(values: dict[str, typing.Any]) -> int:
    methods, seeds = values.pop("methods"), values.pop("seeds")
    preset = PRESETS.get(values.pop("preset") or "")
    config = Config.from_dict((preset.changes if preset else {}) | values)
    cohorts = preset.cohorts if preset and "cohort" not in values else (config.cohort,)
    finished = compare(config, cohorts, methods, seeds, command_line())
    if finished is not None:
        folder, record = finished
        print(f"{comparison_title(record)}\n\n{comparison_table(record)}")
        print(f"\ntables and plot: {folder}/results.md\nruns:            {folder}/*/seed-<n>/")
        for name, reason in record["failed"].items():
            print(f"error: {name} failed: {reason}", file=sys.stderr)
        return 1 if record["failed"] else 0
    return 0


def _plan(values: dict[str, typing.Any]) -> int:
    names = ("world", "classes", "bandwidth", "latency")
    world, classes, bandwidth, latency = (values.pop(name) for name in names)
    config = Config.from_dict(values)
    for name, value in (("world", world), ("classes", classes)):
        if value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1")
    for name, value in (("bandwidth", bandwidth), ("latency", latency)):
        if value is not None and not value > 0:
            raise UsageError(f"--{name} is {value}; it must be above 0")
    if world > config.batch_size // config.grad_accum:
        raise UsageError(
            f"--world {world} is more than the {config.batch_size // config.grad_accum} images of "
            "a part of the batch (--batch-size, --grad-accum)"
        )
    share_cores(config)  # what is assumed of a process is by its threads
    machine = this_machine()
    machine = dataclasses.replace(
        machine,
        bandwidth=machine.bandwidth if bandwidth is None else 1e9 * bandwidth,
        latency=machine.latency if latency is None else 1e-6 * latency,
    )
    print(plan(config, world, classes, machine))
    return 0


def _report(values: dict[str, typing.Any]) -> int:
    if values["analyse"] < 0:
        raise UsageError(f"--analyse is {values['analyse']}; it must be 0 or more")
    folders = [Path(folder).expanduser() for folder in values["folders"]]
    runs = history.find(folders)
    path = Path(values["to"] or folders[0] / "report.html")
    if not path.parent.is_dir():
        raise UsageError(f"--to {path}: there is no folder {path.parent}")
    write_page(runs, path, values["analyse"])
    print(f"report of {len(runs)} run{'s' * (len(runs) > 1)}: {path}")
    return 0


def _say_for_all(message: str) -> None:
    """Say an error once, though every process meets it: the first rank speaks.

    The others wait; the launcher ends them when the first has left. One that is still here then
    has met an error of its own.
    """
    rank = launched_rank()
    if rank:
        time.sleep(_SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
