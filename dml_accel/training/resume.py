"""What a run goes on from.

A checkpoint is verified, and its configuration compared, before anything of the run is touched.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, UsageError
from dml_accel.core.versions import versions
from dml_accel.distributed.launch import launched_precision, restarts
from dml_accel.training import checkpoint
from dml_accel.training.origin import Origin
from dml_accel.training.packing import CheckpointError
from dml_accel.training.saved import is_done, saved_config, saved_status
from dml_accel.training.setup import Checked

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
    ours, theirs = beside_the_config(config, checked), origin.state
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


def beside_the_config(config: Config, checked: Checked) -> dict[str, Any]:
    """Return what a run that goes on must have in common beside its configuration."""
    return {
        "mixed_precision": launched_precision(config),
        "images": len(checked.source.train),
        "classes": len(checked.source.classes),
        "teachers": checked.teachers,
    }
