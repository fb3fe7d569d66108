"""How this process was started, and what cannot work is refused before any process group."""

import os
import signal
import threading
import time
from typing import Any, Self

import torch

from dml_accel.core.config import Config, UsageError
from dml_accel.training import trackers

_SAME_SIGNAL_SECONDS = 0.5
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


class StoppedError(RuntimeError):
    """The run ends on request, and what it needs to go on is on the disk."""


class Stop:
    """The request of the system or of a person to stop: SIGTERM, SIGINT or SIGUSR1.

    Within the context the first signal is noted, for the run to heed between two steps; a second
    one ends the process at once.

    Attributes:
        signal: the name of the signal that came; empty while there is none.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = ""
        self._came = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.signal)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only it may handle signals
            self._before = {one: signal.signal(one, self._note) for one in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _note(self, number: int, _: object) -> None:
        if not self.signal:
            self.signal, self._came = signal.Signals(number).name, time.monotonic()
        # A launcher hands on what the system may have told its processes already.
        elif launched_processes() == 1 or time.monotonic() - self._came > _SAME_SIGNAL_SECONDS:
            os._exit(128 + number)


def restarts() -> int:
    """How often the launcher has started its processes anew, after one of them ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 where there is no launcher."""
    return int(os.environ.get("RANK", 0)) if launched_processes() > 1 else 0


def launched_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_precision(config: Config) -> str:
    """The precision that the configuration asks for, else the launcher."""
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def check_launch(config: Config) -> None:
    """Refuse what cannot work, before any process group.

    Raises:
        UsageError: the way of starting, a plugin, the precision, the number of processes or a
            tracker; the text names the fix.
    """
    trackers.check(config.log_with)
    environment, world = os.environ, launched_processes()
    on_cpu = stays_on_cpu(config)
    precision = launched_precision(config)
    # The launcher sets an address for several processes, and then starts one without a rank.
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if started_by_accelerate and "MASTER_ADDR" in environment and "RANK" not in environment:
        raise UsageError(
            "accelerate launch started one process whatever --num_processes and --num_machines "
            "say, as it does with --cpu, MULTI_CPU and without --multi_gpu; write accelerate "
            "launch --multi_gpu --num_processes N, which is N processes on the CPU where there "
            "is no GPU"
        )
    if world > 1 and not on_cpu:
        _check_gpus()
    for variable, plugin in _PLUGINS.items():
        if environment.get(variable, "").lower() == "true":
            raise UsageError(f"{plugin} does not fit a cohort of networks; launch without it")
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise UsageError(
            "the launcher's --dynamo_backend compiles without the run's knowing; launch without it "
            "and give train.py --compile"
        )
    if int(environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)) > 1:
        raise UsageError(
            "gradient accumulation is a flag of training: --grad-accum, and not of the launcher"
        )
    if precision not in ("no", "bf16", "fp16"):
        raise UsageError(f"mixed precision {precision} is not supported; use no, bf16 or fp16")
    if precision == "fp16" and on_cpu:
        raise UsageError("fp16 needs a GPU (a CPU would compute in fp32); use bf16 or no")
    if config.float64 and precision != "no":
        raise UsageError(f"--float64 and mixed precision {precision} exclude each other")
    if config.threads and config.threads > (cores := _cores()):
        raise UsageError(
            f"--threads is {config.threads}; this machine has {cores} core{'s' * (cores > 1)} for "
            "it, and more threads than that wait for each other"
        )
    if config.tf32 and (on_cpu or not torch.cuda.is_available()):
        raise UsageError("--tf32 is for CUDA GPUs; leave it out here")
    if config.float64 and not on_cpu and not torch.cuda.is_available():
        raise UsageError("--float64: Apple GPUs have no double precision; add --cpu")
    least = config.batch_size // config.grad_accum
    if world > least:
        raise UsageError(
            f"{world} processes, but only {least} images in a part of the batch (--batch-size "
            f"{config.batch_size}, --grad-accum {config.grad_accum}); each needs at least one"
        )


def _check_gpus() -> None:
    if not torch.cuda.is_available():
        raise UsageError("several processes need CUDA GPUs or the CPU; add --cpu to train.py")
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "WORLD_SIZE is set but LOCAL_RANK is not; start with accelerate launch or torchrun"
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"{here} processes on this machine but {gpus} GPUs; start at most {gpus} "
            "(--num_processes), or add --cpu to train.py"
        )


def stays_on_cpu(config: Config) -> bool:
    """Whether the run is on the CPU: by wish, or because there is nothing else."""
    asked = config.cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return asked or not torch.accelerator.is_available()


def share_cores(config: Config) -> None:
    """Let this process compute with its share of the machine's cores, where it is on the CPU."""
    threads = _threads(config, launched_processes())
    if threads and stays_on_cpu(config):
        torch.set_num_threads(threads)


def _threads(config: Config, launched: int) -> int | None:
    """Return how many threads this process computes with on a CPU; None leaves it as it is.

    Launchers give each of several processes one thread, however many cores there are.
    """
    if config.threads or launched == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return config.threads
    return max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", launched)))


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
