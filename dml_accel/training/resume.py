"""What a run resumes from: a checkpoint is verified, and compared, before the run is touched.

    find_origin      rank 0 finds and verifies the checkpoint, and compares configurations
    Origin.agreed    all processes learn which one it is
    load_peers       all of them load their peers from it, or none does

``train`` calls them in this order.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, differences_text, saved_config
from dml_accel.core.errors import UnreadableError, UsageError
from dml_accel.core.flags import Differences
from dml_accel.core.tables import printable
from dml_accel.core.versions import versions
from dml_accel.data.sources import Source
from dml_accel.distributed.device import device_versions, own_device
from dml_accel.distributed.launch import launched_precision, own_processes, restarts
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.processes import Processes
from dml_accel.mutual.peer import Peer
from dml_accel.training import checkpoint, choosing
from dml_accel.training.loop import Start
from dml_accel.training.run_folder import BAD_IMAGES, CHECKPOINTS, SavedRun
from dml_accel.training.setup import Checked, layout_name

LEARN = "learn"  # marks a run of ``learn``
# What a run adds to a checkpoint's state.json, with the type of each value.
_STATE_TYPES = {
    "config": dict,
    "lost": dict,
    "world_size": int,
    "processes": int,
    "placement": dict,
    "versions": dict,
    "mixed_precision": str,
    "images": int,
    "classes": int,
    "teachers": dict,
    "data": dict,
    "registered": dict,
    "compiled": list,
    "memory_format": str,
    "starts": dict,
}


@dataclass(frozen=True)
class Origin:
    """Where a run starts: untrained, or from a checkpoint.

    Attributes:
        path: of the checkpoint; None if the run starts untrained.
        state: the content of its state.json.
    """

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def start(self, checkpoints: Path) -> Start:
        """Return what the peers have behind them, for a run with its own folder of checkpoints."""
        if not self.path:
            return Start()
        # A run that continues another one's checkpoint has to write its own first.
        here = self.path.resolve().parent == checkpoints.resolve()
        chosen = {name: self.state[name] for name in choosing.STATE if name in self.state}
        return Start(self.state["step"], self.state["lost"], here, chosen)

    def ranks(self, placement: str, world_size: int) -> dict[str, list[int]] | None:
        """Return the placement of the checkpoint, if this run may use the same one.

        Args:
            placement: ``--placement`` of this run.
            world_size: processes of this run.
        """
        # The same map means the same order of sums, and so a result that is equal bit for bit.
        if not self.path or self.state["world_size"] != world_size:
            return None
        saved = self.state["placement"]
        return dict(saved["ranks"]) if placement in ("auto", saved["kind"]) else None

    def compiled(self, config: Config, world_size: int) -> list[str] | None:
        """Return which peers were compiled, if this run has to compile the same ones."""
        if self.ranks(config.compute.placement, world_size) is None:
            return None
        # Compiled kernels add up in another order, so a resumed run needs the same ones; but the
        # user may change the flag, and then another result in the last bits is asked for.
        asked = config.compute.compile
        same = asked in ("auto", self.state["config"].get("compile", "off"))
        return list(self.state["compiled"]) if same else None

    def with_memory_format(self, config: Config) -> Config:
        """Return the configuration with the memory format of the checkpoint, unless it names one.

        Networks of one layout add up in another order than those of the other.
        """
        if not self.path or config.compute.memory_format is not None:
            return config
        return config.changed(memory_format=self.state["memory_format"])

    def agreed(self, processes: Processes) -> "Origin":
        """Return rank 0's origin in every process."""
        # Rank 0 has verified it; others read the same file later, or say that they cannot.
        text = processes.broadcast_text(json.dumps([str(self.path or ""), self.state]))
        path, state = json.loads(text)
        return Origin(Path(path) if path else None, state)


# ---------------------------------------------------------------- finding a checkpoint


def resumes_in_place(config: Config) -> bool:
    """Whether the run continues in the folder that ``--output-dir`` names."""
    resume, output_dir = config.run.resume, config.run.output_dir
    if resume in (None, "auto") or output_dir is None:
        return resume == "auto"
    given, folder = Path(str(resume)).resolve(), Path(output_dir).resolve()
    return given == folder or given.parent == folder / CHECKPOINTS


def has_checkpoint(config: Config) -> bool:
    """Whether ``--resume`` leads to a checkpoint, good or not: no peer is untrained then."""
    if config.run.resume is None:
        return False
    given = _resumed_path(config)
    return checkpoint.is_named(given) or bool(checkpoint.named(given / CHECKPOINTS))


def recorded_processes(config: Config) -> int | None:
    """Return how many processes the command had started for the run that ``--resume`` leads to.

    1 for none; None where there is no checkpoint that can be read, so that the run starts.
    """
    if config.run.resume is None:
        return None
    given = _resumed_path(config)
    paths = [given] if checkpoint.is_named(given) else checkpoint.named(given / CHECKPOINTS)
    readable = next(filter(_is_readable, paths), None)
    return None if readable is None else recorded_count(checkpoint.read_state(readable))


def recorded_count(record: Mapping[str, Any]) -> int:
    """Return how many processes the command had started for a run, by what it has recorded."""
    count = record.get("processes", 1)  # absent from older ones
    return count if type(count) is int and count >= 1 else 1


def nothing_to_do(config: Config, source: Source, path: Path, steps: int) -> str:
    """Return why ``--resume auto`` has nothing to do in a run folder; empty if it has.

    Args:
        config: the run that is asked for.
        source: its images.
        path: its folder.
        steps: optimizer steps that it has in all.

    Raises:
        UsageError: the run in the folder is finished, but was started with other flags or images.
    """
    if config.run.resume != "auto":
        return ""
    saved = SavedRun(path)
    # A launcher that restarts failed processes would undo a stop that the user asked for.
    if restarts() and saved.status == "stopped":
        return f"{path} was stopped on request; --resume auto resumes it"
    # A damaged newest checkpoint proves nothing about how far the run has come.
    newest = next(filter(_is_readable, checkpoint.named(path / CHECKPOINTS)), None)
    if newest and checkpoint.step_of(newest) > steps:
        _refuse(path, _compared_by_flags(config.refused_on_resume(saved.config)), config)
        refuse_other_source(path, config, saved.description)
        return f"{path} has reached {newest.name}, beyond the {steps} steps asked for"
    # Compared only when the run is finished: else find_origin compares more than the flags.
    if not saved.is_done:
        return ""
    taken = saved.results.get("steps")
    if type(taken) is not int:
        raise UsageError(
            f"{path / 'results.json'} does not hold the results of a run: remove it, and --resume "
            "auto finishes the run from its newest checkpoint"
        )
    early = saved.results.get("stopped_early") is True
    if taken < steps and not early:
        return ""
    _refuse(path, _compared_by_flags(config.refused_on_resume(saved.config)), config)
    refuse_other_source(path, config, saved.description)
    refuse_other_images(saved, config, source)
    how = "stopped early after" if early else "taken all of its"
    return f"{path} has {how} {taken} steps: nothing to do"


def find_origin(config: Config, checked: Checked) -> Origin:
    """Return what ``--resume`` starts from; nothing is changed on the disk.

    A damaged checkpoint is skipped with a warning that names it, if the choice is ours.

    Args:
        config: the run; ``output_dir`` is its folder if ``resume`` is ``auto``.
        checked: its peers, images and teachers.

    Raises:
        UsageError: there are checkpoints but none is good, the given one is damaged, or it belongs
            to a run with another configuration.
    """
    if config.run.resume is None:
        return Origin()
    given, auto = _resumed_path(config), config.run.resume == "auto"
    if auto:
        # First, because "--lr 0.1, but now 0.2" tells more than whatever fails later.
        _refuse_other_flags(config, given)
    if checkpoint.is_named(given):
        origin = _read(given, checked.names)
        if resumes_in_place(config):
            _refuse_newer(given, checked.names)
    else:
        origin = _newest_of_run(given, auto, checked.names)
    if origin.path:
        _refuse_other_run(config, checked, origin)
    return origin


def _resumed_path(config: Config) -> Path:
    run = config.run
    return Path(str(run.output_dir if run.resume == "auto" else run.resume))


def _newest_of_run(given: Path, auto: bool, peers: Sequence[str]) -> Origin:
    """Return the newest good checkpoint of a run."""
    root, saved = given / CHECKPOINTS, SavedRun(given)
    checkpoints = checkpoint.named(root)
    if not checkpoints:
        if not auto:
            raise UsageError(f"--resume {given} is not a checkpoint, and {root} has none")
        # The run was killed before its first checkpoint: where did it start from?
        source = saved.config.run.resume if saved.has_description else None
        if source not in (None, "auto"):
            raise UsageError(
                f"--output-dir {given} was started from {source} and has no checkpoint of its own "
                f"yet; use --resume {source} with another folder"
            )
        if saved.is_done:
            raise UsageError(
                f"--output-dir {given} holds a finished run without a checkpoint to resume from; "
                "name another folder"
            )
    return _newest_good(checkpoints, peers)


def _newest_good(checkpoints: Sequence[Path], peers: Sequence[str]) -> Origin:
    damage = ""  # of the newest one, for the message if none is good
    for path in checkpoints:
        try:
            return _verified(path, peers)
        except UnreadableError as error:
            damage = damage or str(error)
            print(f"warning: {error}; skipping {path.name}", file=sys.stderr, flush=True)
    if checkpoints:
        raise UsageError(
            f"{damage}; no checkpoint in {checkpoints[0].parent} is good: to start again, name "
            "another --output-dir"
        )
    return Origin()


def _is_readable(path: Path) -> bool:
    try:
        checkpoint.read_state(path)
    except UnreadableError:
        return False
    return True


# ---------------------------------------------------------------- reading a checkpoint


def _read(path: Path, peers: Sequence[str]) -> Origin:
    try:
        return _verified(path, peers)
    except UnreadableError as error:
        raise UsageError(f"{error}; --resume an older checkpoint, or start again") from error


def _verified(path: Path, peers: Sequence[str]) -> Origin:
    # Before the sha256 of large files: another cohort is the user's mistake, not damage.
    placement = checkpoint.read_state(path).get("placement")
    others = placement.get("ranks") if isinstance(placement, dict) else None
    if isinstance(others, dict) and set(others) != set(peers):
        raise UsageError(
            f"{path} has the peers {', '.join(others)}, not {', '.join(peers)}; use the same "
            "--cohort"
        )
    state = checkpoint.verify(path, peers)
    state.setdefault("starts", {})  # absent from older checkpoints
    state.setdefault("compiled", [])
    state.setdefault("processes", 1)
    state.setdefault("memory_format", _earlier_memory_format(state))
    state.setdefault("data", {})
    state.setdefault("registered", {})  # also absent where nothing is
    # An untrusted file can have a matching sha256 as well, so every type is checked.
    wrong = [name for name, kind in _STATE_TYPES.items() if not isinstance(state.get(name), kind)]
    if not wrong:
        if not is_a_placement(state["placement"].get("ranks"), state["world_size"], peers):
            wrong.append("placement")
        if state["memory_format"] not in ("contiguous", "channels_last"):
            wrong.append("memory_format")
        counts = state["lost"].values()
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            wrong.append("lost")
        wrong += choosing.wrong_state(state, peers)
    if wrong:
        raise UnreadableError(f"{path / 'state.json'} has no valid {', '.join(wrong)}")
    return Origin(path, state)


def is_a_placement(ranks: Any, world_size: int, peers: Sequence[str]) -> bool:
    """Whether a map read from a file gives every peer processes, as ``Placement`` needs them."""
    if not isinstance(ranks, dict) or set(ranks) != set(peers):
        return False
    if not all(isinstance(held, list) and held for held in ranks.values()):
        return False
    if not all(type(rank) is int for held in ranks.values() for rank in held):
        return False
    groups = {tuple(held) for held in ranks.values()}
    used = [rank for group in sorted(groups) for rank in group]
    # Counted, not compared with a range of it: a forged number of processes may have any size.
    return len(used) == world_size and used == list(range(len(used)))


# ---------------------------------------------------------------- refusing another run


def _refuse_other_flags(config: Config, given: Path) -> None:
    """Compare with the config.json of the run, which tells more than peers that are missing."""
    try:
        saved = SavedRun(given).config
    except UsageError:
        return  # missing or damaged: each checkpoint holds the configuration as well
    _refuse(given, _compared_by_flags(config.refused_on_resume(saved)), config)


def _refuse_newer(given: Path, peers: Sequence[str]) -> None:
    for path in checkpoint.named(given.parent):
        if checkpoint.step_of(path) > checkpoint.step_of(given):
            try:
                _verified(path, peers)
            except UnreadableError:
                continue
            raise UsageError(
                f"--resume {given}: its run has already reached {path.name}; name another "
                "--output-dir, or use --resume auto"
            )


def _refuse_other_run(config: Config, checked: Checked, origin: Origin) -> None:
    try:
        saved = saved_config(origin.state)
    except (UsageError, TypeError) as error:
        raise UsageError(f"{origin.path} was written by another version: {error}") from error
    if bool(origin.state.get(LEARN)) != (checked.own is not None):
        maker = "learn" if origin.state.get(LEARN) else "train"
        raise UsageError(f"{origin.path} is of a run of {maker}, which alone can resume it")
    _refuse(origin.path, _compared_by_flags(config.refused_on_resume(saved)), config)
    refuse_other_source(origin.path, config, origin.state)
    _refuse_images(origin.path, config, checked.source, saved, origin.state["data"])
    ours, theirs = run_facts(config, checked), origin.state
    # Files that flags name may have changed although the flags have not.
    wrong = {
        name: (value, theirs.get(name)) for name, value in ours.items() if theirs.get(name) != value
    }
    _refuse(origin.path, wrong)
    # Others only warn: a cluster may have been updated, or have GPUs of several kinds.
    now = versions() | device_versions(own_device(config.compute))
    then = {"numpy": now["numpy"]} | origin.state["versions"]  # older ones do not say it
    other = [
        f"{name} {then.get(name) or 'none'}, now {now.get(name) or 'none'}"
        for name in then | now
        if then.get(name) != now.get(name)
    ]
    if other:
        print(
            f"warning: {origin.path} was written with {'; '.join(other)}: results may differ in "
            "the last bits",
            file=sys.stderr,
        )


def refuse_other_source(path: Path | None, config: Config, saved: Mapping[str, Any]) -> None:
    """Refuse a divergence or target of the user's whose source has changed since a run began.

    Args:
        path: of the run or its checkpoint.
        config: of this command.
        saved: what it has recorded.

    Raises:
        UsageError: the text says what has changed.
    """
    changed = changed_sources(config.method.registered, saved)
    if changed:
        raise UsageError(
            f"{path} was started with another source of {' and '.join(changed)}: restore it, or "
            "use a new --output-dir"
        )


def changed_sources(ours: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return in words what has another source than a run has recorded, with both hashes.

    Args:
        ours: ``registered`` of this command.
        saved: what the run has recorded.
    """
    found = saved.get("registered")
    theirs = found if isinstance(found, dict) else {}
    return [
        f"--{flag} {_name(ours.get(flag) or theirs.get(flag))} (sha256 "
        f"{_short(theirs.get(flag))}, now {_short(ours.get(flag))})"
        for flag in ("divergence", "target")
        if ours.get(flag) != theirs.get(flag)
    ]


def _name(record: Any) -> str:
    return printable(str(record.get("name"))) if isinstance(record, dict) else ""


def _short(record: Any) -> str:
    found = record.get("sha256") if isinstance(record, dict) else None
    return printable(str(found))[:12] if found else "none"


def refuse_other_images(saved: SavedRun, config: Config, source: Source) -> None:
    """Refuse images that differ from those that a saved run was trained on, wherever they lie.

    Raises:
        UsageError: the text says how they differ.
    """
    recorded = saved.description.get("data", {})
    _refuse_images(saved.path, config, source, saved.config, recorded)


def _refuse_images(
    path: Path | None, config: Config, source: Source, saved: Config, recorded: Any
) -> None:
    ours, theirs = config.data.dataset, saved.data.dataset
    if recorded and source.fingerprint:
        difference = source.fingerprint.difference(recorded)
    elif source.feed[0] == LEARN:
        return  # what can be told of a data set of the caller's is among the facts
    elif ours == theirs or os.path.realpath(ours) == os.path.realpath(theirs):
        print(
            f"warning: {path} does not record its images, so that they cannot be compared with "
            f"those of {ours}",
            file=sys.stderr,
        )
        return
    else:
        difference = "and it does not record its images, which could then be compared"
    if difference and path is not None and _was_damaged(path):
        difference += (
            f" (of images in {BAD_IMAGES}, a run resumes on the damaged files, with --bad-images "
            "skip, not on others in their place)"
        )
    if difference:
        named = f"--dataset {ours}" if ours == theirs else f"--dataset {ours}, not {theirs}"
        named = "those that are given now" if source.feed[0] == LEARN else named
        raise UsageError(
            f"{path} was started on other images than {named}: {difference}; restore them, or use "
            "a new --output-dir"
        )


def _was_damaged(path: Path) -> bool:
    """Whether the run of a folder, or of a checkpoint in it, has met images that are damaged."""
    return any((folder / BAD_IMAGES).exists() for folder in (path, path.parent.parent))


def _compared_by_flags(differences: Differences) -> Differences:
    """Leave out what ``run_facts`` compares: it is not the flag that says it."""
    found = dict(differences)
    found.pop("mixed_precision", None)  # if it is not given, the launcher decides
    if all(found.get("frozen_peers", ())):  # moved, perhaps
        found.pop("frozen_peers", None)
    return found


def _refuse(path: Path | None, wrong: Differences, config: Config | None = None) -> None:
    if wrong:
        why, optim = "", config.optim if config else None
        if optim and optim.depends_on_last_epoch and "epochs" in wrong:
            why = f" (--lr-schedule {optim.lr_schedule} ends with --epochs)"
        raise UsageError(
            f"{path} {differences_text(wrong)}{why}: use the same flags or a new --output-dir"
        )


def run_facts(config: Config, checked: Checked) -> dict[str, Any]:
    """Return what a resumed run must share, besides the flags."""
    return {
        "mixed_precision": launched_precision(config.numerics),
        "images": len(checked.source.train),
        "classes": len(checked.source.classes),
        "teachers": checked.teachers,
        **(checked.own.facts if checked.own else {}),
    }


# ---------------------------------------------------------------- loading and saving


def with_starts(checked: Checked, origin: Origin) -> Checked:
    """Return the run with what its peers once started from, if it resumes from a checkpoint.

    Raises:
        UsageError: there was a checkpoint, so no weights to start from were read; now it is gone.
    """
    if origin.path:
        return dataclasses.replace(checked, starts=origin.state["starts"])
    # ``check`` read no weights because --resume led to a checkpoint; somebody removed it since.
    read = checked.starts.keys()
    missing = [s.name for s in checked.specs if s.start is not None and s.name not in read]
    if missing:
        raise UsageError(f"the checkpoint that holds {', '.join(missing)} is gone; start again")
    return checked


def _earlier_memory_format(state: Mapping[str, Any]) -> str:
    """Return the memory format of a checkpoint that does not say it, because it is older."""
    config, used = state.get("config"), state.get("versions")
    asked = config.get("memory_format") if isinstance(config, dict) else None
    on_gpu = isinstance(used, dict) and "gpu" in used
    half = state.get("mixed_precision") == "bf16" and not on_gpu
    return str(asked or ("channels_last" if half else "contiguous"))


def load_peers(origin: Origin, peers: Sequence[Peer], processes: Processes) -> None:
    """Load this process's peers from the checkpoint, in all processes or in none.

    Raises:
        UsageError: a process cannot read it.
    """
    if origin.path is None:
        return
    problem = None
    try:
        checkpoint.load_peers(origin.path, peers)
    except UnreadableError as error:
        problem = error
    # All or none: a process that trained on alone would wait for the others until the timeout.
    first = processes.broadcast_text(str(problem or ""))
    if first:  # what rank 0 cannot load, no machine can
        raise UsageError(first) from problem
    failed = processes.failed_rank(problem is not None)
    if failed is not None:
        raise UsageError(
            str(problem or f"rank {failed} cannot read {origin.path}")
            + "; all machines must share the folder"
        ) from problem


def checkpoint_state(
    config: Config, checked: Checked, placement: Placement, compiled: list[str]
) -> dict[str, Any]:
    """Return what a checkpoint says about its run; ``compiled`` names its compiled peers."""
    return {
        "config": config.as_dict(),
        "world_size": placement.processes.world_size,
        "processes": own_processes(),
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "versions": versions() | device_versions(placement.device),
        "compiled": compiled,
        "memory_format": layout_name(config, placement.device),
        "starts": checked.starts,
        **({"registered": checked.registered} if checked.registered else {}),
        **run_facts(config, checked),
        "data": checked.fingerprint,
    }
