"""The folder of a comparison: its runs and their tables, and what must not be mixed in."""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dml_accel.analysis import plots, statistics
from dml_accel.analysis.planned import PlannedRun
from dml_accel.analysis.runs import Run, read_run
from dml_accel.analysis.speeds import speed_differences, speed_of
from dml_accel.analysis.tables import comparison_markdown, comparison_title
from dml_accel.core.config import Config, differences_text
from dml_accel.core.errors import UsageError, one_line
from dml_accel.core.files import read_json, write_text
from dml_accel.data.catalogue import folders_read
from dml_accel.distributed.launch import launched_precision, launched_processes, restarts
from dml_accel.training.resume import refuse_other_source
from dml_accel.training.run_folder import (
    LockedFolder,
    RunFolder,
    SavedRun,
    refuse_foreign,
    refuse_inside,
)

_PLOT = "differences.png"
_TABLES = ("results.json", "results.csv", "results.md", _PLOT)


class ComparisonFolder(LockedFolder):
    """The folder of a comparison: its runs and their tables.

    Args:
        path: the folder; None for a new one.
        plan: the runs.
        left_out: methods that are not among them although all were asked for, and why.
        notes: what to know about the methods, a line each.

    Attributes:
        failed: runs that ended without results in this command, and why.

    Raises:
        UsageError: it holds a single run, foreign tables, a comparison with more runs, or runs that
            were started with other flags.
    """

    def __init__(
        self,
        path: str | None,
        plan: Sequence[PlannedRun],
        left_out: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._plan, self._left_out, self._notes = plan, dict(left_out or {}), list(notes)
        self.failed: dict[str, str] = {}
        label = "-".join(["compare", *dict.fromkeys(planned.cohort for planned in plan)])[:80]
        super().__init__(path, label, folders_read(plan[0].config.data))

    def finished(self) -> list[Run]:
        """Return the finished runs; one of a method of stages holds those before it.

        Raises:
            UsageError: one cannot be read, or does not hold what the tables need.
        """
        last = [planned for planned in self._plan if planned.is_last_stage]
        done = [planned for planned in last if self.saved(planned).is_done]
        runs = [read_run(self.path / one.folder, one.folder, one.method) for one in done]
        for run in runs:
            try:
                statistics.refuse_incomplete(run)
                speed_of(run)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UsageError(
                    f"the finished run in {run.folder} is damaged ({type(error).__name__}: "
                    f"{one_line(error)}): remove its folder to train it again"
                ) from error
        return runs

    def say_what_differs(self) -> None:
        """Warn of finished runs that lack networks, or whose times cannot be compared."""
        runs = self.finished()
        for run in runs:
            lacking = [name for name in run.peers if name not in run.peer_folders]
            if lacking:
                print(
                    f"warning: {run.folder} lacks the networks of {', '.join(lacking)}: its "
                    "results count, but nothing can be predicted with them",
                    file=sys.stderr,
                )
        unfinished = self.unfinished()
        differs = speed_differences(runs, unfinished[0].config if unfinished else None)
        if differs:
            print(
                f"warning: seconds and images/s of these runs cannot be compared: {differs}",
                file=sys.stderr,
                flush=True,
            )

    def set_done(self) -> None:
        """Correct the status of runs that were killed between their results and their status."""
        for planned in self._plan:
            RunFolder(self.path / planned.folder, "", resumes=True, part=True).set_done()

    def saved(self, planned: PlannedRun) -> SavedRun:
        """Return a run as it was left."""
        return SavedRun(self.path / planned.folder)

    def unfinished(self) -> list[PlannedRun]:
        """Return the runs without results."""
        return [planned for planned in self._plan if not self.saved(planned).is_done]

    @property
    def was_stopped(self) -> bool:
        """Whether a launcher has restarted a comparison that was stopped on request."""
        return restarts() > 0 and any(self.saved(one).status == "stopped" for one in self._plan)

    def write_tables(self, config: Config, cifar100: bool, command: str) -> dict[str, Any]:
        """Write the tables of all finished runs; return the content of results.json.

        Args:
            config: what the runs share.
            cifar100: whether the images are CIFAR-100's.
            command: the command line.
        """
        unfinished = [planned.folder for planned in self.unfinished()]
        runs = self.finished()
        record = statistics.comparison_record(
            config,
            runs,
            methods=list(dict.fromkeys(planned.method for planned in self._plan)),
            seeds=list({planned.seed for planned in self._plan}),
            cifar100=cifar100,
            missing=[folder for folder in unfinished if folder not in self.failed],
            failed=self.failed,
            command=command,
        )
        record |= {"left_out": self._left_out, "notes": self._notes}
        self.write("results.json", record)
        for name, write in (
            ("results.csv", lambda path: write_text(path, self._csv(runs))),
            ("results.md", lambda path: write_text(path, comparison_markdown(record, _PLOT))),
            (
                _PLOT,
                lambda path: plots.save(plots.differences(record, comparison_title(record)), path),
            ),
        ):
            try:
                write(self.path / name)
            except Exception as error:  # the runs to come must not be lost for a table or figure
                reason = f"{type(error).__name__}: {one_line(error)}"
                print(f"warning: {self.path / name} is not written ({reason})", file=sys.stderr)
        return record

    def _csv(self, runs: Sequence[Run]) -> str:
        several = len({planned.cohort for planned in self._plan}) > 1
        columns = ("cohort", *statistics.COLUMNS) if several else statistics.COLUMNS
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(statistics.csv_rows(runs))
        return table.getvalue()

    def _refuse_content(self) -> None:
        for trace in ("config.json", "metrics.jsonl"):
            if (self.path / trace).exists():
                raise UsageError(
                    f"--output-dir {self.path} holds a single run ({trace}); name another folder"
                )
        self._refuse_other_tables()
        has_tables = any((self.path / name).exists() for name in _TABLES)
        if not has_tables and not any((self.path / one.folder).is_dir() for one in self._plan):
            refuse_foreign(self.path, "none of the runs that these flags ask for")
            refuse_inside(self.path, self._images)
        for planned in self._plan:
            RunFolder(self.path / planned.folder, "", resumes=True)  # refuses foreign files
            _refuse_other_flags(self.saved(planned), planned.config_in(self.path))
        self.finished()

    def _refuse_other_tables(self) -> None:
        tables = [name for name in _TABLES if (self.path / name).exists()]
        if not tables:
            return
        try:
            finished = {run["folder"] for run in read_json(self.path / "results.json")["runs"]}
        except (UsageError, KeyError, TypeError) as error:
            raise UsageError(
                f"--output-dir {self.path} holds {', '.join(tables)} of something else; name "
                "another folder"
            ) from error
        more = sorted(finished - {planned.folder for planned in self._plan})
        if more:
            raise UsageError(
                f"--output-dir {self.path} holds a comparison with {', '.join(more[:3])}"
                f"{' and more' if len(more) > 3 else ''}, which these flags leave out: use its "
                "--cohort, --methods and --seeds, or name another folder"
            )


def _refuse_other_flags(saved: SavedRun, config: Config) -> None:
    """Refuse to resume or keep a run that was started with other flags."""
    if not saved.has_description:
        return
    wrong = config.differences(saved.config)
    if not wrong:  # else the flags tell more
        refuse_other_source(saved.path, config, saved.description)
    wrong.pop("dataset", None)  # what counts is what it holds: see ``compare``
    wrong.pop("bad_images", None)  # none was met up to now
    wrong.pop("mixed_precision", None)  # if it is not given, the launcher decides
    if config.method.frozen_peers and saved.config.method.frozen_peers:
        wrong.pop("frozen_peers", None)  # here, too, what they hold
    if saved.is_done:
        results, precision = saved.results, launched_precision(config.numerics)
        if results.get("mixed_precision") != precision:
            wrong["mixed_precision"] = precision, results.get("mixed_precision")
        # Local batch statistics depend on how many processes share a batch.
        world, now = results.get("world_size"), launched_processes()
        if config.numerics.batch_norm == "local" and world != now:
            raise UsageError(
                f"{saved.path} was trained by {world} process(es), and --batch-norm local makes "
                f"the result depend on that; there are {now} now: start {world}, or use a new "
                "--output-dir"
            )
    if wrong:
        raise UsageError(
            f"{saved.path} {differences_text(wrong)}: use the same flags or a new --output-dir"
        )
