"""Tables on terminals of several widths: nothing is cut, and no word is broken."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
from collections.abc import Callable, Iterator

import pytest

from dml_accel.core.tables import results_table, table, terminal_columns

HEADERS = ("cohort", "n", "independent", "mutual - independent")
ROWS = [
    ["resnet8 + wrn_16_2", 5, "22.78 / 23.65", "+0.87 (+0.41 to +1.32; p = 0.012)"],
    ["猫" * 8, 5, "-", ""],
]
CELLS = [str(cell) for row in ROWS for cell in row]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Make stdout a terminal of so many columns."""
    with contextlib.ExitStack() as opened:

        def make(columns: int) -> None:
            _, slave = os.openpty()
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            monkeypatch.setattr(sys, "stdout", opened.enter_context(open(slave, "w")))

        yield make


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_table_fits_the_terminal(columns: int, terminal: Callable[[int], None]) -> None:
    elsewhere = table(ROWS, HEADERS, "simple", left=1)
    markdown = table(ROWS, HEADERS, "github", left=1)
    terminal(columns)
    shown = table(ROWS, HEADERS, "simple", left=1)

    def widest(text: str) -> int:
        return max(len(line) + line.count("猫") for line in text.splitlines())

    assert widest(shown) <= columns
    words = shown.replace("-" * 5, "").split()
    assert all(word in words for cell in CELLS for word in cell.split())  # whole words
    assert (shown == elsewhere) == (widest(elsewhere) <= columns)
    assert table(ROWS, HEADERS, "github", left=1) == markdown


def test_a_block_by_hand(terminal: Callable[[int], None]) -> None:
    terminal(42)
    assert table(ROWS[:1], HEADERS, "simple", left=1) == (
        "cohort                resnet8 + wrn_16_2\n"
        "n                     5\n"
        "independent           22.78 / 23.65\n"
        "mutual - independent  +0.87 (+0.41 to\n"
        "                      +1.32; p = 0.012)"
    )


def test_a_terminal_that_does_not_say_how_wide_it_is_is_a_usual_one(
    terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert terminal_columns(sys.stdout) is None  # a file or a pipe
    terminal(0)
    assert terminal_columns(sys.stdout) == 80


# ---------------------------------------------------------------- results

METRICS = {"n": 8, "top1": 0.5, "top5": None, "nll": 1.25, "ece": 0.125}


@pytest.mark.parametrize(
    ("extra", "imbalance", "last_columns"),
    [
        ({"macro_f1": 0.375}, 4.0, ("ECE %", "macro-F1 %", "12.50", "37.50")),
        ({"macro_f1": 0.375}, 1.5, ("NLL (nats)", "ECE %", "1.2500", "12.50")),
        ({}, None, ("NLL (nats)", "ECE %", "1.2500", "12.50")),  # of an earlier version
    ],
    ids=str,
)
def test_macro_f1_is_shown_where_classes_are_unbalanced(
    extra: dict[str, float], imbalance: float | None, last_columns: tuple[str, ...]
) -> None:
    metrics = METRICS | extra
    peer = {"name": "a-0", "params": 1000, "test": metrics, "ema": {"test": metrics}}
    results = {"peers": [peer], "ensemble": metrics, "ema_ensemble": metrics}
    results |= {} if imbalance is None else {"imbalance": imbalance}
    lines = results_table(results, "github").splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["a-0", "ensemble", "a-0, averaged", "ensemble, averaged"]
    assert [row[0] for row in rows] == names
    for row in rows:
        assert (*header[-2:], *row[-2:]) == last_columns
    peer |= {"name": "mobilenet-0", "params": 12_345_678}
    del results["ema_ensemble"]
    assert max(map(len, results_table(results).splitlines())) <= 80
