"""The peers of a run as one of its checkpoints holds them, whether or not the run is finished."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dml_accel.core.config import Config
from dml_accel.core.errors import UnreadableError, UsageError, one_line
from dml_accel.core.files import parse_json, write_text
from dml_accel.core.host import expanded
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.data.selection import split_names
from dml_accel.inference.load import (
    BEST,
    EMA,
    LAST,
    TrainedPeers,
    lacks_weights,
    read_trained_peers,
)
from dml_accel.models.build import build, parameter_count
from dml_accel.models.model_card import model_card, public_name
from dml_accel.models.peer_folder import CARD, write_network
from dml_accel.models.spec import PeerSpec, parse_cohort
from dml_accel.models.timm_config import DEPTHS
from dml_accel.training import checkpoint, choosing
from dml_accel.training.loop import steps_to_take
from dml_accel.training.run_folder import CHECKPOINTS, SavedRun

LATEST = "latest"
_KINDS = dict(zip((LAST, EMA, BEST), checkpoint.KINDS, strict=True))
_LOOKS = 3  # a run that goes on replaces its checkpoints


def read_checkpoint_peers(
    path: Path, asked: str, scratch: Path, weights: str = LAST
) -> TrainedPeers:
    """Read the peers of a run from a checkpoint.

    Args:
        path: of the run.
        asked: ``latest``, a step, or the name or path of one of the run's checkpoints.
        scratch: an empty folder, which receives the folders of the peers.
        weights: which weights, as ``--weights`` says.

    Raises:
        UsageError: this is not a run, or its checkpoint is missing, damaged or of another network,
            or does not have such weights.
    """
    saved = SavedRun(path)
    if not saved.has_description:
        raise UsageError(f"--checkpoint {asked}: {path} is not a run")
    description = saved.description
    config, root = saved.config, path / CHECKPOINTS
    named = checkpoint.named(root)
    if not named:
        raise UsageError(f"--checkpoint {asked}: {path} ({saved.state}) has no checkpoint yet")
    specs = parse_cohort(config.cohort)
    prepared = _prepared(path / "config.json", description, config)
    try:
        if asked == LATEST:
            chosen, state = _newest_good(root, specs)
        else:
            chosen = _named(path, asked, named)
            state = checkpoint.verify(chosen, [spec.name for spec in specs])
        events = _measured(path, chosen, state, specs, weights)
        peers = TrainedPeers(
            path,
            {},
            prepared.classes,
            prepared.geometry,
            config=description["config"],
            results=_results(state, specs, events),
            step=state["step"],
            note=_note(saved, config, description, chosen),
            weights=weights,
        )
        for spec in specs:
            _write(scratch / spec.name, spec, config, prepared, (chosen, state), events, peers)
    except UnreadableError as error:
        raise UsageError(f"{error}; name another --checkpoint") from error
    except OSError as error:
        raise UsageError(
            f"the networks of {chosen} cannot be written to {scratch} ({one_line(error)}): set "
            "TMPDIR to a folder with space"
        ) from error
    return dataclasses.replace(peers, folders=read_trained_peers(scratch).folders)


def _named(path: Path, asked: str, named: Sequence[Path]) -> Path:
    """Return the checkpoint of a run that a step, a name or a path stands for."""
    given = os.path.realpath(expanded(asked))  # not ``resolve``, which fails in a loop of links
    found = [
        one
        for one in named
        if asked in (str(checkpoint.step_of(one)), one.name) or given == os.path.realpath(one)
    ]
    if found:
        return found[0]
    steps = ", ".join(str(checkpoint.step_of(one)) for one in reversed(named))
    raise UsageError(
        f"--checkpoint {asked}: {path} has no such checkpoint; it has those of steps {steps}: name "
        f"a step, or {LATEST}"
    )


def _newest_good(root: Path, specs: Sequence[PeerSpec]) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint that is not damaged, and its state."""
    problem: UnreadableError | None = None
    tried: set[Path] = set()
    for _ in range(_LOOKS):
        for path in checkpoint.named(root):
            if path in tried:
                continue
            tried.add(path)
            try:
                return path, checkpoint.verify(path, [spec.name for spec in specs])
            except UnreadableError as error:
                problem = problem or error
                if path.exists():  # else the run has replaced it
                    print(f"warning: {error}; skipping {path.name}", file=sys.stderr, flush=True)
    raise UsageError(f"{problem}; no checkpoint in {root} is good")


def _note(saved: SavedRun, config: Config, description: dict[str, Any], chosen: Path) -> str:
    """Return which step this is, in words."""
    step = checkpoint.step_of(chosen)
    images = description.get("images")
    trained = images.get("train") if isinstance(images, dict) else None
    total = f" of {steps_to_take(config.optim, trained):,}" if isinstance(trained, int) else ""
    kind = "a finished run" if saved.is_done else "an unfinished run"
    return f"step {step:,}{total} of {kind} ({chosen.name})"


def _write(
    folder: Path,
    spec: PeerSpec,
    config: Config,
    prepared: "_Prepared",
    origin: tuple[Path, dict[str, Any]],
    evaluations: dict[str, Any],
    peers: TrainedPeers,
) -> None:
    """Write the folder of a peer, with the files that ``models.peer_folder`` reads."""
    net = build(
        spec,
        classes=len(prepared.classes),
        image_size=config.data.size,
        seed=config.seed,
        dtype=torch.float64 if config.numerics.float64 else torch.float32,
    )
    path, state = origin
    checkpoint.load_weights(path, state, spec.name, net, _KINDS[peers.weights])
    write_network(
        folder,
        net,
        spec,
        classes=prepared.classes,
        normalisation=prepared.normalisation,
        geometry=prepared.geometry,
        grey_bits=prepared.grey_bits,
    )
    dataset = public_name(config.data.dataset)
    card = model_card(
        spec.name,
        f"A `{spec.arch}` with {parameter_count(net):,} parameters, trained on `{dataset}`:\n"
        f"{peers.which}.",
        metrics=_of_peer(evaluations, "test", spec.name),
        dataset=dataset,
        geometry=prepared.geometry,
        steps=state[BEST][spec.name]["step"] if peers.weights == BEST else state["step"],
        split=split_names(config.data).test,
    )
    write_text(folder / CARD, str(card))


@dataclass(frozen=True)
class _Prepared:
    """How a run prepared its images, and what it called their classes."""

    classes: tuple[str, ...]
    normalisation: Normalisation
    grey_bits: int | None
    geometry: Geometry


def _prepared(path: Path, description: dict[str, Any], config: Config) -> _Prepared:
    """Return what a run recorded of its images.

    Args:
        path: of its config.json, for messages.
        description: the content of the file.
        config: the configuration in it.

    Raises:
        UsageError: an entry is missing, or is not what a run writes.
    """
    names, grey_bits = description.get("class_names"), description.get("grey_bits")
    if names is None:
        raise UsageError(
            "the run was started by a version that did not record its class names: finish it with "
            "--resume auto, which records them"
        )
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)) or not names:
        raise UsageError(f"{path}: class_names must be a list of names")
    if grey_bits is not None and (type(grey_bits) is not int or grey_bits not in DEPTHS):
        raise UsageError(
            f"{path}: grey_bits is {grey_bits!r}; it must be an integer from {DEPTHS[0]} to "
            f"{DEPTHS[-1]}"
        )
    found: Any = description.get("normalisation")
    try:
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
        good = len(mean) == len(std) == 3 and all(map(math.isfinite, mean))
        good = good and all(0 < value < math.inf for value in std)
    except (KeyError, TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise UsageError(
            f"{path}: normalisation is {found!r}; it must hold a mean and a std above 0 for each "
            "of three channels"
        )
    geometry = Geometry.of(config.data)
    if "crop_mode" not in description["config"]:  # of a version that always squashed
        geometry = Geometry(config.data.size, config.data.size, "squash")
    return _Prepared(tuple(names), Normalisation(mean, std), grey_bits, geometry)


# ---------------------------------------------------------------- what the run has measured


def _measured(
    path: Path, chosen: Path, state: dict[str, Any], specs: Sequence[PeerSpec], weights: str
) -> dict[str, Any]:
    """Return what is known of some weights of a checkpoint, as in an evaluation.

    Raises:
        UsageError: it has no such weights.
        UnreadableError: it is damaged.
    """
    names = [spec.name for spec in specs]
    wrong = choosing.wrong_state(state, names)
    if wrong:
        raise UnreadableError(f"{chosen / 'state.json'} has no valid {', '.join(wrong)}")
    if weights == BEST:
        best = state.get(BEST, {})
        if set(best) != set(names):
            raise lacks_weights(chosen, weights)
        splits = ("test", "val")
        return {split: {"peers": {n: best[n][split] for n in names}} for split in splits}
    evaluation = _evaluations(path, state["step"])
    if weights == LAST:
        return evaluation
    if not isinstance(state.get("config"), dict) or state["config"].get("ema") is None:
        raise lacks_weights(chosen, weights)
    averages = evaluation.get("ema")
    return averages if isinstance(averages, dict) else {}


def _evaluations(path: Path, step: int) -> dict[str, Any]:
    """Return the evaluation of a step in metrics.jsonl; empty if there is none."""
    found: dict[str, Any] = {}
    path /= "metrics.jsonl"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(UnreadableError):  # the run may be writing it
                record = parse_json(path, line)
                if (record.get("event"), record.get("step")) == ("eval", step):
                    found = record
    return found


def _of_peer(evaluation: dict[str, Any], split: str, name: str) -> dict[str, Any] | None:
    try:
        metrics = evaluation[split]["peers"][name]
        return dict(metrics) if {"n", "top1"} <= metrics.keys() else None
    except (KeyError, TypeError, AttributeError):
        return None


def _results(
    state: dict[str, Any], specs: Sequence[PeerSpec], evaluation: dict[str, Any]
) -> dict[str, Any]:
    """Return what stands in for the results.json of the run."""
    test = evaluation.get("test")
    return {
        "mixed_precision": state.get("mixed_precision"),
        "steps": state["step"],
        "peers": [
            {"name": spec.name, "arch": spec.arch}
            | {split: _of_peer(evaluation, split, spec.name) for split in ("test", "val")}
            for spec in specs
        ],
        "ensemble": test.get("ensemble") if isinstance(test, dict) else None,
    }
