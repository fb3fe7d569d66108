"""The words of the command line: flags from the configuration's fields, help that teaches."""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import NoReturn

from dml_accel.analysis.methods import DEFAULT_METHODS, METHODS, SET_BY_METHODS
from dml_accel.analysis.subruns import PRESETS
from dml_accel.cli.using import Add, add_commands
from dml_accel.core.config import Config, UsageError

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


def parse(arguments: Sequence[str]) -> dict[str, typing.Any]:
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
        if not unknown[0].startswith("-"):
            raise UsageError(
                f"{parsed.subcommand} does not know what {unknown[0]} is for: --help shows what it "
                "takes, and what is quoted"
            )
        flags = list(commands[parsed.subcommand]._option_string_actions)
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UsageError(f"unknown argument {unknown[0]}: {hint}")
    return vars(parsed)


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

    found = {
        "train": _add_train(add),
        "compare": _add_compare(add),
        "plan": _add_plan(add),
        "report": _add_report(add),
    }
    return parser, found | add_commands(add)


def _add_train(add: Add) -> argparse.ArgumentParser:
    training = add(
        "train",
        "train a cohort and write one folder per run",
        "Train a cohort of networks that learn from the labels and from each other.",
        _EXAMPLES,
    )
    _add_flags(training)
    return training


def _add_compare(add: Add) -> argparse.ArgumentParser:
    text = "methods over seeds: a table with intervals"
    comparing = add("compare", text, _COMPARE, _COMPARE_EXAMPLES)
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
    return comparing


def _add_plan(add: Add) -> argparse.ArgumentParser:
    planning = add(
        "plan", "predict what a placement costs, without training", _PLAN, _PLAN_EXAMPLES
    )
    for name, default, text in (
        ("world", 2, "processes (default: 2)"),
        ("classes", 100, "of the images (default: 100)"),
    ):
        planning.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    for name, text in (
        ("bandwidth", "gigabytes per second out of one process (default: 1; with GPUs 10)"),
        ("latency", "microseconds of one message (default: 1000; with GPUs 20)"),
    ):
        planning.add_argument(f"--{name}", type=float, metavar="X", help=text)
    _add_flags(planning, without=("resume",))
    return planning


def _add_report(add: Add) -> argparse.ArgumentParser:
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
    return reporting


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
