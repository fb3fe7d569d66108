"""The command line: flags from the configuration's fields, one line per error, exit codes.

0 done; 2 wrong usage or input; 75 stopped on request with a checkpoint; anything else failed.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dml_accel import history
from dml_accel.checking import plan
from dml_accel.compare import DEFAULT_METHODS, METHODS, PRESETS, SET_BY_METHODS, compare
from dml_accel.comparison_report import comparison_table, comparison_title
from dml_accel.config import Config, UsageError
from dml_accel.engine import DivergedError
from dml_accel.launching import StoppedError, launched_processes, launched_rank
from dml_accel.page import write_page
from dml_accel.planning import this_machine
from dml_accel.processes import MemoryShortError, ProcessLostError
from dml_accel.provenance import command_line
from dml_accel.report import results_table
from dml_accel.resuming import NotKeptError
from dml_accel.training import train
from dml_accel.using import add_commands
from dml_accel.using import run as use

_SECONDS_FOR_RANK_0 = 20.0
_STOPPED = 75  # what schedulers know as "try again": sysexits.h's EX_TEMPFAIL

_EXAMPLES = """examples:
  %(prog)s --cohort 'resnet8*2' --dataset digits --epochs 8 --batch-size 16 --lr 0.05
  %(prog)s --cohort 'resnet32*2' wrn_28_10 'timm:efficientnet_b0'
  %(prog)s --cohort 4 --dataset path/to/folder --image-size 32 --output-dir runs/four
  %(prog)s --cohort 4 --kl-weight 0        # the same networks, each alone
  %(prog)s --cohort 4 --output-dir runs/four --resume auto     # start, or go on where it stopped
"""

_COMPARE = """Train every method on the same seeds, initial weights, data order and augmentation;
write results.csv, results.json, results.md and a plot: means over seeds with 95% intervals, and
the paired difference to independent training with its interval and p-value. The same command with
the same --output-dir goes on where it was interrupted."""

_COMPARE_EXAMPLES = """examples:
  %(prog)s --cohort 'resnet32*2' --seeds 5 --output-dir runs/pair
  %(prog)s --methods independent mutual sequential mean-logit --cohort 'resnet32*2'
  %(prog)s --methods independent distill --frozen-peers runs/wrn --cohort 'resnet32*2'
  %(prog)s --methods independent mutual semi --labelled-fraction 0.2 --cohort 'resnet32*2'
  %(prog)s --preset laptop --output-dir runs/laptop
  %(prog)s --preset paper-table2 --seeds 1 --max-steps 3 --dataset path/to/folder   # a look
"""

_PLAN = """Print, for every peer in every process and for each peer in processes of its own: who
trains what, the predicted time of a step, the share of it that each process waits, the bytes that
it sends and the memory that it needs. Nothing is trained; --measure times the networks here."""

_PLAN_EXAMPLES = """examples:
  %(prog)s --cohort 'resnet32*2' wrn_28_10 --world 8
  %(prog)s --cohort mobilenet resnet32 --world 2 --measure --bandwidth 0.125 --latency 200
"""


_REPORT = """Make one page about any finished runs: the paper's table beside ours, differences with
intervals, training curves with bands over seeds, agreement and KL between peers, calibration,
accuracy under weight noise, cost. It stands alone: nothing in it is loaded from elsewhere. Runs
that differ in method and seed alone are compared."""

_REPORT_EXAMPLES = """examples:
  %(prog)s runs/pair
  %(prog)s runs/pair runs/four --to both.html --analyse 2000
"""


# Flags of another command, and what to write instead.
_ELSEWHERE = {
    ("compare", "--resume"): "the same command with the same --output-dir goes on by itself",
    **dict.fromkeys((("compare", f"--{name}") for name in ("update", "target")), "use --methods"),
    ("compare", "--kl-images"): "with --labelled-fraction, the method semi has KL on all images",
}


class _Parser(argparse.ArgumentParser):
    """Argparse that knows no abbreviations, names the nearest flag and says it in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(" ".join(message.split()))


def _parse(arguments: Sequence[str]) -> dict[str, typing.Any]:
    """Parse everything.

    Raises:
        UsageError: an argument is unknown; the nearest known flag is named.
    """
    parser, commands = _parser()
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        elsewhere = _ELSEWHERE.get((parsed.subcommand, unknown[0].split("=")[0]))
        if elsewhere:
            raise UsageError(f"{parsed.subcommand} has no {unknown[0]}: {elsewhere}")
        flags = list(commands[parsed.subcommand]._option_string_actions)
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UsageError(f"unknown argument {unknown[0]}: {hint}")
    return vars(parsed)


def _add_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add one flag per field of ``Config``: its type, default and help come from the field."""
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name in without:
            continue
        options = dict(field.metadata["argparse"])
        kind = _plain_type(hints[field.name])
        text = field.metadata["help"]
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = kind
            if "metavar" not in options and "choices" not in options:
                options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
            if field.default not in (None, ()):
                default = field.default
                shown = " ".join(default) if isinstance(default, tuple) else default
                text += f" (default: {shown})"
        flag = "--" + field.name.replace("_", "-")
        # What is not given is left out, so that a preset knows what is.
        parser.add_argument(
            flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options
        )


def _plain_type(hint: typing.Any) -> type:
    """Return the type that one word of the command line is read as: int for ``int | None``."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="dml-accel",
        description="Deep Mutual Learning: networks that teach each other.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    def add(name: str, text: str, description: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    training = add(
        "train",
        "train a cohort and write one folder per run",
        "Train a cohort of networks that learn from the labels and from each other.",
        _EXAMPLES,
    )
    _add_flags(training)
    comparing = add(
        "compare",
        "methods over seeds: a table with intervals",
        _COMPARE,
        _COMPARE_EXAMPLES,
    )
    comparing.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        default=DEFAULT_METHODS,
        help="what to compare: networks alone; mutual learning; the paper's Algorithm 1; the "
        "authors' code; the mean posterior (the paper's DML_e) or the posterior of the mean "
        "logits as the target; pupils of --frozen-peers; with --labelled-fraction, KL on the "
        f"unlabelled images too (default: {' '.join(DEFAULT_METHODS)})",
    )
    comparing.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="how many seeds, from --seed on (default: 5)",
    )
    presets = "; ".join(f"{name}: {preset.text}" for name, preset in PRESETS.items())
    comparing.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"cohorts and configuration by name; flags that are given win. {presets}",
    )
    _add_flags(comparing, without=("resume", *SET_BY_METHODS))
    planning = add(
        "plan", "predict what a placement costs, without training", _PLAN, _PLAN_EXAMPLES
    )
    planning.add_argument(
        "--world", type=int, default=2, metavar="N", help="processes (default: 2)"
    )
    planning.add_argument(
        "--classes", type=int, default=100, metavar="N", help="of the images (default: 100)"
    )
    planning.add_argument(
        "--bandwidth",
        type=float,
        metavar="X",
        help="gigabytes per second out of one process (default: 1; with GPUs 10)",
    )
    planning.add_argument(
        "--latency",
        type=float,
        metavar="X",
        help="microseconds of one message (default: 1000; with GPUs 20)",
    )
    _add_flags(planning, without=("resume",))
    reporting = add("report", "make a page about finished runs", _REPORT, _REPORT_EXAMPLES)
    reporting.add_argument("folders", nargs="+", metavar="DIR", help="of runs, or above them")
    reporting.add_argument(
        "--to", metavar="FILE", help="the page (default: report.html in the first DIR)"
    )
    reporting.add_argument(
        "--analyse",
        type=int,
        default=1000,
        metavar="N",
        help="weight noise, entropy and calibration on N images of each split, kept in "
        "analysis.json of each run; 0 leaves them out (default: 1000)",
    )
    commands_ = {"train": training, "compare": comparing, "plan": planning, "report": reporting}
    return parser, commands_ | add_commands(add)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; return the process's exit code.

    Args:
        arguments: the words after the program's name (default: this process's).
    """
    try:
        values = _parse(sys.argv[1:] if arguments is None else arguments)
        todo = {"train": _train, "compare": _compare, "plan": _plan, "report": _report}
        command = values.pop("subcommand")
        return todo[command](values) if command in todo else use(command, values)
    except StoppedError as error:
        if launched_rank() == 0:
            print(error, file=sys.stderr, flush=True)
        return _leave(_STOPPED)
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
