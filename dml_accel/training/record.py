"""What a run leaves in its folder: its description, its records, its results, its peers."""

from typing import Any

from safetensors import SafetensorError

from dml_accel.core.files import write_text
from dml_accel.core.tables import results_markdown
from dml_accel.core.versions import commit, versions
from dml_accel.distributed.plan import predict, this_machine
from dml_accel.models.model_card import write_peer
from dml_accel.training import trackers
from dml_accel.training.agenda import evaluation_follows
from dml_accel.training.loop import EvaluationRecord, Record, StepRecord
from dml_accel.training.preparing import Prepared
from dml_accel.training.progress import Display, Window, Windows
from dml_accel.training.run_folder import RunFolder
from dml_accel.training.trackers import Trackers
from dml_accel.training.workload import images_of_a_step


class Recorder:
    """Turns the records of training into lines of metrics.jsonl and news for the display.

    Args:
        folder: an entered run folder; its records begin here.
        ready: what is trained.
        command: the command line, for the record.
        display: what shows the run, and has been told of it.
    """

    def __init__(self, folder: RunFolder, ready: Prepared, command: str, display: Display) -> None:
        self._folder, self._ready, self._display = folder, ready, display
        self._command = command
        images, step = len(ready.images.train), ready.start.step
        self._windows = Windows(ready.placement.names, images // ready.config.batch_size)
        known = step if ready.goes_on else None
        folder.begin(known, evaluation_follows(ready.config, images, step))
        folder.write("config.json", description(ready, command))
        self._told = Trackers(
            trackers.check(ready.config.log_with), folder.path, ready.config.as_dict(), known
        )
        folder.tell(self._told)
        event = "resume" if ready.goes_on else "start"
        folder.event(event, step, step // self._windows.steps_per_epoch)

    def take(self, record: Record) -> None:
        """Take the next record of training."""
        if isinstance(record, StepRecord):
            window = self._windows.add(record)
            self._display.step(window)
            if window is not None:
                self._event(window)
            return
        if isinstance(record, EvaluationRecord):
            scores = {"test": record.test, "val": record.val}
            self._folder.event("eval", record.step, record.epoch, **scores)
            self._display.evaluation(record)
        self._windows.restart_clock()

    def _event(self, window: Window) -> None:
        self._folder.event(
            "step",
            window.last.step,
            window.last.epoch,
            lr=window.last.lr,
            steps=window.steps,
            seconds=round(window.seconds, 6),
            peers=window.losses,
            **({"skipped": window.skipped} if window.skipped else {}),
        )

    def stop(self, reason: str) -> None:
        """Record that training was stopped."""
        self._folder.status("stopped", reason)

    def end(self, last: EvaluationRecord) -> None:
        """Record that training has ended."""
        self._folder.event("end", last.step, last.epoch)
        self._display.end()

    def conclude(self, last: EvaluationRecord, memory: int) -> dict[str, Any]:
        """Write the results; return the content of results.json.

        Args:
            last: the last evaluation.
            memory: peak bytes of the process that needed most.
        """
        throughput = self._windows.throughput(images_of_a_step(self._ready.config))
        found = results(self._ready, last, throughput, memory)
        text = results_markdown(found, self._ready.config.as_dict(), self._command)
        write_text(self._folder.path / "results.md", text)
        self._told.text("results", text, last.step)
        self._folder.write("results.json", found)  # the last: it says that the run is done
        return found


def description(ready: Prepared, command: str) -> dict[str, Any]:
    """Return the content of config.json: what it takes to repeat the run."""
    checked, placement, images = ready.checked, ready.placement, ready.images
    return {
        "format": 1,
        "config": ready.config.as_dict(),
        "peers": [
            {"name": spec.name, "arch": spec.arch}
            | ({"start": checked.starts[spec.name]} if spec.name in checked.starts else {})
            for spec in checked.specs
        ],
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "teachers": checked.teachers,
        "classes": len(images.classes),
        "images": {"train": len(images.train), "test": len(images.test)},
        "versions": versions(),
        "command": command,
        "commit": commit(),
        "compiled": ready.compiled,
    }


def results(
    ready: Prepared, last: EvaluationRecord, throughput: dict[str, float | None], memory: int
) -> dict[str, Any]:
    """Return the content of results.json; shares are fractions, NLL in nats, memory in bytes."""
    config, placement = ready.config, ready.placement
    return {
        "format": 1,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": last.step,
        "device": str(placement.device),
        "mixed_precision": placement.processes.mixed_precision,
        "world_size": placement.processes.world_size,
        "placement": {"kind": placement.kind, "ranks": placement.ranks},
        "peers": [
            {
                "name": spec.name,
                "arch": spec.arch,
                "params": ready.parameters[spec.name],
                "test": last.test["peers"][spec.name],
                "val": last.val["peers"][spec.name] if last.val else None,
            }
            for spec in ready.checked.specs
        ],
        "ensemble": last.test["ensemble"],
        "agreement": last.test["agreement"],
        "throughput": throughput,
        "peak_memory_bytes": memory,
        "versions": versions(),
        "sent_bytes_per_step": _sent(ready),
    }


def _sent(ready: Prepared) -> list[float]:
    """Return the payload bytes that each process sends in a step, as predicted."""
    if ready.placement.processes.world_size == 1:
        return [0.0]
    classes, costs = len(ready.images.classes), ready.checked.costs
    return predict(ready.placement.ranks, costs, ready.config, classes, this_machine()).sent


def write_peers(ready: Prepared, last: EvaluationRecord) -> OSError | None:
    """Write the folders of the peers that this process leads; return what prevented it."""
    archs = {name: folder.arch for name, folder in ready.checked.frozen.items()}
    for peer in filter(lambda peer: ready.placement.leads(peer.name), ready.peers):
        teachers = ready.teaching.teachers_of(peer.name)
        folder = ready.path / "peers" / peer.name
        try:
            write_peer(
                folder,
                peer,
                last.test["peers"][peer.name],
                classes=ready.images.classes,
                normalisation=ready.images.normalisation,
                image_size=ready.config.image_size,
                dataset=ready.config.dataset,
                steps=last.step,
                taught_by=[archs.get(name, name) for name in teachers],
                distilled=set(teachers) <= archs.keys(),
            )
        except OSError as error:
            return error
        except SafetensorError as error:  # the format's own, a full disk among them
            return OSError(f"{folder} cannot be written: {error}")
    return None
