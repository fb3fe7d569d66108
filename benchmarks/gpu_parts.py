"""The parts of benchmarks.gpu; each runs in a process of its own, and leaves what it found.

    python -m benchmarks.gpu_parts part NUMBER FOLDER     one part; writes FOLDER/found.json
    torchrun ... -m benchmarks.gpu_parts rank FOLDER      one rank of part 11, on gloo

``DML_TEST_DEVICE`` says where: on ``cpu``, everything is smaller, and what needs a GPU is left out.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import register_model
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks import workloads
from benchmarks.gpu import FOUND, LOG
from benchmarks.measuring import HERE, device, synchronise, timed
from dml_accel import cli
from dml_accel.core.config import Config
from dml_accel.core.errors import one_line
from dml_accel.core.files import read_json, write_json
from dml_accel.data import sources
from dml_accel.data.batches import Normalisation
from dml_accel.distributed.device import device_versions
from dml_accel.models.peer_folder import write_peer
from dml_accel.models.spec import parse_cohort
from dml_accel.training.progress import forget_peak_memory, peak_memory
from dml_accel.training.setup import build_networks
from tests.helpers import Training, environment
from tests.kills import outcome

ON_CPU = device().type == "cpu"
ROOT = HERE.parent
WITHIN = 1e-9  # of 30 steps in double precision
NEEDS_A_GPU = "needs a GPU"


class SkippedError(Exception):
    """This check cannot be made here; the text says why."""


def require(holds: object, text: str) -> None:
    """Fail the check unless something holds."""
    if not holds:
        raise AssertionError(text)


class Checks:
    """The checks of a part, written to a file one by one: a crash or a hang leaves the others.

    Args:
        folder: of the part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Any] = {"running": None, "checks": []}

    def run(self, name: str, work: Callable[[], Any], *, on_gpu: bool = False) -> None:
        """Make a check: ``work`` raises what is wrong, and may return numbers for the report."""
        if on_gpu and ON_CPU:
            self._add(name, "skipped", NEEDS_A_GPU)
            return
        self._found["running"] = name
        write_json(self.folder / FOUND, self._found)
        started = time.perf_counter()
        try:
            numbers = work()
            self._add(name, "passed", "", started, numbers)
        except SkippedError as reason:
            self._add(name, "skipped", str(reason))
        except (Exception, SystemExit) as error:  # whatever it is, the other checks go on
            traceback.print_exc()
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            self._add(name, "failed", (kind + one_line(error))[:400], started)
        finally:
            # A process has a single precision and device for good, and each check its own.
            AcceleratorState._reset_state(reset_partial_state=True)
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()

    def _add(
        self, name: str, result: str, reason: str, started: float | None = None, numbers: Any = None
    ) -> None:
        seconds = 0.0 if started is None else round(time.perf_counter() - started, 2)
        found = {"name": name, "result": result, "reason": reason, "seconds": seconds}
        self._found["checks"].append(found | ({"numbers": numbers} if numbers else {}))
        self._found["running"] = None
        write_json(self.folder / FOUND, self._found)
        print(f"{name}: {result} {reason}", flush=True)


# ---------------------------------------------------------------- what parts share


def configuration(**changes: Any) -> Config:
    """Return a run of a small pair on made images."""
    settings = {"cohort": ("resnet8*2",), "dataset": "made", "image_size": 16, "batch_size": 16}
    return Config(**(settings | {"lr": 0.05, "cpu": ON_CPU} | changes))


def digits(folder: Path, steps: int, *words: str) -> list[str]:
    """Return the words that train a pair on scikit-learn's digits, in a folder."""
    if importlib.util.find_spec("sklearn") is None:
        raise SkippedError("needs scikit-learn, for its digits")
    given = "train --cohort resnet8*2 --dataset digits --image-size 16 --batch-size 8 --lr 0.05"
    where = ["--cpu"] if ON_CPU else []
    return [*given.split(), "--max-steps", str(steps), "--output-dir", str(folder), *where, *words]


def command(*words: str) -> tuple[int, str, str]:
    """Run a command of ours in this process; return exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    print(f"$ {' '.join(words)}\n{out.getvalue()}{err.getvalue()}exit code {code}", flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    return code, out.getvalue(), err.getvalue()


def succeed(*words: str) -> str:
    """Run a command that must end with 0; return its output."""
    code, out, err = command(*words)
    require(code == 0, f"{words[0]} ended with {code}: {err.strip().splitlines()[-1:]}")
    return out


def require_one_line(err: str, text: str) -> None:
    """Require a single error, of one line, that contains a text."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    require(len(errors) == 1 and text in errors[0], f"not one line with {text!r}: {err[-300:]}")
    require("Traceback" not in err, "there is a traceback")


def states_after(config: Config, steps: int) -> dict[str, Tensor]:
    """Train from the start; return parameters, buffers and momentum of all peers, on the CPU."""
    training = Training(config, workloads.read(config))
    training.take(steps)
    return flat_states(training)


def flat_states(training: Training) -> dict[str, Tensor]:
    """Return parameters, buffers and momentum of a process's peers, on the CPU."""
    return {
        f"{peer}/{name}": value.cpu().contiguous()
        for peer, state in training.states().items()
        for name, value in state.items()
    }


def require_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Require states within 1e-9 of each other."""
    require(one.keys() == other.keys(), "other tensors")
    apart = max(float((one[key].double() - other[key].double()).abs().max()) for key in one)
    require(apart <= WITHIN, f"differ by {apart:.1e}, more than {WITHIN:.0e}")
    return {"largest difference": apart}


def digest(states: dict[str, Tensor]) -> str:
    """Return the sha256 of states."""
    found = hashlib.sha256()
    for name in sorted(states):
        found.update(name.encode() + states[name].flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------- 1: the machine


def machine(checks: Checks) -> None:
    """The card, its memory and precisions, and what drives it."""
    checks.run("card", _card, on_gpu=True)
    checks.run("a product in double precision is the CPU's", _product, on_gpu=True)


def _card() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    versions = device_versions(torch.device("cuda", 0))
    unknown = [name for name, version in versions.items() if version is None]
    require(not unknown, f"the version of {', '.join(unknown)} cannot be told")
    gigabytes = {"memory GB": round(found.total_memory / 1e9, 1)}
    return {**versions, **gigabytes, "capability": f"{found.major}.{found.minor}"}


def _product() -> dict[str, float]:
    a, b = (torch.randn(256, 256, dtype=torch.float64) for _ in range(2))
    apart = float(((a.cuda() @ b.cuda()).cpu() - a @ b).abs().max())
    require(apart < 1e-11, f"differs by {apart:.1e}")
    return {"largest difference": apart}


# ---------------------------------------------------------------- 2: the commands


def commands(checks: Checks) -> None:
    """A digits pair: train, evaluate, export, predict."""
    run, exported = checks.folder / "run", checks.folder / "exported"
    checks.run("train", lambda: succeed(*digits(run, 40 if ON_CPU else 170)) and None)
    checks.run("evaluate equals results.json", lambda: _evaluate(run))
    checks.run("export", lambda: _export(run, exported))
    checks.run("predict", lambda: _predict(run, exported, checks.folder / "images"))


def _evaluate(run: Path) -> dict[str, float]:
    digits(run, 1)
    where = ["--cpu"] if ON_CPU else []
    succeed("evaluate", str(run), "--to", str(run / "evaluation"), *where)
    found, trained = read_json(run / "evaluation/evaluation.json"), read_json(run / "results.json")
    require(("cuda" in found["device"]) != ON_CPU, f"evaluated on {found['device']}")
    pairs = [(found["ensemble"], trained["ensemble"])]
    pairs += [(a["test"], b["test"]) for a, b in zip(found["peers"], trained["peers"], strict=True)]
    apart = max(abs(a[name] - b[name]) for a, b in pairs for name in ("top1", "nll", "ece"))
    require(apart < 1e-6, f"metrics differ by {apart:.1e}")
    return {"largest difference": apart, "top-1 of the ensemble": trained["ensemble"]["top1"]}


def _export(run: Path, exported: Path) -> None:
    digits(run, 1)
    succeed("export", str(run), "--peer", "resnet8-0", "--to", str(exported))
    require((exported / "model.safetensors").is_file(), "no weights were exported")


def _predict(run: Path, exported: Path, folder: Path) -> None:
    digits(run, 1)
    folder.mkdir()
    split = sources.read(configuration(dataset="digits").data).test
    for row in range(8):
        Image.fromarray(split.images[row].numpy()).save(folder / f"{row}.png")
    where = ["--cpu"] if ON_CPU else []
    for source in (run, exported):
        rows = succeed("predict", str(source), str(folder), *where).splitlines()
        require(len(rows) == 8, f"{len(rows)} predictions for 8 images")


# ---------------------------------------------------------------- 3: steps that wait for nothing

MODERN: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 0.002,
    "augment": ("crop-flip", "randaugment", "erasing"),
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.99,
    "teach_with": "ema",
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "fp64": {"float64": True},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "simultaneous": {},
    "low memory": {"low_memory": True},
    "sequential": {"update": "sequential"},
    "official": {"update": "official"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "links": {"links": "ring"},
    "links, sequential": {"links": "ring", "update": "sequential"},
    "labelled": {"labelled_fraction": 0.5},
    "accumulation": {"grad_accum": 2, "mixed_precision": "bf16"},
    "clipping": {"clip_norm": 1.0},
    "clipping, fp16": {"clip_norm": 1.0, "mixed_precision": "fp16"},
    "independent": {"kl_weight": 0.0},
    "mean-logit": {"target": "mean-logit", "temperature": 2.0},
    "AdamW": {"optimizer": "adamw"},
    "AdamW, fp16": {"optimizer": "adamw", "mixed_precision": "fp16"},
    "averages": {"ema": 0.99},
    "averages, fp16": {"ema": 0.99, "mixed_precision": "fp16"},
    "averages teach": {"ema": 0.99, "teach_with": "ema"},
    "mixed and smoothed": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "erasing": {"augment": ("crop-flip", "erasing")},
    "RandAugment": {"augment": ("crop-flip", "randaugment")},
    "channels_last, fp16": {"memory_format": "channels_last", "mixed_precision": "fp16"},
}


def steps(checks: Checks) -> None:
    """Every update schedule, precision and kind of teacher, while torch refuses to wait."""
    cases = {
        f"{schedule}, {precision}": SCHEDULES[schedule] | PRECISIONS[precision]
        for schedule in SCHEDULES
        for precision in PRECISIONS
    }
    cases |= OTHERS
    if not ON_CPU:
        cases["TF32"] = {"tf32": True}
    for name, changes in cases.items():
        on_gpu = changes.get("mixed_precision") == "fp16"
        checks.run(name, partial(_quiet_steps, changes), on_gpu=on_gpu)
    frozen = checks.folder / "frozen"
    for name, changes in {"frozen": {}, "frozen, bf16": PRECISIONS["bf16"]}.items():
        checks.run(name, partial(_steps_of_frozen, frozen, changes))


def _quiet_steps(changes: dict[str, Any]) -> None:
    config = configuration(**changes)
    training = Training(config, workloads.read(config))
    training.take(2)  # the epoch's order is copied to the device, and libraries are loaded
    before = flat_states(training)
    with _refusing_to_wait(training.placement.device):
        losses = training.take(3, start=2)
    require(all(one.isfinite().all() for one in losses), "a loss is not finite")
    after = flat_states(training)
    weights = [name for name in after if name.endswith("weight")]
    still = [name for name in weights if torch.equal(before[name], after[name])]
    require(len(still) < len(weights) / 2, f"{', '.join(still[:3])} and others do not move")


@contextlib.contextmanager
def _refusing_to_wait(where: torch.device) -> Iterator[None]:
    """Make torch raise where the host would wait for the GPU."""
    if where.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if where.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _steps_of_frozen(folder: Path, changes: dict[str, Any]) -> None:
    config = configuration(cohort=("wrn_16_2",))
    (spec,), source = parse_cohort(config.cohort), workloads.read(config)
    write_peer(
        folder,
        build_networks(config, [spec], len(source.classes))[spec.name],
        spec,
        {"top1": 0.0, "n": 1},
        classes=source.classes,
        normalisation=Normalisation((0.4,) * 3, (0.2,) * 3),  # not that of the run
        image_size=config.data.image_size,
        dataset="made",
        steps=0,
        teachers=[],
    )
    _quiet_steps({"frozen_peers": (str(folder),), "links": "frozen", **changes})


# ---------------------------------------------------------------- 4: as on the CPU


def as_on_the_cpu(checks: Checks) -> None:
    """Steps in double precision on the GPU and on the CPU; in a rehearsal, in two layouts."""
    count = 5 if ON_CPU else 30
    for name, changes in {"simultaneous": {}, "official": {"update": "official"}}.items():
        here = configuration(float64=True, **changes)
        there = here.changed(**({"memory_format": "channels_last"} if ON_CPU else {"cpu": True}))
        checks.run(name, partial(_compare, here, there, count))


def _compare(one: Config, other: Config, count: int) -> dict[str, float]:
    first = states_after(one, count)
    AcceleratorState._reset_state(reset_partial_state=True)
    return require_close(first, states_after(other, count))


# ---------------------------------------------------------------- 5: the same bits twice

_VIT = "timm:vit_tiny_patch16_224[img_size=32,patch_size=4,depth=4]"
REPEATED: dict[str, dict[str, Any]] = {
    **{name: PRECISIONS[name] for name in ("fp32", "bf16", "fp16")},
    "channels_last": {"memory_format": "channels_last"},
    "channels_last, bf16": {"memory_format": "channels_last", "mixed_precision": "bf16"},
    "mobilenet": {"cohort": ("mobilenet*2",)},
    "inception": {"cohort": ("inception*2",)},
    "a ViT": {"cohort": (f"{_VIT}*2",)},
    "a ViT, bf16": {"cohort": (f"{_VIT}*2",), "mixed_precision": "bf16"},
    "a modern recipe": MODERN,
    "a modern recipe, fp16": {**MODERN, "mixed_precision": "fp16"},
}


def twice(checks: Checks) -> None:
    """The same run twice: the same sha256 of all that it leaves."""
    for name, changes in REPEATED.items():
        on_gpu = changes.get("mixed_precision") == "fp16"
        checks.run(name, partial(_twice, changes), on_gpu=on_gpu)


def _twice(changes: dict[str, Any]) -> None:
    size = {"image_size": 32, "batch_size": 4 if ON_CPU else 16}
    config = configuration(**size, **changes)
    count, found = 2 if ON_CPU else 20, []
    for _ in range(2):
        found.append(digest(states_after(config, count)))
        AcceleratorState._reset_state(reset_partial_state=True)
    require(found[0] == found[1], f"after {count} steps the two runs differ")


# ---------------------------------------------------------------- 6: interruptions


def interruptions(checks: Checks) -> None:
    """SIGKILL and SIGUSR1 in the middle of an epoch, then --resume auto."""
    folder, count = checks.folder, 50 if ON_CPU else 350
    words = ("--save-every", "10", "--keep-checkpoints", "1")
    straight = folder / "straight"
    checks.run("uninterrupted", lambda: succeed(*digits(straight, count, *words)) and None)
    auto = (*words, "--resume", "auto")
    for name, interrupt in {"SIGKILL": _killed, "SIGUSR1": _stopped}.items():
        run = folder / name
        checks.run(name, partial(_resumed, interrupt, run, straight, count, auto))
    moved = folder / "moved"
    checks.run("CUDA to CPU", partial(_on_the_cpu, moved, count, auto), on_gpu=True)


def _resumed(
    interrupt: Callable[[list[str], Path], None],
    run: Path,
    straight: Path,
    count: int,
    words: tuple[str, ...],
) -> None:
    given = digits(run, count, *words)
    interrupt(given, run)
    require(not (run / "results.json").exists(), "the run had ended before the signal")
    succeed(*given)
    events = (run / "metrics.jsonl").read_text()
    require('"resume"' in events, "the run started again instead of resuming")
    require(outcome(run) == outcome(straight), "other bits than the uninterrupted run's")


def _killed(words: list[str], run: Path) -> None:
    process = subprocess.Popen([sys.executable, "train.py", *words[1:]], cwd=ROOT)
    try:
        _await_checkpoint(run, lambda: process.poll() is None)
    finally:
        process.kill()
        process.wait()


def _stopped(words: list[str], run: Path) -> None:
    def stop() -> None:
        _await_checkpoint(run, lambda: True)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=stop, daemon=True).start()
    code, _, _ = command(*words)
    require(code == 75, f"a stopped run ended with {code}, not 75")


def _await_checkpoint(run: Path, alive: Callable[[], bool]) -> None:
    while alive() and not list(run.glob("checkpoints/step-*")):
        time.sleep(0.005)


def _on_the_cpu(run: Path, count: int, words: tuple[str, ...]) -> None:
    succeed(*digits(run, 20, *words))
    succeed(*digits(run, 30, *words, "--cpu"))
    require(read_json(run / "results.json")["device"] == "cpu", "it did not resume on the CPU")


# ---------------------------------------------------------------- 7: numbers that are not finite


def overflow(checks: Checks) -> None:
    """The loss scalers of fp16, and a learning rate at which peers diverge."""
    checks.run("a huge scale skips the step and halves", _huge_scale, on_gpu=True)
    checks.run("--lr 1e6 names the peer", lambda: _diverge(checks.folder / "diverged"))


def _huge_scale() -> None:
    config = configuration(mixed_precision="fp16")
    training = Training(config, workloads.read(config))
    training.take(2)
    before, scale = flat_states(training), 2.0**100
    for peer in training.peers:
        peer.scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    training.take(1, start=2)
    scales = [peer.scaler.get_scale() for peer in training.peers]
    require(scales == [scale / 2] * len(scales), f"the scales are {scales}, not {scale / 2}")
    after = flat_states(training)
    # The loss itself is finite: what moves is running statistics, as in any step.
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    moved = [name for name in moved if "running" not in name and "num_batches" not in name]
    require(not moved, f"{', '.join(moved[:3])} moved in a step that was to be skipped")
    for peer in training.peers:
        peer.scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    training.take(1, start=3)
    later = flat_states(training)
    still = [n for n in later if n.endswith("weight") and torch.equal(after[n], later[n])]
    require(not still, f"{', '.join(still[:3])} did not move after it")


def _diverge(folder: Path) -> None:
    code, _, err = command(*digits(folder, 100, "--lr", "1e6"))
    require(code == 1, f"exit code {code}, not 1")
    require_one_line(err, "the loss of resnet8-")


# ---------------------------------------------------------------- 8: compiled networks


class _Small(nn.Module):
    """A network that compiles in seconds, for rehearsals."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to logits [B, C]."""
        return self.head(torch.relu(self.norm(self.body(x))).mean((2, 3)))


@register_model
def small_to_rehearse(pretrained: bool = False, num_classes: int = 10, **_: object) -> nn.Module:
    """Build it, for timm."""
    net = _Small(num_classes)
    net.pretrained_cfg = {"architecture": "small_to_rehearse"}
    return net


def compiled(checks: Checks) -> None:
    """Steps of compiled networks in double precision are the eager steps."""
    torch._logging.set_logs(perf_hints=True)  # where CUDA graphs are given up, it is said there
    cohort = ("timm:small_to_rehearse*2",) if ON_CPU else ("resnet8*2",)
    for mode in ("default", "reduce-overhead"):
        name = f"--compile-mode {mode}"
        checks.run(name, partial(_compiled, cohort, mode, checks.folder), on_gpu=mode != "default")


def _compiled(cohort: tuple[str, ...], mode: str, folder: Path) -> dict[str, float]:
    eager = configuration(cohort=cohort, float64=True)
    changed = eager.changed(compile="on", compile_mode=mode)
    found = _compare(eager, changed, 5 if ON_CPU else 30)
    sys.stderr.flush()
    log = folder / LOG
    said = log.read_text() if log.exists() else ""
    require("skipping cudagraphs" not in said, "torch says that it skips CUDA graphs")
    return found


# ---------------------------------------------------------------- 9: speed

_COMPILED = {"compile": "on"}
_GRAPHS = {"compile": "on", "compile_mode": "reduce-overhead"}
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "TF32": {"tf32": True},
    "bf16": PRECISIONS["bf16"],
    "compiled": _COMPILED,
    "CUDA graphs": _GRAPHS,
    "CUDA graphs, bf16": {**_GRAPHS, **PRECISIONS["bf16"]},
    "CUDA graphs, channels_last, bf16": {
        **_GRAPHS,
        "memory_format": "channels_last",
        **PRECISIONS["bf16"],
    },
    "channels_last, bf16": {"memory_format": "channels_last", **PRECISIONS["bf16"]},
    "fp16": PRECISIONS["fp16"],
    "low memory": {"low_memory": True},
    "sequential": {"update": "sequential"},
}
_ON_A_CPU = ("eager", "bf16", "low memory")
_PROFILED = 5  # steps


def speed(checks: Checks) -> None:
    """Images per second of four ResNet-32 in every mode, and how busy the GPU is."""
    for name, changes in MODES.items():
        checks.run(name, partial(_speed, changes), on_gpu=name not in _ON_A_CPU)


def _speed(changes: dict[str, Any]) -> dict[str, float]:
    cohort, count = (["resnet8*2"], 3) if ON_CPU else (["resnet32*4"], 200)
    started = time.perf_counter()
    take = workloads.training(None, cohort=cohort, **changes)
    take(3 if ON_CPU else 10)
    synchronise()
    ready = time.perf_counter() - started
    forget_peak_memory(device())
    each = timed(lambda: take(count)) / count
    found = {
        "ms per step": round(1e3 * each, 3),
        "images/s": round(workloads.BATCH / each, 1),
        "memory GB": round(peak_memory(device()) / 1e9, 3),
        "ready after s": round(ready, 1),
    }
    return found if ON_CPU else found | _busy(take, each)


def _busy(take: Callable[[int], None], seconds: float) -> dict[str, float]:
    """Return what a profile says of the GPU in one step, which takes ``seconds`` without it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        take(_PROFILED)
        synchronise()
    found = [
        event.time_range
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    microseconds, end = 0.0, 0.0
    for one in sorted(found, key=lambda one: one.start):  # kernels on several streams overlap
        microseconds += max(0.0, one.end - max(end, one.start))
        end = max(end, one.end)
    share = microseconds / 1e6 / _PROFILED / seconds
    return {"kernels per step": len(found) / _PROFILED, "GPU busy %": round(100 * share, 1)}


# ---------------------------------------------------------------- 10: refusals


def refusals(checks: Checks) -> None:
    """What cannot work ends with one line."""
    folder = checks.folder / "run"
    checks.run("out of memory", lambda: _out_of_memory(folder), on_gpu=True)
    checks.run("more processes than GPUs", lambda: _too_many(folder), on_gpu=True)
    checks.run("--tf32 with --cpu", lambda: _refused(folder, "--tf32", "--cpu"))


def _out_of_memory(folder: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 / total))
    words = ("--cohort", "resnet32*4", "--image-size", "32", "--batch-size", "1400")
    try:
        code, _, err = command(*digits(folder, 2, *words))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    require(code == 1, f"exit code {code}, not 1")
    require_one_line(err, "out of memory: --low-memory")


def _too_many(folder: Path) -> None:
    here = str(torch.cuda.device_count() + 1)
    launched = {
        "MASTER_ADDR": "127.0.0.1",
        "RANK": "0",
        "WORLD_SIZE": here,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": here,
        "TORCHELASTIC_RUN_ID": "none",
    }
    words = digits(folder, 2)
    with mock.patch.dict(os.environ, launched):
        code, _, err = command(*words)
    require(code == 2, f"exit code {code}, not 2")
    require_one_line(err, f"{here} processes on this machine but")


def _refused(folder: Path, *words: str) -> None:
    code, _, err = command(*digits(folder, 2, *words))
    require(code == 2, f"exit code {code}, not 2")
    require_one_line(err, words[0])


# ---------------------------------------------------------------- 11: two ranks on one GPU

RANKS: dict[str, dict[str, Any]] = {
    "replicate": {"placement": "replicate"},
    "split": {"placement": "split"},
    "split, sum": {"placement": "split", "exchange": "sum"},
}


def _of_ranks(changes: dict[str, Any]) -> tuple[Config, int]:
    return configuration(float64=True, batch_size=9, **changes), 5 if ON_CPU else 30


def ranks(checks: Checks) -> None:
    """Two processes on one GPU, which gloo allows: the steps of one process."""
    checks.run("launch", lambda: _launch(checks.folder))
    config, count = _of_ranks({})
    for name in RANKS:
        checks.run(name, partial(_as_one, checks.folder, name, config, count))


def _launch(folder: Path) -> None:
    words = "-m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.gpu_parts rank"
    variables = {} if ON_CPU else {"CUDA_VISIBLE_DEVICES": _first_gpu()}
    done = subprocess.run(
        [sys.executable, *words.split(), str(folder)], cwd=ROOT, env=environment(**variables)
    )
    require(done.returncode == 0, f"the launcher ended with {done.returncode}")


def _first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _as_one(folder: Path, name: str, config: Config, count: int) -> dict[str, float]:
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    if len(files) != 2:
        raise SkippedError("the processes left nothing")
    held = [load_file(file) for file in files]
    peers = [{key.split("/")[0] for key in states} for states in held]
    shared = "resnet8-0" in peers[0] and "resnet8-0" in peers[1]
    require(shared == (name == "replicate"), f"the ranks hold {peers}")
    one = states_after(config, count)
    found = [require_close(states, {key: one[key] for key in states}) for states in held]
    return max(found, key=lambda each: each["largest difference"])


def rank(folder: Path) -> None:
    """Train as one of two processes in a group of our own: the package would use NCCL."""
    if not ON_CPU:
        torch.cuda.set_device(0)
    dist.init_process_group("gloo")
    for name, changes in RANKS.items():
        config, count = _of_ranks(changes)
        AcceleratorState._reset_state()
        training = Training(config, workloads.read(config))
        training.take(count)
        save_file(flat_states(training), folder / f"{name}-{dist.get_rank()}.safetensors")
        training.placement.processes.stop_heartbeat()
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Part:
    """One item of the acceptance.

    Attributes:
        title: in the report.
        work: makes its checks.
        seconds: after which it is given up; several times what is expected.
    """

    title: str
    work: Callable[[Checks], None]
    seconds: float


PARTS: dict[int, Part] = {
    1: Part("card and versions", machine, 60),
    2: Part("train, evaluate, export, predict", commands, 90),
    3: Part("steps that wait for nothing", steps, 120),
    4: Part("fp64 steps as on the CPU", as_on_the_cpu, 60),
    5: Part("the same bits twice", twice, 120),
    6: Part("interrupted and resumed", interruptions, 120),
    7: Part("numbers that are not finite", overflow, 60),
    8: Part("compiled as eager", compiled, 180),
    9: Part("speed of four ResNet-32", speed, 480),
    10: Part("refusals", refusals, 60),
    11: Part("two ranks on one GPU", ranks, 90),
}


def main(kind: str, *words: str) -> None:
    """Run one part, or one rank of part 11."""
    if kind == "rank":
        rank(Path(words[0]))
        return
    number, folder = words
    if ON_CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    PARTS[int(number)].work(Checks(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
