"""Errors: each has the exit code of its kind and a text of one line."""

import pytest

from dml_accel.core import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.UnreadableError, 2),
        (errors.RunError, 1),
        (errors.StoppedError, 75),
        (errors.DivergedError, 1),
        (errors.OutOfMemoryError, 1),
        (errors.ProcessLostError, 1),
        (errors.CheckpointNotWrittenError, 1),
    ],
)
def test_exit_codes(kind: type[Exception], code: int) -> None:
    error = kind("why")
    assert error.exit_code == code and str(error) == "why"
    assert issubclass(kind, errors.UsageError if code == 2 else errors.RunError)


def test_rank_0_prints_unless_another_process_must() -> None:
    assert errors.RunError("x").prints is None
    assert errors.ProcessLostError("x", prints=True).prints is True


def test_a_usage_error_is_a_value_error() -> None:
    # So that code which uses the library catches it as it catches its own.
    assert issubclass(errors.UsageError, ValueError)


def test_a_text_of_several_lines_becomes_one() -> None:
    assert errors.one_line(ValueError("a\n  b\t c \n")) == "a b c"
