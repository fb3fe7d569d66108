"""The command line."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code.

    Args:
        arguments: the words after the program's name (default: this process's).
    """
    from dml_accel.cli import commands

    return commands.main(arguments)
