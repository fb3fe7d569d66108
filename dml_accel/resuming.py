"""What a run goes on from, and how its processes keep what it needs to go on.

A checkpoint is verified, and its configuration compared, before anything of the run is touched. It
is written by all processes together, or by none.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml_accel import checkpoint
from dml_accel.checking import Checked
from dml_accel.checkpoint import CheckpointError
from dml_accel.cohort import Peer
from dml_accel.config import Config, UsageError
from dml_accel.engine import CheckpointRecord, Start
from dml_accel.launching import launched_precision, restarts
from dml_accel.placement import Placement
from dml_accel.processes import Processes
from dml_accel.provenance import versions
from dml_accel.runfolder import is_done, saved_config, saved_status

CHECKPOINTS = "checkpoints"
# What a run adds to a checkpoint's state.json, with the kind of each value.
_STATE = {
    "config": dict,
    "lost": dict,
    "world_size": int,
    "placement": dict,
    "versions": dict,
    "mixed_precision": str,
    "images": int,
    "classes": int,
    "teachers": dict,
    "compiled": list,
    "starts": dict,
}


class NotKeptError(RuntimeError):
    """A checkpoint could not be written; the text says why and what there is.

    Attributes:
        speaks: whether it is this process that could not.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        path: the checkpoint; None where it begins untrained.
        state: the content of its state.json.
    """

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def start(self, checkpoints: Path) -> Start:
        """Return what the peers have behind them, for a run that keeps its own in a folder."""
        if not self.path:
            return Start()
        here = self.path.resolve().parent == checkpoints.resolve()
        return Start(self.state["step"], self.state["lost"], here)

    def ranks(self, config: Config, world_size: int) -> dict[str, list[int]] | None:
        """Return the placement of the checkpoint where this run may have the same."""
        if not self.path or self.state["world_size"] != world_size:
            return None
        placement = self.state["placement"]
        known = config.placement in ("auto", placement["kind"])
        return dict(placement["ranks"]) if known else None

    def compiled(self, config: Config, world_size: int) -> list[str] | None:
        """Return which peers were compiled where this run is to do as it did."""
        if self.ranks(config, world_size) is None:
            return None
        same = self.state["config"].get("compile", "off") == config.compile
        return list(self.state["compiled"]) if same else None

    def agreed(self, processes: Processes) -> "Origin":
        """Return rank 0's origin in every process."""
        text = processes.text_of_first(json.dumps([str(self.path or ""), self.state]))
        path, state = json.loads(text)
        return Origin(Path(path) if path else None, state)


def continues_in_place(config: Config) -> bool:
    """Whether the run goes on in the folder that ``--output-dir`` names."""
    if config.resume in (None, "auto") or config.output_dir is None:
        return config.resume == "auto"
    given, folder = Path(str(config.resume)).resolve(), Path(config.output_dir).resolve()
    return given == folder or given.parent == folder / CHECKPOINTS


def has_checkpoint(config: Config) -> bool:
    """Whether ``--resume`` leads to a checkpoint, good or not: then no peer starts anew."""
    if config.resume is None:
        return False
    given = Path(str(config.output_dir if config.resume == "auto" else config.resume))
    return checkpoint.is_named(given) or bool(checkpoint.named(given / CHECKPOINTS))


def nothing_to_do(config: Config, path: Path, steps: int) -> str:
    """Say why ``--resume auto`` finds nothing to do in the run folder; empty where it does.

    Args:
        config: the run that is asked for.
        path: its folder.
        steps: how many optimizer steps it has.

    Raises:
        UsageError: the run in the folder is finished, but was another one.
    """
    if config.resume != "auto":
        return ""
    if restarts() and saved_status(path) == "stopped":
        return f"{path} was stopped on request; --resume auto goes on with it"
    newest = next(filter(_is_readable, checkpoint.named(path / CHECKPOINTS)), None)
    if newest and checkpoint.step_of(newest) > steps:
        _refuse(path, config.differences_from_start(saved_config(path)))
        return f"{path} has gone on to {newest.name}, past the {steps} steps asked for"
    if not is_done(path):
        return ""
    taken = json.loads((path / "results.json").read_text())["steps"]
    if taken < steps:
        return ""
    _refuse(path, config.differences_from_start(saved_config(path)))
    return f"{path} has taken all of its {taken} steps: nothing to do"


def _is_readable(path: Path) -> bool:
    try:
        checkpoint.read_state(path)
    except CheckpointError:
        return False
    return True


def find(config: Config, checked: Checked) -> Origin:
    """Return what ``--resume`` says to go on from; nothing has been touched.

    A damaged checkpoint is skipped with a warning that names it, where the choice is ours.

    Args:
        config: the run; ``output_dir`` names its folder where ``resume`` is ``auto``.
        checked: its peers, images and teachers.

    Raises:
        UsageError: there are checkpoints but none is good, the given one is not, or it belongs to
            a run of another configuration.
    """
    if config.resume is None:
        return Origin()
    peers = checked.names
    auto = config.resume == "auto"
    given = Path(str(config.output_dir if auto else config.resume))
    if auto:
        _refuse_another_start(config, given)
    if checkpoint.is_named(given):
        origin = _read(given, peers)
        if continues_in_place(config):
            _refuse_newer(given, peers)
    else:
        root = given / CHECKPOINTS
        found = checkpoint.named(root)
        if not (auto or found):
            raise UsageError(f"--resume {given} is no checkpoint, and there is none in {root}")
        begun_from = None
        if not found and (given / "config.json").exists():
            begun_from = saved_config(given).resume
        if begun_from not in (None, "auto"):
            raise UsageError(
                f"--output-dir {given} was begun from {begun_from} and has no checkpoint of its "
                f"own yet; --resume {begun_from} into another folder"
            )
        if not found and is_done(given):
            raise UsageError(
                f"--output-dir {given} holds a finished run without a checkpoint to go on from; "
                "name another folder"
            )
        origin = _newest_good(found, peers)
    if origin.path:
        _refuse_another_run(config, checked, origin)
    return origin


def _refuse_another_start(config: Config, given: Path) -> None:
    """Compare with the config.json of the run: it tells more than peers that are not found."""
    try:
        saved = saved_config(given)
    except UsageError:
        return  # not there, or damaged: each checkpoint has the configuration, too
    wrong = config.differences_from_start(saved)
    wrong.pop("mixed_precision", None)
    _refuse(given, wrong)


def _read(path: Path, peers: Sequence[str]) -> Origin:
    try:
        return _verified(path, peers)
    except CheckpointError as error:
        raise UsageError(f"{error}; --resume an older checkpoint, or start anew") from error


def _verified(path: Path, peers: Sequence[str]) -> Origin:
    placement = checkpoint.read_state(path).get("placement")
    others = placement.get("ranks") if isinstance(placement, dict) else None
    if isinstance(others, dict) and set(others) != set(peers):
        raise UsageError(
            f"{path} is of the peers {', '.join(others)}, and not of {', '.join(peers)}; repeat "
            "its --cohort"
        )
    state = checkpoint.verify(path, peers)
    state.setdefault("starts", {})  # older ones have none
    state.setdefault("compiled", [])  # by those that could not
    wrong = [name for name, kind in _STATE.items() if not isinstance(state.get(name), kind)]
    if not wrong:
        if not _is_a_placement(state["placement"].get("ranks"), state["world_size"], peers):
            wrong.append("placement")
        counts = state["lost"].values()
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            wrong.append("lost")
    if wrong:
        raise CheckpointError(f"{path / 'state.json'} does not say {', '.join(wrong)} as it should")
    return Origin(path, state)


def _is_a_placement(ranks: Any, world_size: int, peers: Sequence[str]) -> bool:
    """Whether every peer has processes, and every process a peer."""
    if not isinstance(ranks, dict) or set(ranks) != set(peers):
        return False
    if not all(isinstance(held, list) and held for held in ranks.values()):
        return False
    used = {rank for held in ranks.values() for rank in held if isinstance(rank, int)}
    # Counted, and not compared with a range: a forged number of processes may be any.
    return len(used) == world_size and min(used) == 0 and max(used) == world_size - 1


def _newest_good(found: Sequence[Path], peers: Sequence[str]) -> Origin:
    damage = ""
    for path in found:
        try:
            return _verified(path, peers)
        except CheckpointError as error:
            damage = damage or str(error)
            print(f"warning: {error}; {path.name} is skipped", file=sys.stderr, flush=True)
    if found:
        raise UsageError(
            f"{damage}; no checkpoint in {found[0].parent} is good: to start anew, name another "
            "--output-dir"
        )
    return Origin()


def _refuse_newer(given: Path, peers: Sequence[str]) -> None:
    for path in checkpoint.named(given.parent):
        if checkpoint.step_of(path) > checkpoint.step_of(given):
            try:
                _verified(path, peers)
            except CheckpointError:
                continue
            raise UsageError(
                f"--resume {given}: its run has gone on to {path.name}; name another --output-dir, "
                "or --resume auto"
            )


def _refuse_another_run(config: Config, checked: Checked, origin: Origin) -> None:
    saved = _saved_config(origin)
    wrong = config.differences_from_start(saved)
    wrong.pop("mixed_precision", None)  # where it is not given it is the launcher's
    ours, theirs = _beside_the_config(config, checked), origin.state
    wrong |= {
        name: (value, theirs.get(name)) for name, value in ours.items() if theirs.get(name) != value
    }
    _refuse(origin.path, wrong)
    now, made = versions(), origin.state["versions"]
    other = [f"{name} {version}" for name, version in made.items() if now.get(name) != version]
    if other:
        print(
            f"warning: {origin.path} was made with {', '.join(other)}: results may differ in the "
            "last bits",
            file=sys.stderr,
        )


def _refuse(path: Path | None, wrong: dict[str, tuple[Any, Any]]) -> None:
    if wrong:
        texts = [f"{name} {theirs} and not {ours}" for name, (ours, theirs) in wrong.items()]
        raise UsageError(
            f"{path} was made with {', '.join(texts)}; repeat its flags, or start anew in another "
            "--output-dir"
        )


def _saved_config(origin: Origin) -> Config:
    try:
        return Config.from_dict(origin.state["config"])
    except (UsageError, KeyError, TypeError) as error:
        raise UsageError(f"{origin.path} is of another version of dml_accel: {error}") from error


def _beside_the_config(config: Config, checked: Checked) -> dict[str, Any]:
    return {
        "mixed_precision": launched_precision(config),
        "images": len(checked.source.train),
        "classes": len(checked.source.classes),
        "teachers": checked.teachers,
    }


def with_starts(checked: Checked, origin: Origin) -> Checked:
    """Return what the peers started from once, where the run goes on from a checkpoint.

    Raises:
        UsageError: the checkpoint for which no weights to start from were read is gone.
    """
    if origin.path:
        return dataclasses.replace(checked, starts=origin.state["starts"])
    begun = checked.starts.keys()
    missing = [s.name for s in checked.specs if s.start is not None and s.name not in begun]
    if missing:
        raise UsageError(f"the checkpoint that holds {', '.join(missing)} is gone; start again")
    return checked


def load(origin: Origin, peers: Sequence[Peer], processes: Processes) -> None:
    """Set this process's peers to the checkpoint, in all processes or in none.

    Raises:
        UsageError: a process cannot read it.
    """
    if origin.path is None:
        return
    problem = None
    try:
        checkpoint.load_peers(origin.path, peers)
    except CheckpointError as error:
        problem = error
    bad = processes.largest(0 if problem is None else 1 + processes.rank)
    if bad:
        raise UsageError(
            str(problem or f"rank {bad - 1} cannot read {origin.path}")
            + "; all machines must share the folder"
        ) from problem


def keep(
    root: Path,
    record: CheckpointRecord,
    peers: Sequence[Peer],
    state: dict[str, Any],
    config: Config,
    placement: Placement,
) -> None:
    """Write one checkpoint from all processes; the older ones stay until it is complete.

    Args:
        root: the folder of checkpoints.
        record: the step, and what else is carried.
        peers: those trained here; each is written by its leader.
        state: what ``description`` returned.
        config: the run's.
        placement: who leads which peer.

    Raises:
        NotKeptError: it could not be written, in all processes; the last one is as it was.
    """
    first = placement.processes.rank == 0
    folder, step = checkpoint.unnamed(root, record.step), record.step
    state = state | {"lost": record.lost}

    def begin() -> None:
        if first:
            checkpoint.begin(root, step)

    def write() -> None:
        for peer in peers:
            if placement.leads(peer.name):
                checkpoint.write_peer(folder, peer)

    def finish() -> None:
        if first:
            # Written while a peer loses steps, on request, it replaces no sound one.
            most = config.keep_checkpoints if not any(record.lost.values()) else None
            checkpoint.finish(folder, placement.names, step, state, most)

    for part in (begin, write, finish):
        problem = None
        try:
            part()
        except OSError as error:
            problem = error
        # Also the wait for all processes to have done their part.
        failed = placement.processes.largest(0 if problem is None else 1 + placement.processes.rank)
        if failed:
            if first:
                checkpoint.abandon(root)
            last = next((path.name for path in checkpoint.named(root)), None)
            raise NotKeptError(
                f"the checkpoint of step {step} could not be written"
                f"{f': {problem}' if problem else f' by rank {failed - 1}'}; "
                f"{f'{last} is as it was' if last else 'there is none before it'}",
                speaks=problem is not None,
            ) from problem


def description(
    config: Config, checked: Checked, placement: Placement, compiled: list[str]
) -> dict[str, Any]:
    """Return what a checkpoint says about its run; ``compiled`` names its compiled peers."""
    return {
        "config": config.as_dict(),
        "world_size": placement.processes.world_size,
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "versions": versions(),
        "compiled": compiled,
        "starts": checked.starts,
        **_beside_the_config(config, checked),
    }
