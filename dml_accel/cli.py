"""The command line: flags from the configuration's fields, one line per error, exit codes.

0 done; 2 wrong usage or input; anything else failed.
"""

import argparse
import dataclasses
import difflib
import logging
import sys
import types
import typing
from collections.abc import Sequence
from typing import NoReturn

from dml_accel.config import Config, UsageError

_EXAMPLES = """examples:
  %(prog)s --cohort 'resnet8*2' --dataset digits --epochs 8 --batch-size 16 --lr 0.05
  %(prog)s --cohort 'resnet32*2' wrn_28_10 'timm:efficientnet_b0'
  %(prog)s --cohort 4 --dataset path/to/folder --image-size 32 --output-dir runs/four
  %(prog)s --cohort 4 --kl-weight 0        # the same networks, each alone
"""


class _Parser(argparse.ArgumentParser):
    """Argparse that knows no abbreviations, names the nearest flag and says it in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(" ".join(message.split()))

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse everything.

        Raises:
            UsageError: an argument is unknown; the nearest known flag is named.
        """
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = list(self._option_string_actions)
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            raise UsageError(f"unknown argument {unknown[0]}: {hint}")
        return parsed


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of ``Config``: its type, default and help come from the field."""
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        options = dict(field.metadata["argparse"])
        kind = _plain_type(hints[field.name])
        text = field.metadata["help"]
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["type"] = kind
            if "metavar" not in options and "choices" not in options:
                options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
            if field.default is not None:
                default = field.default
                shown = " ".join(default) if isinstance(default, tuple) else default
                text += f" (default: {shown})"
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, help=text.replace("%", "%%"), **options)


def _plain_type(hint: typing.Any) -> type:
    """Return the type that one word of the command line is read as: int for ``int | None``."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _parser() -> tuple[_Parser, _Parser]:
    parser = _Parser(
        prog="dml-accel",
        description="Deep Mutual Learning: networks that teach each other.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a cohort and write one folder per run",
        description="Train a cohort of networks that learn from the labels and from each other.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_flags(train)
    return parser, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; return the process's exit code.

    Args:
        arguments: the words after the program's name (default: this process's).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.captureWarnings(False)
    try:
        parser, train_parser = _parser()
        if arguments[:1] == ["train"]:
            return _train(vars(train_parser.parse_all(arguments[1:])))
        parser.parse_all(arguments)
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(values: dict[str, typing.Any]) -> int:
    config = Config.from_dict(values)
    # Imported late: --help and wrong flags need no torch.
    from dml_accel.report import results_table
    from dml_accel.training import command_line, train

    folder, results = train(config, command_line())
    print(results_table(results))
    print(f"\nrun folder: {folder}\npeers:      {folder}/peers/<name>/model.safetensors")
    return 0
