"""Several methods over several seeds: one ordinary run for each, one table for all.

A comparison that was interrupted goes on where it stopped: finished runs are kept, the others go on
from their newest good checkpoint.
"""

import contextlib
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_accel import cohort, comparison, plots, sources
from dml_accel.checking import Checked, agreed_ranks, check, saved_here
from dml_accel.comparison import SubRun
from dml_accel.comparison_report import comparison_markdown, comparison_title
from dml_accel.config import Config, UsageError
from dml_accel.costs import count
from dml_accel.data import check_sizes
from dml_accel.engine import DivergedError, steps_to_take
from dml_accel.files import write_text
from dml_accel.launching import (
    Stop,
    check_launch,
    launched_precision,
    launched_processes,
    launched_rank,
    restarts,
    share_cores,
)
from dml_accel.placement import Placement
from dml_accel.processes import Processes
from dml_accel.progress import Display
from dml_accel.published import TABLE_2, is_cifar100
from dml_accel.resuming import Origin, find, has_checkpoint
from dml_accel.runfolder import (
    LockedFolder,
    RunFolder,
    is_done,
    remedy_of_a_stop,
    saved_config,
    saved_description,
    saved_status,
)
from dml_accel.sources import Source
from dml_accel.training import run, workload

# What each method changes in the configuration that the methods share. Where labels are few, all
# but ``semi`` learn from the labelled images alone.
METHODS: dict[str, dict[str, Any]] = {
    "independent": {"kl_weight": 0.0},
    "mutual": {},
    "sequential": {"update": "sequential"},
    "official": {"update": "official"},
    "mean-prob": {"target": "mean-prob"},
    "mean-logit": {"target": "mean-logit"},
    "distill": {"links": "frozen"},
    "semi": {},
}
DEFAULT_METHODS = ("independent", "mutual")
# Flags that the methods set.
SET_BY_METHODS = ("update", "target", "kl_images")
_PLOT = "differences.png"
_TABLES = ("results.json", "results.csv", "results.md", _PLOT)


@dataclass(frozen=True)
class Preset:
    """A named comparison: its cohorts, and what it changes in the default configuration."""

    text: str
    cohorts: tuple[tuple[str, ...], ...]
    changes: dict[str, Any]


PRESETS = {
    "paper-table2": Preset(
        "the six pairs of the paper's Table 2, by its recipe",
        tuple(row.nets for row in TABLE_2),
        {},
    ),
    "laptop": Preset(
        "a pair of resnet8 on 10,000 images for 20 epochs: under an hour on two cores",
        (("resnet8*2",),),
        {"train_limit": 10_000, "epochs": 20, "lr_step": 6, "eval_every": "5ep"},
    ),
}


class _ComparisonFolder(LockedFolder):
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


def compare(
    config: Config,
    cohorts: Sequence[tuple[str, ...]],
    methods: Sequence[str],
    seeds: int,
    command: str,
) -> tuple[Path, dict[str, Any]] | None:
    """Train every cohort by every method with every seed; write the tables after each run.

    Args:
        config: what the runs share; its seed is the first one.
        cohorts: each as ``Config.cohort``.
        methods: names in ``METHODS``.
        seeds: how many.
        command: the command line, for the record.

    Returns:
        The folder and the content of its results.json; None in all processes but the first.

    Raises:
        UsageError: the input does not allow one of the runs, or a finished run in the folder was
            made by another configuration; nothing has been written then.
    """
    check_launch(config)
    share_cores(config)
    plan = _plan(config, cohorts, methods, seeds)
    label = "-".join(["compare", *dict.fromkeys(sub.cohort for sub in plan)])[:80]
    speaks = launched_rank() == 0
    root = _ComparisonFolder(config.output_dir, label, plan) if speaks else None
    if root:
        for sub in plan:
            _refuse_another_configuration(root.path, sub)
    source = sources.read(config, quiet=not speaks)
    costs = _costs(plan, source, config.output_dir)
    failed: dict[str, str] = {}
    with remedy_of_a_stop(root), Stop() as stop, root or contextlib.nullcontext():
        unfinished = [sub for sub in plan if not (root and is_done(root.path / sub.folder))]
        if root:
            kept = len(plan) - len(unfinished)
            print(
                f"comparison: {root.path}, {kept} of {len(plan)} runs are finished; if this is "
                "interrupted, the same command with this --output-dir goes on",
                file=sys.stderr,
            )
        work = sum(workload(sub.config, source, costs[sub.cohort]).total for sub in unfinished)
        display = Display(max(work, 1.0), quiet=not speaks, many=True)
        processes = Processes(config)
        with contextlib.closing(display), processes.watching():
            if processes.agreed(bool(root and _was_stopped(root.path, plan))):
                processes.close()
                return None
            compiles = config.compile == "on"
            if config.compile == "auto":
                compiles = _compiles(plan, unfinished, source, processes, root)
            for place, sub in enumerate(plan):
                if processes.agreed(sub not in unfinished):
                    continue
                folder = RunFolder(root.path / sub.folder, "", goes_on=True) if root else None
                title = f"run {place + 1}/{len(plan)}, {sub.folder}"
                try:
                    with folder or contextlib.nullcontext():
                        begins = _begins(sub, config.output_dir)
                        checked = check(sub.config, source, begins)
                        origin = _origin(sub, folder, checked)
                        run(
                            sub.config,
                            checked,
                            processes,
                            folder,
                            command,
                            display,
                            stop,
                            origin,
                            title,
                            costs[sub.cohort],
                            compiles,
                        )
                except DivergedError as error:  # in all processes alike; the others go on
                    failed[sub.folder] = str(error)
                    if root:
                        display.end()
                processes.release_networks()
                if root:
                    _write(root, config, plan, source, command, failed)
            processes.close()
        return (root.path, _write(root, config, plan, source, command, failed)) if root else None


def _compiles(
    plan: Sequence[SubRun],
    unfinished: Sequence[SubRun],
    source: Source,
    processes: Processes,
    root: LockedFolder | None,
) -> bool:
    """Decide once for all runs, so that methods differ in nothing else; what was decided stays."""
    text = ""
    if root:
        known = [_known_to_compile(root.path / sub.folder) for sub in plan]
        said = [one for one in known if one is not None]
        text = json.dumps([str(root.path.resolve()), said, [plan.index(s) for s in unfinished]])
    path, said, places = json.loads(processes.text_of_first(text))
    if said:
        return any(said)
    saved = 0.0
    for cohort_ in dict.fromkeys(plan[place].cohort for place in places):
        subs = [plan[place] for place in places if plan[place].cohort == cohort_]
        steps = sum(steps_to_take(s.config, check_sizes(source, s.config)[0]) for s in subs)
        config = subs[0].config
        checked = check(config, source)
        ranks = agreed_ranks(config, checked, processes, Path(path))
        saved += saved_here(config, checked, Placement(config, processes, ranks), steps)
    return bool(processes.largest(saved > 0))


def _known_to_compile(folder: Path) -> bool | None:
    with contextlib.suppress(UsageError):
        return bool(saved_description(folder).get("compiled"))
    return None


def _was_stopped(root: Path, plan: Sequence[SubRun]) -> bool:
    """Whether a launcher has started again what was stopped on request."""
    stopped = restarts() > 0 and any(saved_status(root / sub.folder) == "stopped" for sub in plan)
    if stopped:
        print(f"{root} was stopped on request; the same command goes on with it", file=sys.stderr)
    return stopped


def _in_place(sub: SubRun, path: Path) -> Config:
    """Return the configuration with which a run in a folder goes on."""
    return dataclasses.replace(sub.config, output_dir=str(path), resume="auto")


def _begins(sub: SubRun, root: str | None) -> bool:
    """Whether a run starts from the weights it is given: it has neither an end nor a checkpoint."""
    if root is None:
        return True
    path = Path(root) / sub.folder
    return not (is_done(path) or has_checkpoint(_in_place(sub, path)))


def _origin(sub: SubRun, folder: RunFolder | None, checked: Checked) -> Origin:
    return find(_in_place(sub, folder.path), checked) if folder else Origin()


def _plan(
    config: Config, cohorts: Sequence[tuple[str, ...]], methods: Sequence[str], seeds: int
) -> list[SubRun]:
    """Return the runs, seed by seed, so that what is there at any time can be compared.

    Raises:
        UsageError: there is nothing to compare.
    """
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}; it must be at least 1")
    _refuse_methods(config, methods)
    labels = [cohort.label([spec.name for spec in cohort.parse(nets)]) for nets in cohorts]
    return [
        SubRun(
            label,
            method,
            seed,
            f"{label + '/' if len(cohorts) > 1 else ''}{method}/seed-{seed}",
            dataclasses.replace(
                config, cohort=nets, seed=seed, output_dir=None, **_changes(config, method)
            ),
        )
        for nets, label in zip(cohorts, labels, strict=True)
        for seed in range(config.seed, config.seed + seeds)
        for method in dict.fromkeys(methods)
    ]


def _refuse_methods(config: Config, methods: Sequence[str]) -> None:
    if config.kl_weight == 0 and set(methods) - {"independent"}:
        raise UsageError("--kl-weight 0 makes every method independent; leave it out")
    if ("distill" in methods) != bool(config.frozen_peers):
        raise UsageError(
            "--frozen-peers are the teachers of the method distill: give both or neither"
        )
    if "semi" in methods and config.labelled_fraction == 1:
        raise UsageError("the method semi needs --labelled-fraction below 1")
    if config.placement == "split" and {"sequential", "official"} & set(methods):
        raise UsageError(
            "the methods sequential and official take turns, which leaves processes of "
            "--placement split idle; use auto, which replicates those"
        )


def _changes(config: Config, method: str) -> dict[str, Any]:
    """Return what a method changes in the configuration."""
    changes = dict(METHODS[method])
    if method != "distill":
        changes["frozen_peers"] = ()
    if config.labelled_fraction < 1 and method not in ("independent", "semi"):
        changes["kl_images"] = "labelled"
    return changes


def _refuse_another_configuration(root: Path, sub: SubRun) -> None:
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


def _costs(plan: Sequence[SubRun], source: Source, root: str | None) -> dict[str, float]:
    """Check one run of each cohort; return the cost of its forward pass of one image.

    Raises:
        UsageError: see ``check``; runs that are there started from other weights.
    """
    costs: dict[str, float] = {}
    for cohort_ in dict.fromkeys(sub.cohort for sub in plan):
        subs = [sub for sub in plan if sub.cohort == cohort_]
        begin = [sub for sub in subs if _begins(sub, root)]
        config = subs[0].config
        checked = check(config, source, begins=bool(begin))  # networks of one cohort at a time
        for sub in subs if root and begin else ():
            _refuse_other_starts(Path(str(root)) / sub.folder, checked)
        nets = checked.modules.values()
        costs[cohort_] = float(sum(count(net, config.image_size).macs for net in nets))
    return costs


def _refuse_other_starts(folder: Path, checked: Checked) -> None:
    """Refuse weights to start from that are not those of a run that is there."""
    if not (folder / "config.json").exists():
        return
    for peer in saved_description(folder).get("peers", []):
        name, began, now = peer["name"], peer.get("start"), checked.starts.get(peer["name"])
        if began and now and began["sha256"] != now["sha256"]:
            raise UsageError(
                f"{name} of {folder} started from other weights than {now['source']} holds now; "
                "name another --output-dir, or bring the old ones back"
            )


def _write(
    root: LockedFolder,
    config: Config,
    plan: Sequence[SubRun],
    source: Source,
    command: str,
    failed: dict[str, str],
) -> dict[str, Any]:
    """Write the tables of what is finished; return the content of results.json."""
    runs = [comparison.read(root.path, sub) for sub in plan if is_done(root.path / sub.folder)]
    record = comparison.record(config, plan, runs, is_cifar100(source.classes), command, failed)
    root.write("results.json", record)
    several = len({sub.cohort for sub in plan}) > 1
    columns = ("cohort", *comparison.COLUMNS) if several else comparison.COLUMNS
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison.csv_rows(runs))
    write_text(root.path / "results.csv", table.getvalue())
    write_text(root.path / "results.md", comparison_markdown(record, _PLOT))
    plots.save(plots.differences(record, comparison_title(record)), root.path / _PLOT)
    return record
