"""A run, and a comparison of methods over seeds, as functions. No torch before they are called."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_accel.core.config import Config

if TYPE_CHECKING:
    from pandas import DataFrame

    from dml_accel.api.trained import Networks

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """The folder of a run, finished or not: what ``train`` returns; it can be used as a path.

    Attributes:
        path: of the folder.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        raise NotImplementedError

    @property
    def metrics(self) -> "DataFrame":
        """The records of metrics.jsonl, a row for each network of each record."""
        raise NotImplementedError

    def networks(
        self,
        checkpoint: PathLike | int | None = None,
        weights: str | None = None,
        cpu: bool = False,
    ) -> "Networks":
        """Return the trained networks, ready to predict; see ``dml_accel.load``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Comparison:
    """The folder of a comparison: what ``compare`` returns.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        raise NotImplementedError

    @property
    def table(self) -> "DataFrame":
        """A row for each method of each cohort."""
        raise NotImplementedError

    @property
    def runs(self) -> list[Run]:
        """The finished runs."""
        raise NotImplementedError


def train(
    config: Config | PathLike | None = None, *, recipe: str | None = None, **flags: Any
) -> Run:
    """Train a cohort, as the command ``train`` does.

    Args:
        config: a ``Config``, or the path of a file as for ``--config``; flags override it.
        recipe: as for ``--recipe``.
        flags: those of ``dml-accel train --help``, with underscores for dashes.
    """
    raise NotImplementedError


def compare(
    config: Config | PathLike | None = None,
    *,
    methods: str | Sequence[str] | None = None,
    seeds: int = 5,
    preset: str | None = None,
    recipe: str | None = None,
    **flags: Any,
) -> Comparison:
    """Compare methods over seeds, as the command ``compare`` does."""
    raise NotImplementedError
