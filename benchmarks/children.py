"""Processes that measure in turn: while one works, the others wait for their input."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.competitors import THREADS, Competitor
from benchmarks.measuring import HERE
from dml_accel.core.host import SPINS

_LEAD = 1  # steps before each block that are not timed: another process had the caches
_SECONDS_TO_END = 60


class ChildError(RuntimeError):
    """A competitor cannot be measured; the text is the last line that it printed."""


class Child:
    """A competitor's process, or the first of several.

    Args:
        competitor: what to measure.
        images: the folder of images, or None for noise.
        log: the file that it prints to.
    """

    def __init__(self, competitor: Competitor, images: str | None, log: Path) -> None:
        asked = {
            "kind": competitor.kind,
            "images": images,
            "options": competitor.options,
            "profiled": competitor.profiled,
            "beside": None,
        }
        if competitor.beside:
            beside = competitor.beside
            asked["beside"] = {"kind": beside.kind, "options": beside.options}
        folder = competitor.checkout or HERE.parent
        command = [sys.executable, *_launcher(competitor)]
        command += ["-m", "benchmarks.worker", json.dumps(asked)]
        environment = {
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": str(THREADS // competitor.processes),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no idle processes of the compiler
            # As our commands ask, and nobody else's.
            **({"GOMP_SPINCOUNT": SPINS} if competitor.kind == "training" else {}),
            **competitor.environment,
        }
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def answer(self) -> dict[str, Any]:
        """Return the next line that it answers.

        Raises:
            ChildError: it has ended instead.
        """
        assert self._process.stdout, "a pipe"
        line = self._process.stdout.readline()
        if not line:
            said = [text.strip() for text in self._log.read_text().splitlines() if text.strip()]
            errors = [text for text in said if "Error" in text]
            raise ChildError((errors or said or ["it said nothing"])[-1])
        found: dict[str, Any] = json.loads(line)
        return found

    def block(self, steps: int) -> dict[str, Any]:
        """Let it take some steps; return the seconds and the bytes of memory at its peak."""
        assert self._process.stdin, "a pipe"
        with contextlib.suppress(BrokenPipeError):  # its last words are in its log
            self._process.stdin.write(json.dumps({"lead": _LEAD, "steps": steps}) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin and self._process.stdout, "pipes"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _launcher(competitor: Competitor) -> list[str]:
    """Return the words that start several processes; none for a single one."""
    count = str(competitor.processes)
    if competitor.by_accelerate:
        options = ["--num_processes", count, "--main_process_port", "0"]
        file = str(HERE.parent / "launch" / "cpu_processes.yaml")
        return ["-m", "accelerate.commands.launch", "--config_file", file, *options]
    if competitor.processes > 1:
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    return []


def measure(
    competitors: Sequence[Competitor], images: str | None, blocks: int, steps: int, logs: Path
) -> Iterator[list[dict[str, Any]]]:
    """Measure all in alternating blocks; every other one in reverse, so that drift favours nobody.

    Args:
        competitors: of one part.
        images: the folder.
        blocks: how many of each.
        steps: of a block, times a competitor's own share.
        logs: folder of what they print.

    Yields:
        After each block all readings so far, a record for each competitor; one that cannot be
        measured has ``failed`` in it.
    """
    with contextlib.ExitStack() as stack:
        records: list[dict[str, Any]] = []
        running: dict[str, tuple[Child, dict[str, Any], dict[str, Any] | None]] = {}
        for place, one in enumerate(tqdm(competitors, "starting", disable=None)):
            record = _record(one, steps)
            beside = _record(one.beside, steps) if one.beside else None
            records += [record, beside] if beside else [record]
            child = Child(one, images, logs / f"{place}.log")
            stack.callback(child.close)
            try:
                # One after the other: two that start at once would look slow to start.
                record |= child.answer()
                running[one.name] = (child, record, beside)
            except ChildError as error:
                record["failed"] = str(error)
                print(f"{one.name} is left out: {error}", file=sys.stderr)
        for block in tqdm(range(blocks), "blocks", disable=None):
            for child, record, beside in list(running.values())[:: -1 if block % 2 else 1]:
                found = child.block(record["steps"])
                record["seconds"].append(found.pop("seconds"))
                if beside:
                    beside["seconds"].append(found.pop("beside_seconds"))
                record |= found
            yield records


def _record(one: Competitor, steps: int) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "options": one.options,
        "about": one.about,
        "processes": one.processes,
        "threads": THREADS // one.processes,
        "environment": one.environment,
        "steps": max(1, round(steps * one.share)),
        "seconds": [],
    }
