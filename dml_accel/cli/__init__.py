"""The command line: ``dml-accel``, ``python -m dml_accel`` and ``train.py``.

In reading order:

    inference_flags  the flags of evaluate, predict and export
    parser           the flags and the help of every command
    inference        evaluate, predict and export
    check_data       every image of a data set is read
    cache            what is kept of decoded images
    commands         every command, from its flags to its exit code
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code.

    Args:
        arguments: the words after the program's name (default: this process's).
    """
    from dml_accel.core.streams import open_missing

    open_missing()  # before other imports open files
    from dml_accel.distributed.children import begin

    begin()
    from dml_accel.cli import commands

    return commands.main(arguments)
