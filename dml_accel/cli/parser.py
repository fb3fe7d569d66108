"""The flags of every command, from the fields of ``Config`` and its sections.

Nothing here imports torch, timm or datasets: ``--help`` and usage errors are printed at once.
"""

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from dml_accel.analysis.methods import ALL, DEFAULT_METHODS, METHODS, PRESETS, SET_BY_METHODS
from dml_accel.cli.inference_flags import add_evaluation, add_export, add_prediction
from dml_accel.core.config import flag_groups, flag_types, near
from dml_accel.core.errors import UsageError
from dml_accel.core.flags import help_of, own_hint
from dml_accel.core.recipes import LIST, RECIPES

# Flags of other commands, and what to use instead.
_ELSEWHERE = {
    ("compare", "--resume"): "the same command with the same --output-dir resumes by itself",
    **{("compare", f"--{name.replace('_', '-')}"): "use --methods" for name in SET_BY_METHODS},
    ("compare", "--exchange-every"): "the method codistillation has 50; register one with another",
    ("plan", "--processes"): "use --world",
    ("compare", "--kl-images"): "with --labelled-fraction, the method semi has KL on all images",
}


# What says where images are, of the flags of ``train``.
_CHECKED = {"dataset", "dataset_config", "image_column", "label_column"}
_CHECKED |= {"train_split", "val_split", "test_split", "test_fraction"}

# What changes what ``plan`` prints, or is needed to list the images of a folder.
PLANNED = {"cohort", *_CHECKED, "image_size", "augment", "mixup", "cutmix"}
PLANNED |= {"batch_size", "grad_accum", "optimizer", "opt_args", "momentum", "peer_opt", "ema"}
PLANNED |= {"kl_weight", "divergence", "divergence_args", "update", "target", "teach_with"}
PLANNED |= {"exchange_every", "mixed_precision", "float64", "batch_norm", "exchange_dtype"}
PLANNED |= {"cpu", "threads", "memory_format", "low_memory", "feed", "workers", "placement"}
PLANNED |= {"measure", "exchange", "keep"}


class _Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(" ".join(message.split()))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += own_hint(action.dest)
            raise


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of all flags that are given, and the ``subcommand``.

    Without any argument this prints the help and ends the process, as ``--help`` does.

    Raises:
        UsageError: an argument is unknown; the text names the nearest flag.
    """
    parser, commands = _parser()
    if not arguments:
        parser.print_help()
        parser.exit()
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        command, name = parsed.subcommand, unknown[0].split("=")[0]
        elsewhere = _ELSEWHERE.get((command, name))
        if elsewhere:
            raise UsageError(f"{command} has no {unknown[0]}: {elsewhere}")
        if not name.startswith("-"):
            raise UsageError(
                f"{command}: unexpected argument {unknown[0]}; see --help, and what must be quoted"
            )
        if command == "plan" and _flag_name(name) in flag_types():
            raise UsageError(f"plan has no {name}: it does not count what that changes; drop it")
        flags = commands[command]._option_string_actions
        positive = f"--{name.removeprefix('--no-')}"
        if name != positive and positive in flags:
            raise UsageError(f"unknown argument {name}: {positive} is never off, give it a value")
        meant = near(name, flags)
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"see {command} --help"
        raise UsageError(f"unknown argument {unknown[0]}: {hint}")
    if "--no-peer-opt" in arguments and vars(parsed).get("peer_opt"):
        raise UsageError("--no-peer-opt and --peer-opt exclude each other: drop one")
    return vars(parsed)


def _flag_name(word: str) -> str:
    return word.removeprefix("--").removeprefix("no-").replace("-", "_")


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="dml-accel",
        description="Deep Mutual Learning: networks that teach each other.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, (text, add_flags) in _COMMANDS.items():
        description, _, examples = (inspect.getdoc(add_flags) or "").partition("\nexamples:")
        commands[name] = subparsers.add_parser(
            name,
            help=text,
            description=description,
            epilog=f"examples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_flags(commands[name])
    return parser, commands


# ---------------------------------------------------------------- training
# The docstrings of the functions from here on are the help of the commands.


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Train a cohort of networks that learn from the labels and from each other.

    examples:
      %(prog)s --cohort 'resnet8*2' --dataset digits --epochs 8 --batch-size 16 --lr .05 --lr-step 5
      %(prog)s --cohort 'resnet32*2' wrn_28_10 'timm:efficientnet_b0'
      %(prog)s --cohort 4 --dataset path/to/folder --image-size 32 --output-dir runs/four
      %(prog)s --cohort 4 --kl-weight 0        # the same networks, trained independently
      %(prog)s --cohort 4 --output-dir runs/four --resume auto     # start, or resume
      %(prog)s --recipe list                   # how the literature trains, and what that sets
      %(prog)s --recipe crd --cohort mobilenet resnet32 --epochs 120 --lr-milestones 75 90 105
      %(prog)s --config runs/four/config.json  # the same run again, bit for bit
      %(prog)s --config mine.yaml --seed 1     # flags in a file; those given here override it
    """
    _add_settings(parser)
    _add_flags(parser)


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """Train every method with the same seeds, initial weights, data order and augmentation. Write
    results.csv, results.json, results.md and a plot: means over seeds with 95% intervals, and
    the paired difference to independent training with its interval and p-value. The same command
    with the same --output-dir resumes an interrupted comparison. A method is a set of flags; those
    that are given, such as --temperature, hold for the methods that do not set them.

    examples:
      %(prog)s --cohort 'resnet32*2' --seeds 5 --output-dir runs/pair
      %(prog)s --methods independent mutual jeffreys dkd kdcl-naive --cohort 'resnet32*4'
      %(prog)s --methods all --cohort 'resnet32*3' --seeds 3
      %(prog)s --methods independent distill --frozen-peers runs/wrn --cohort 'resnet32*2'
      %(prog)s --methods independent mutual semi --labelled-fraction 0.2 --cohort 'resnet32*2'
      %(prog)s --preset laptop --output-dir runs/laptop
      %(prog)s --preset paper-table2 --seeds 1 --max-steps 3 --dataset path/to/folder
      %(prog)s --recipe modern --epochs 30 --cohort 'resnet20*2' --seeds 3
    """
    widest = max(map(len, METHODS))
    listed = "\n".join(f"  {name:<{widest}}  {one.text}" for name, one in METHODS.items())
    group = parser.add_argument_group("methods", f"What --methods takes:\n{listed}")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=(ALL, *METHODS),
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"what to compare, in this order, or {ALL}: every one that the cohort, the flags and "
        f"the images allow (default: {' '.join(DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="number of seeds, counted from --seed (default: 5)",
    )
    presets = "; ".join(f"{name}: {preset.text}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"named cohorts and configuration; a recipe, a file and flags override it. {presets}",
    )
    _add_settings(parser)
    _add_flags(parser, without=("resume", *SET_BY_METHODS))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Print what both placements cost, every peer in every process and each peer in processes of
    its own: who trains what, the predicted time of a step, the share of it that each process
    waits, the bytes that it sends and receives and the memory that it needs. Several numbers after
    --world are compared in one table, a row each. Nothing is trained; --measure times the networks
    on this machine, --step-ms takes a time that was measured elsewhere. Of the flags of train it
    has those that change what is predicted; others in a recipe or a file are left out.

    examples:
      %(prog)s --cohort 'resnet32*2' wrn_28_10 --world 8
      %(prog)s --cohort mobilenet resnet32 --world 2 --measure --bandwidth 0.125 --latency 200
      %(prog)s --cohort 'resnet32*4' --batch-size 8192 --world 8 64 512 4096 --gpus --step-ms 900
    """
    parser.add_argument(
        "--world",
        type=int,
        nargs="+",
        default=[2],
        metavar="N",
        help="processes; several numbers are compared in one table (default: 2)",
    )
    parser.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="classes of the images (default: those of --dataset, if it is a local folder or one "
        "whose classes are known without the hub)",
    )
    parser.add_argument(
        "--gpus",
        action="store_true",
        help="assume the rates of GPUs with NCCL, also on a machine without one",
    )
    for name, text in (
        ("bandwidth", "gigabytes per second out of one process (default: 1; with GPUs 10)"),
        ("latency", "microseconds per message (default: 1000; with GPUs 20)"),
        (
            "step-ms",
            "milliseconds of an optimizer step of the whole cohort in one process, measured "
            "elsewhere: 1000 times throughput.step_seconds_median in results.json of such a run "
            "(default: counted operations over an assumed rate)",
        ),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=text)
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw step time and efficiency against the number of processes: a .png or .svg file",
    )
    _add_settings(parser)
    _add_flags(parser, without=sorted(flag_types().keys() - PLANNED))


def _add_report(parser: argparse.ArgumentParser) -> None:
    """Write one HTML page about any finished runs: the paper's table beside ours, differences with
    intervals, training curves with bands over seeds, agreement and KL between peers,
    calibration, accuracy under weight noise, cost. The page is self-contained. Runs that differ
    in method and seed only are compared with each other.

    examples:
      %(prog)s runs/pair
      %(prog)s runs/pair runs/four --to both.html --analyse 2000
    """
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders of runs, or above them")
    parser.add_argument(
        "--to", metavar="FILE", help="the page (default: report.html in the first DIR)"
    )
    parser.add_argument(
        "--analyse",
        type=int,
        default=1000,
        metavar="N",
        help="analyse weight noise, entropy and calibration on N images of each split, and keep "
        "the numbers in analysis.json of each run; 0 skips this (default: 1000)",
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    """Read and decode every image of a data set before anything is trained on it. Print its splits,
    classes (smallest first), image sizes and formats, and how many images are exact copies of
    others, such as test images of training images. Images that cannot be read are listed in a
    file, one a line, and the exit code is then 2. No image is kept: memory does not grow with
    their size.

    examples:
      %(prog)s --dataset ./photos
      %(prog)s --dataset ./photos --test-fraction 0.2 --workers 4
      %(prog)s --dataset owner/name --label-column kind --to bad.txt
    """
    for group in flag_groups():
        for field in group.fields:
            if field.name in _CHECKED:
                _add_flag(parser, field)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images; 0 reads them in this one (default: one for each core)",
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="list of the images that cannot be read, each with a tab and the reason, written only "
        "if there are any (default: bad-images.txt)",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    """Show the decoded images that are kept for the next start: of which data set and split, how
    many, of which size, and when they were last used. When a new set is kept, those that were
    not used for longest are removed until the limit holds. DML_CACHE is the folder (default:
    ~/.cache/dml_accel), DML_CACHE_LIMIT its limit (default: 50GB; 0 keeps nothing).

    examples:
      %(prog)s
      %(prog)s --prune                 # until the limit holds
      %(prog)s --prune --limit 5GB
      %(prog)s --prune --all           # everything; what is needed is decoded again
    """
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove what was not used for longest until the limit holds; what another process "
        "uses stays",
    )
    parser.add_argument(
        "--all", action="store_true", help="with --prune: remove everything, records as well"
    )
    parser.add_argument(
        "--limit", metavar="SIZE", help="as 5GB, for this call (default: DML_CACHE_LIMIT)"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what sets several flags at once; every flag that is given overrides it."""
    off = "--no-FLAG turns off any flag that is off by default, as --no-ema does"
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"flags of the literature by name: {', '.join(RECIPES)}; {LIST} shows what each "
        f"sets. A file and flags that are given override it. {off}",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="flags from a file, which flags that are given override: JSON or YAML with flags as "
        f"keys (lr-schedule: cosine), or config.json of a run, to repeat or vary it. {off}",
    )


def _add_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add one flag per field of ``Config``, in one group per section."""
    for group in flag_groups():
        added = parser.add_argument_group(group.title, group.text)
        for field in group.fields:
            if field.name not in without:
                _add_flag(added, field)


def _add_flag(group: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
    """Add the flag of one field: its type, default and help come from the field."""
    options = dict(field.metadata["argparse"])
    kind = _plain_type(flag_types()[field.name])
    text = help_of(field)
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
    # Flags that are not given are left out, so that a preset knows which ones were.
    group.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)
    if not field.default and field.name != "seed":  # a recipe or a file may have turned it on
        usual = [] if field.default == () else field.default
        group.add_argument(
            f"--no-{flag.removeprefix('--')}",
            dest=field.name,
            action="store_const",
            const=usual,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _plain_type(hint: Any) -> type:
    """Return the type of a single word on the command line: int for ``int | None``."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


_COMMANDS = {
    "train": ("train a cohort, one folder per run", _add_training),
    "compare": ("compare methods over seeds, with intervals", _add_comparison),
    "plan": ("predict what a placement costs, without training", _add_plan),
    "report": ("write a page about finished runs", _add_report),
    "check-data": ("read every image of a data set, and list those that cannot be", _add_check),
    "cache": ("show or remove the decoded images that are kept", _add_cache),
    "evaluate": ("evaluate trained networks", add_evaluation),
    "predict": ("predict the classes of images", add_prediction),
    "export": ("write a network to a folder of its own", add_export),
}
