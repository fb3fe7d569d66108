"""How far long work is, as reading images: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Images or other things that are done, of so many; use it as a context.

    Args:
        what: is done with them, as "decoding train".
        total: how many there are.
        done: of them, before.
        quiet: show nothing.
        unit: what is counted.
        every: seconds between lines.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        quiet: bool = False,
        unit: str = "images",
        every: float = _SECONDS_BETWEEN_LINES,
    ) -> None:
        self._unit, self._every = unit, every
        self._what, self._total, self._done, self._first = what, total, done, done
        self._bar: tqdm[Any] | None = None
        self._speaks = not quiet
        if self._speaks and sys.stderr.isatty():
            self._bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}")
        self._started = self._spoke = time.monotonic()

    def add(self, count: int) -> None:
        """Count further ones."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._speaks and now - self._spoke >= self._every:
            self._spoke = now
            rate = (self._done - self._first) / (now - self._started)
            left = tqdm.format_interval((self._total - self._done) / rate) if rate else "?"
            print(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, "
                f"{rate:,.{0 if rate >= 10 else 1}f} a second, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
