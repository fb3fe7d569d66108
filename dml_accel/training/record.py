"""What a run writes to its folder: description, records, results and peers."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dml_accel.core.config import Config
from dml_accel.core.errors import one_line
from dml_accel.core.files import write_text
from dml_accel.core.tables import percent, render, results_table
from dml_accel.core.versions import commit, versions
from dml_accel.data.pixels import Geometry
from dml_accel.data.selection import SplitNames, split_names
from dml_accel.distributed.device import device_versions
from dml_accel.distributed.launch import own_processes
from dml_accel.distributed.plan import StepLoad, predict, this_machine
from dml_accel.models.model_card import training_text
from dml_accel.models.own_network import write_own
from dml_accel.models.peer_folder import write_peer
from dml_accel.mutual.peer import Peer
from dml_accel.training import trackers
from dml_accel.training.choosing import best_of
from dml_accel.training.loop import (
    EvaluationRecord,
    Record,
    StepRecord,
    begins_with_evaluation,
    steps_to_take,
)
from dml_accel.training.progress import Display, Window, Windows
from dml_accel.training.repeat import device_record, history
from dml_accel.training.run_folder import WEIGHTS, RunFolder
from dml_accel.training.setup import Prepared, layout_name
from dml_accel.training.trackers import Trackers


class Recorder:
    """Writes the records of training to metrics.jsonl, trackers and the display.

    All of them count epochs from 1, as people do; 0 is before the first step.

    Args:
        folder: an entered run folder, whose records are opened here.
        ready: what is trained.
        command: the command line, for the record.
        recipe: the name of the one behind the configuration; empty for none.
        display: shows the run, which has begun there; None shows nothing.
        about: what config.json says of its place in a comparison.
    """

    def __init__(
        self,
        folder: RunFolder,
        ready: Prepared,
        command: str,
        recipe: str,
        display: Display | None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._ready, self._display = folder, ready, display
        self._command = command
        config, step = ready.config, ready.start.step
        peers = ready.placement.names
        self._windows = Windows(peers, ready.cohort.steps_per_epoch)
        self._own_rates = any(config.optim.of_peer(one).lr != config.optim.lr for one in peers)
        self._own_rates |= any(peer.rates for peer in ready.cohort.peers)
        resumed = step if ready.resumes else None
        images = len(ready.images.train)
        again = begins_with_evaluation(config.optim, config.run, images, ready.start)
        folder.begin(resumed, again)
        description = run_description(ready, command, recipe)
        if about:
            description["comparison"] = dict(about)
        folder.write("config.json", description)
        names = trackers.resolve(config.run.log_with)
        self._trackers = Trackers(names, folder.path, config.as_dict(), resumed)
        folder.follow_with(self._trackers)
        event = "resume" if ready.resumes else "start"
        folder.event(event, step, -(-step // self._windows.steps_per_epoch))

    def take(self, record: Record) -> None:
        """Write the next record of training."""
        if isinstance(record, StepRecord):
            self._folder.has_taken(record.step)
            window = self._windows.add(record)
            if self._display:
                self._display.step(window)
            if window is not None:
                self._event(window)
            return
        if isinstance(record, EvaluationRecord):
            scores = {"test": record.test, "val": record.val}
            scores |= {} if record.ema is None else {"ema": record.ema}
            self._folder.event("eval", record.step, record.epoch + 1, **scores)
            if self._display:
                self._display.evaluation(record)
        self._windows.restart_clock()

    def _event(self, window: Window) -> None:
        self._folder.event(
            "step",
            window.last.step,
            window.last.epoch + 1,
            lr=window.last.lr,
            steps=window.steps,
            seconds=round(window.seconds, 6),
            peers=window.losses,
            **({"skipped": window.skipped} if window.skipped else {}),
            **({} if window.waiting is None else {"waiting": round(window.waiting, 4)}),
            **({"lrs": dict(window.last.lrs)} if self._own_rates else {}),
        )

    def stop(self, reason: str) -> None:
        """Record that training was stopped, and why."""
        self._folder.status("stopped", reason)

    def end(self, last: EvaluationRecord) -> None:
        """Record that training has ended."""
        self._folder.event("end", last.step, last.epoch + 1)
        if self._display:
            self._display.end()

    def conclude(self, last: EvaluationRecord, memory: int) -> dict[str, Any]:
        """Write the results; return the content of results.json.

        Args:
            last: the last evaluation.
            memory: peak bytes of the process that needed the most.
        """
        config, cohort = self._ready.config, self._ready.cohort
        batches = config.method.schedule.batches_per_step(len(cohort.placement.names))
        throughput = self._windows.throughput(config.optim.batch_size * batches)
        content = results(self._ready, last, throughput, memory)
        try:
            text = results_markdown(content, config.data.dataset, self._command)
            write_text(self._folder.path / "results.md", text)
            self._trackers.text("results", text, last.step)
        except Exception as error:  # results must not be lost for a table of them
            print(f"warning: results.md cannot be written: {one_line(error)}", file=sys.stderr)
        self._folder.write("results.json", content)  # last, because it marks the run as done
        return content


def run_description(ready: Prepared, command: str, recipe: str = "") -> dict[str, Any]:
    """Return the content of config.json: what is needed to repeat the run.

    ``config`` is what was asked for, and ``resolved`` what that came to on this machine; of a run
    that resumes, ``earlier`` says how that differed for steps that had been taken before.
    """
    checked, placement, images = ready.checked, ready.placement, ready.images
    description = {
        "format": 1,
        "config": ready.config.as_dict(),
        "peers": [
            {"name": spec.name, "arch": spec.arch}
            | ({"start": checked.starts[spec.name]} if spec.name in checked.starts else {})
            for spec in checked.specs
        ],
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "teachers": checked.teachers,
        **({"registered": checked.registered} if checked.registered else {}),
        **checked.hub_commits,
        "classes": len(images.classes),
        "class_names": list(images.classes),
        "normalisation": dataclasses.asdict(images.normalisation),
        # Of batches to evaluate, nobody may know how many images they hold.
        "images": {"train": len(images.train), "test": len(images.test) or None},
        "data": checked.fingerprint,
        "grey_bits": checked.source.grey_bits,
        "versions": versions() | device_versions(placement.device),
        "resolved": _resolved(ready),
        "command": command,
        "recipe": recipe or None,
        "commit": commit(),
        "compiled": ready.compiled,
    }
    if checked.own:
        description["learn"] = {"images": checked.own.images, "facts": dict(checked.own.facts)}
    if ready.resumes:
        description |= history(ready.config, ready.path, ready.start.step, description)
    return description


def _resolved(ready: Prepared) -> dict[str, Any]:
    config, placement = ready.config, ready.placement
    processes = placement.processes
    return {
        "augment": list(config.data.augmentation),
        "threads": torch.get_num_threads(),
        "device": device_record(placement.device),
        "mixed_precision": processes.mixed_precision,
        "memory_format": layout_name(config, placement.device),
        "world_size": processes.world_size,
        "processes": own_processes(),
        "placement": placement.kind,
        "compile": "on" if ready.compiled else "off",
        "feed": ready.checked.source.feed[0],
    }


def results(
    ready: Prepared, last: EvaluationRecord, throughput: dict[str, float | None], memory: int
) -> dict[str, Any]:
    """Return the content of results.json: fractions in [0, 1], NLL in nats, memory in bytes."""
    config, placement = ready.config, ready.placement
    return {
        **_chosen(ready, last),
        "format": 1,
        "seed": config.seed,
        "epochs": config.optim.epochs,
        "steps": last.step,
        "device": str(placement.device),
        "mixed_precision": placement.processes.mixed_precision,
        "world_size": placement.processes.world_size,
        "processes": own_processes(),
        "threads": torch.get_num_threads(),
        "memory_format": layout_name(config, placement.device),
        "compiled": ready.compiled,
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "peers": [
            {
                "name": spec.name,
                "arch": spec.arch,
                "params": ready.parameters[spec.name],
                "test": last.test["peers"][spec.name],
                "val": last.val["peers"][spec.name] if last.val else None,
                **({"ema": _of_peer(last.ema, spec.name)} if last.ema else {}),
                **({"best": last.best[spec.name]} if last.best else {}),
            }
            for spec in ready.checked.specs
        ],
        "ensemble": last.test["ensemble"],
        "agreement": last.test["agreement"],
        "imbalance": last.test["imbalance"],
        "splits": _split_names(ready)._asdict(),
        "throughput": throughput,
        "peak_memory_bytes": memory,
        "versions": versions() | device_versions(placement.device),
        "sent_bytes_per_step": _sent(ready),
    }


def _split_names(ready: Prepared) -> SplitNames:
    return split_names(ready.config.data, ready.checked.source.val_name)


def stopped_early(ready: Prepared, last: EvaluationRecord) -> bool:
    """Whether training ended before its last step."""
    return last.step < steps_to_take(ready.config.optim, len(ready.images.train))


def _chosen(ready: Prepared, last: EvaluationRecord) -> dict[str, Any]:
    """Return what ``--ema``, ``--keep best`` and ``--early-stop`` add to the results, where on."""
    found: dict[str, Any] = {}
    if last.ema:
        found["ema_ensemble"] = last.ema["test"]["ensemble"]
    if last.best:
        name = best_of({name: one["val"] for name, one in last.best.items()})
        found["best"] = {"peer": name, **last.best[name]}
    if ready.config.optim.early_stop is not None:
        found["stopped_early"] = stopped_early(ready, last)
    return found


def _of_peer(splits: dict[str, Any], name: str) -> dict[str, Any]:
    return {split: found and found["peers"][name] for split, found in splits.items()}


def _sent(ready: Prepared) -> list[float]:
    """Return the predicted payload bytes that each process sends per step."""
    if ready.placement.processes.world_size == 1:
        return [0.0]
    if ready.checked.own:  # whose networks are not counted
        return []
    load = StepLoad.of(ready.config, len(ready.images.classes))
    return predict(ready.placement.ranks, ready.checked.costs, load, this_machine()).sent


def write_peers(ready: Prepared, last: EvaluationRecord) -> OSError | None:
    """Write the folders of the peers that this process leads; return the error, if there is one."""
    archs = {name: folder.arch for name, folder in ready.checked.frozen.items()}
    images, data = ready.images, ready.config.data
    training = training_text(ready.config.as_dict(), ready.checked.names, versions(), commit())
    for peer in filter(lambda peer: ready.placement.leads(peer.name), ready.cohort.peers):
        teachers = ready.cohort.teaching.teachers_of(peer.name)
        for kind, weights, metrics, steps, note in _written(ready.config, peer, last):
            folder = ready.path / kind / peer.name
            learned = [archs.get(name, name) for name in teachers]
            own = ready.checked.own
            try:
                if own is not None:
                    write_own(
                        folder,
                        peer.name,
                        own.networks[peer.name],
                        weights,
                        metrics=metrics,
                        images=own.images,
                        steps=steps,
                        teachers=learned,
                        note=note,
                    )
                    continue
                write_peer(
                    folder,
                    peer.module,
                    peer.spec,
                    metrics,
                    weights=weights,
                    classes=images.classes,
                    normalisation=images.normalisation,
                    geometry=Geometry.of(data),
                    dataset=data.dataset,
                    split=_split_names(ready).test,
                    grey_bits=ready.checked.source.grey_bits,
                    steps=steps,
                    teachers=learned,
                    distilled=set(teachers) <= archs.keys(),
                    note=note,
                    training=training,
                )
            except OSError as error:
                return error
            except Exception as error:  # safetensors and the card's template raise their own kinds
                return OSError(f"{folder} cannot be written: {error}")
    return None


_Written = tuple[str, Mapping[str, Tensor], dict[str, Any], int, str]


def _written(config: Config, peer: Peer, last: EvaluationRecord) -> Iterator[_Written]:
    """Yield which weights of a peer are written: folder, weights, test metrics, steps, note."""
    name, test = peer.name, last.test["peers"][peer.name]
    yield WEIGHTS["last"], peer.module.state_dict(), test, last.step, ""
    if peer.average is not None and last.ema:
        weights, test = peer.average.module.state_dict(), last.ema["test"]["peers"][name]
        yield WEIGHTS["ema"], weights, test, last.step, ema_note(config.optim.ema)
    if peer.best is not None and last.best:
        best = last.best[name]
        yield WEIGHTS["best"], peer.best, best["test"], best["step"], best_note(best)


def ema_note(decay: float | None) -> str:
    """Return what a model card says of averages."""
    return f"The weights are exponential moving averages (decay {decay}) over the training."


def best_note(best: Mapping[str, Any]) -> str:
    """Return what a model card says of the weights of a peer's best evaluation."""
    return (
        f"The weights are those after step {best['step']:,}, the best evaluation of this network "
        f"by validation ({percent(best['val']['top1'])}%)."
    )


def results_markdown(results: dict[str, Any], dataset: str, command: str) -> str:
    """Return results.md: the table, and what is needed to repeat it."""
    return render(
        Path(__file__).parent / "templates" / "results.md.j2",
        results=results,
        table=results_table(results, "github"),
        percent=percent,
        rate=results["throughput"]["images_per_second"],
        dataset=dataset,
        command=command,
    )
