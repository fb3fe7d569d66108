"""The folder of a comparison: what may go on in it, and what is refused."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dml_accel.analysis.subruns import SubRun
from dml_accel.core.config import Config, UsageError
from dml_accel.distributed.launch import launched_precision, launched_processes, restarts
from dml_accel.training.resume import has_checkpoint
from dml_accel.training.run_folder import LockedFolder
from dml_accel.training.saved import is_done, saved_config, saved_description, saved_status
from dml_accel.training.setup import Checked

PLOT = "differences.png"
_TABLES = ("results.json", "results.csv", "results.md", PLOT)


class ComparisonFolder(LockedFolder):
    """The folder of a plan's runs and tables.

    Raises:
        UsageError: it holds a single run, or tables of something else or of more runs.
    """

    def __init__(self, path: str | None, label: str, plan: Sequence[SubRun]) -> None:
        self._plan = plan
        super().__init__(path, label)

    def _refuse_content(self) -> None:
        """Refuse a single run, other people's tables, and a comparison with more than the plan."""
        for trace in ("config.json", "metrics.jsonl"):
            if (self.path / trace).exists():
                raise UsageError(
                    f"--output-dir {self.path} holds a single run ({trace}); name another folder"
                )
        tables = [name for name in _TABLES if (self.path / name).exists()]
        if not tables:
            return
        try:
            known = json.loads((self.path / "results.json").read_text())["runs"]
            found = {run["folder"] for run in known}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--output-dir {self.path} holds {', '.join(tables)} of something else; name "
                "another folder"
            ) from error
        more = sorted(found - {sub.folder for sub in self._plan})
        if more:
            raise UsageError(
                f"--output-dir {self.path} holds a comparison with {', '.join(more[:3])}"
                f"{' and more' if len(more) > 3 else ''}, which these flags leave out; repeat its "
                "--cohort, --methods and --seeds, or name another folder"
            )


def refuse_another_configuration(root: Path, sub: SubRun) -> None:
    """Refuse to go on with a run that was made otherwise.

    Raises:
        UsageError: the differences are named.
    """
    folder = root / sub.folder
    if not (folder / "config.json").exists():
        return
    wrong = sub.config.differences(saved_config(folder))
    # Where no precision is given it is the launcher's; apart, batch statistics are the processes'.
    wrong.pop("mixed_precision", None)
    if is_done(folder):
        results = json.loads((folder / "results.json").read_text())
        asked: dict[str, Any] = {"mixed_precision": launched_precision(sub.config)}
        if sub.config.batch_norm == "local":
            asked["world_size"] = launched_processes()
        wrong |= {
            name: (value, results[name]) for name, value in asked.items() if results[name] != value
        }
    if wrong:
        texts = [f"{name} {theirs} and not {ours}" for name, (ours, theirs) in wrong.items()]
        raise UsageError(
            f"{root / sub.folder} was made with {', '.join(texts)}; name another --output-dir or "
            "repeat its flags"
        )


def refuse_other_starts(folder: Path, checked: Checked) -> None:
    """Refuse weights to start from that are not those of a run that is there.

    Raises:
        UsageError: a peer is named.
    """
    if not (folder / "config.json").exists():
        return
    for peer in saved_description(folder).get("peers", []):
        name, began, now = peer["name"], peer.get("start"), checked.starts.get(peer["name"])
        if began and now and began.get("sha256") != now["sha256"]:
            raise UsageError(
                f"{name} of {folder} started from other weights than {now['source']} holds now; "
                "name another --output-dir, or bring the old ones back"
            )


def was_stopped(root: Path, plan: Sequence[SubRun]) -> bool:
    """Whether a launcher has started again what was stopped on request."""
    stopped = restarts() > 0 and any(saved_status(root / sub.folder) == "stopped" for sub in plan)
    if stopped:
        print(f"{root} was stopped on request; the same command goes on with it", file=sys.stderr)
    return stopped


def in_place(sub: SubRun, path: Path) -> Config:
    """Return the configuration with which a run in a folder goes on."""
    return dataclasses.replace(sub.config, output_dir=str(path), resume="auto")


def begins(sub: SubRun, root: str | None) -> bool:
    """Whether a run starts from the weights it is given: it has neither an end nor a checkpoint."""
    if root is None:
        return True
    path = Path(root) / sub.folder
    return not (is_done(path) or has_checkpoint(in_place(sub, path)))
