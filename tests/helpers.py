"""What tests of several packages share: tiny runs, run folders, launched processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measuring import device
from dml_accel import cli
from dml_accel.core.config import Config
from dml_accel.data.images import Data
from dml_accel.data.sources import Source
from dml_accel.distributed.placement import Placement
from dml_accel.distributed.plan import allocate, everywhere
from dml_accel.distributed.processes import Processes
from dml_accel.models.pretrained import PretrainedWeights
from dml_accel.models.spec import PeerSpec, parse_cohort
from dml_accel.mutual.links import read_links
from dml_accel.mutual.step import Step, train_step
from dml_accel.mutual.teachers import read_teachers
from dml_accel.training import checkpoint
from dml_accel.training.setup import build_networks, make_cohort, prepare_images

ROOT = Path(__file__).parent.parent
# Seconds for a program to do what a test waits for: far more than it takes, for slow machines.
PATIENCE = 300.0
BIN = Path(sys.executable).parent
# Flags of a run of seconds, on real images that need no network.
DIGITS = "--dataset digits --image-size 8 --batch-size 8 --lr 0.05".split()
DIGITS += ["--cpu"] if device().type == "cpu" else []


def real_dataset() -> str:
    """What --dataset names: real CIFAR-100 images if there are some, else digits."""
    return os.environ.get("DML_TEST_DATA") or "digits"


def tiny_config(**changes: object) -> Config:
    """A run of seconds on digits, in double precision so that equality means something."""
    settings = {
        "cohort": ("resnet8*2",),
        "dataset": "digits",
        "image_size": 8,
        "batch_size": 8,
        "lr": 0.05,
        "max_steps": 3,
        "cpu": device().type == "cpu",
        "float64": True,
    }
    return Config(**(settings | changes))


def build_peer(
    spec: PeerSpec, config: Config, classes: int, weights: PretrainedWeights | None = None
) -> torch.nn.Module:
    """The network of a peer, as a run builds it: untrained, or with trained weights."""
    start = {spec.name: weights} if weights else {}
    return build_networks(config, [spec], classes, start)[spec.name]


# ---------------------------------------------------------------- run folders


def train(folder: Path, *words: str) -> int:
    """Train in this process as the command line does; return the exit code."""
    return cli.main(["train", *words, "--output-dir", str(folder)])


def load(path: Path) -> Any:
    """The content of a JSON file."""
    return _strict(path.read_text())


def status_of(folder: Path) -> dict[str, Any]:
    """The entries of a run's status.json that do not change with the time and place."""
    found = load(folder / "status.json")
    return {name: found[name] for name in ("status", "reason", "step")}


def events(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    return [_strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def saved_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    named = checkpoint.named(folder / "checkpoints")
    return [checkpoint.step_of(path) for path in reversed(named)]


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Every tensor equal, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- processes


def free_port(candidates: Iterable[int] = (0,)) -> int:
    """A port that nobody listens on, so that two runs of the tests do not meet; 0 is any port."""
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise OSError("all of the ports are taken")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without a launcher's variables: one thread, a free port."""
    # Commands that ran in this process have set how its threads wait.
    launcher = ("ACCELERATE_", "TORCHELASTIC_", "PET_", "GOMP_")
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    clean = {n: v for n, v in os.environ.items() if n not in names and not n.startswith(launcher)}
    # torchrun reads its port from here; accelerate launch does not (see ``accelerate_launch``).
    return clean | {"OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port())} | changes


def accelerate_launch(processes: int, *flags: object) -> list[str]:
    """Return the words that start several processes, on a port of their own (not 29500)."""
    # As ``accelerate launch``, which takes four seconds more to import its other commands.
    words = [BIN / "accelerate-launch", "--multi_gpu", "--num_processes", processes]
    return [str(word) for word in (*words, "--main_process_port", free_port(), *flags)]


def forked(processes: int, *words: object) -> list[str]:
    """Return the words that start a script in several processes without a launcher."""
    return [str(word) for word in (sys.executable, "tests/forked.py", processes, *words)]


@contextlib.contextmanager
def launched(*words: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program in the root of the project; at the end, none of its processes is left."""
    run = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        try:
            yield run
        finally:
            if run.poll() is None:
                end(run)


def end(run: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill a program and what it has started, which would go on alone; return what it printed."""
    if run.poll() is None:
        for child in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    try:
        return run.communicate(timeout=10)  # a script may have to clean up
    except subprocess.TimeoutExpired:
        run.kill()
        return run.communicate(timeout=10)


def wait_until(found: Callable[[], object], run: subprocess.Popen[str]) -> None:
    """Wait until a program has done something; fail if it ends before that."""
    until = time.monotonic() + PATIENCE
    while not found():
        code = run.poll()
        if code is not None or time.monotonic() > until:
            how = "it took too long" if code is None else f"it ended with exit code {code}"
            raise AssertionError(f"{how}: {end(run)}")
        time.sleep(0.02)


def run_program(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the root of the project and wait for it."""
    with launched(*words, **variables) as run:
        said, errors = run.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(run.args, run.returncode, said, errors)


def in_turn(
    launch: Iterable[object], folder: Path, runs: dict[str, list[str]]
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Train one run after another in the processes of one launch; each writes ``folder``/its name.

    Args:
        launch: the words that start the processes.
        folder: of the runs.
        runs: the flags of each, by name.

    Returns:
        The launch, and for each process what ``tests/in_turn.py`` has written of every run.
    """
    named = {n: ["train", *w, "--output-dir", str(folder / n)] for n, w in runs.items()}
    (folder / "runs.json").write_text(json.dumps(named))
    words = [*launch, "tests/in_turn.py", folder / "runs.json", folder]
    done = run_program(*words)
    return done, [load(path) for path in sorted(folder.glob("[0-9].json"))]


def workers(launcher: int) -> dict[int, int]:
    """The process id of every rank that the process ``launcher`` has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
            if ranks and parent == launcher:
                found[ranks[0]] = int(entry.name)
    return found


# ---------------------------------------------------------------- inside a run

COSTS = {"resnet8": 1.0, "wrn_16_2": 2.0, "resnet20": 3.0}
COSTS |= {"test_efficientnet": 1.0, "test_resnet": 3.0}


class Training:
    """The parts of one run, built as a run builds them, for tests that look inside."""

    def __init__(self, config: Config, source: Source) -> None:
        self.config = config
        processes, specs = Processes(config.numerics, config.compute), parse_cohort(config.cohort)
        names = [spec.name for spec in specs]
        ranks = everywhere(names, processes.world_size)
        if config.compute.placement == "split":
            costs = {name: COSTS[name.rpartition("-")[0]] for name in names}
            ranks = allocate(costs, processes.world_size)
        self.placement = Placement(processes, ranks, config.numerics.batch_norm)
        self.data: Data = prepare_images(config, source, processes.device)
        modules = build_networks(config, specs, len(source.classes))
        frozen = read_teachers(config.method.frozen_peers, source.classes, config.data.image_size)
        self.cohort = make_cohort(
            config,
            specs,
            modules,
            self.data,
            self.placement,
            frozen=frozen,
            links=read_links(config.method.links, names, list(frozen)),
            to_compile=names if config.compute.compile == "on" else (),
        )
        self.peers = list(self.cohort.peers)

    def step(self, number: int, lr: float) -> Step:
        """One optimizer step, not taken."""
        return Step(self.cohort, number, lr)

    def take(self, steps: int, start: int = 0) -> list[torch.Tensor]:
        """Take optimizer steps; return the parts of all peers' losses in each, [K, P]."""
        lr = self.config.optim.lr
        return [train_step(self.cohort, step, lr)[0] for step in range(start, start + steps)]

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameters, buffers, momentum and averages of every peer, by name."""
        found = {}
        for peer in self.peers:
            state = {name: t.clone() for name, t in peer.module.state_dict().items()}
            for index, one in peer.optimizer.state_dict()["state"].items():
                for name, value in one.items():
                    state[f"momentum.{index}.{name}"] = value.clone()
            if peer.average is not None:
                averages = peer.average.module.state_dict()
                state |= {f"ema.{name}": value.clone() for name, value in averages.items()}
            found[peer.name] = state
        return found
