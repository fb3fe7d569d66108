"""How this process was started; what cannot work is refused before any process group exists.

torch is imported late, so that usage errors and ``--help`` are printed at once.
"""

import os
import signal
import threading
import time
from typing import Any, Self

from dml_accel.core.config import ComputeConfig, NumericsConfig, OptimConfig
from dml_accel.core.errors import UsageError
from dml_accel.core.host import cores
from dml_accel.core.versions import torch_release
from dml_accel.distributed import environment

_SAME_SIGNAL_SECONDS = 0.5
# Older fused SGD on Apple GPUs may ignore or refuse ``found_inf``, by its source; not run there.
_APPLE_TORCH = (2, 15)


class Stop:
    """A request to stop the run: SIGTERM, SIGINT or SIGUSR1; of several processes also SIGHUP.

    A launcher passes the SIGHUP of its terminal on and ends. A process alone ignores it, and so do
    those that a command starts by itself.

    Within the context the first signal is recorded, and the run acts on it between two steps; a
    second signal ends the process at once. So does the first one while one of several processes
    waits for the others, which it does in native code, where no handler of Python runs: signals are
    recorded after ``listen``. In a call in Python a second SIGINT raises KeyboardInterrupt instead,
    or a notebook would lose all that it holds.

    A thread that is not the main one cannot handle signals: there the context does nothing.

    Args:
        in_python: whether a function was called in Python, not a command.

    Attributes:
        signal: the name of the signal that was received; empty if there was none.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    _OF_LAUNCHERS = (signal.SIGHUP,)

    def __init__(self, in_python: bool = False) -> None:
        self.signal = ""
        self._in_python = in_python
        self._received = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.signal)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only it can handle signals
            several = launched_processes() > 1
            launcher = several and environment.starter() is None
            signals = self._SIGNALS + self._OF_LAUNCHERS * launcher
            action = signal.SIG_DFL if several else self._receive
            self._handlers = {one: signal.signal(one, action) for one in signals}
        return self

    def listen(self) -> None:
        """Record signals from now on: the processes have found each other."""
        for one in self._handlers:
            signal.signal(one, self._receive)

    def __exit__(self, *_: object) -> None:
        for one, handler in self._handlers.items():
            if handler is not None:  # of a C library, which Python cannot set
                signal.signal(one, handler)

    def _receive(self, number: int, _: object) -> None:
        alone = launched_processes() == 1
        if not self.signal:
            self.signal, self._received = signal.Signals(number).name, time.monotonic()
        # A launcher forwards a signal that the system may already have sent to its processes.
        elif alone and self._in_python and number == signal.SIGINT:
            raise KeyboardInterrupt
        elif alone or time.monotonic() - self._received > _SAME_SIGNAL_SECONDS:
            os._exit(128 + number)


# ---------------------------------------------------------------- what the launcher says


def restarts() -> int:
    """Return how often the launcher has restarted its processes after one of them failed."""
    return environment.launched().restarts


def launched_rank() -> int:
    """Return the rank that the launcher gave this process; 0 without a launcher."""
    return environment.launched().rank


def launched_processes() -> int:
    """Return how many processes the launcher started."""
    return environment.launched().size


def launched_local_rank() -> int:
    """Return the rank of this process on its machine; 0 without a launcher."""
    return environment.launched().local_rank or 0


def own_processes() -> int:
    """Return how many processes the command has started by itself; 1 if it has started none."""
    return launched_processes() if environment.starter() is not None else 1


def launched_precision(numerics: NumericsConfig) -> str:
    """Return the mixed precision of the configuration, else the launcher's.

    Raises:
        UsageError: the launcher's is not supported.
    """
    return numerics.mixed_precision or environment.precision()


# ---------------------------------------------------------------- what cannot work


def check_launch(
    numerics: NumericsConfig, compute: ComputeConfig, optim: OptimConfig, in_python: bool = False
) -> None:
    """Refuse what cannot work, before any process group exists.

    Args:
        numerics, compute, optim: of the run.
        in_python: whether a function was called in Python, not a command.

    Raises:
        UsageError: the launcher, a plugin, the precision, the threads or the number of processes;
            the text names the fix.
    """
    environment.check()
    environment.check_launcher()
    on_cpu = runs_on_cpu(compute)
    starts = 1 if environment.starter() is not None else compute.own_processes or 1
    if starts > 1:
        _check_own_processes(starts, compute, on_cpu, in_python)
    if launched_processes() > 1 and not on_cpu:
        _check_gpus()
    _check_precision(numerics, on_cpu)
    _check_apple_gpu(on_cpu)
    if compute.compile_mode.startswith("max-autotune") and not on_cpu:
        raise UsageError(
            f"--compile-mode {compute.compile_mode} chooses nothing on a GPU: it would time "
            "kernels, and a resumed run must get the same ones; use reduce-overhead or default"
        )
    if compute.threads and compute.threads > (usable := cores()):
        raise UsageError(
            f"--threads is {compute.threads}, but this process can use {usable} "
            f"core{'s' * (usable > 1)}; more threads would wait for each other"
        )
    least = optim.smallest_micro_batch
    if (count := max(starts, launched_processes())) > least:
        raise UsageError(
            f"{count} processes, but only {least} images in a micro-batch "
            f"(--batch-size {optim.batch_size}, --grad-accum {optim.grad_accum}); each process "
            "needs at least one"
        )


def _check_own_processes(count: int, compute: ComputeConfig, on_cpu: bool, in_python: bool) -> None:
    """Refuse to start processes where that is the business of a launcher, or too many."""
    if in_python:
        raise UsageError(
            f"processes={count}: a call in Python starts no processes; use the command dml-accel, "
            f"or start the script with accelerate launch --multi_gpu --num_processes {count}"
        )
    if environment.has_launcher():
        raise UsageError(
            f"--processes {count} would start processes, but a launcher has started this one "
            f"({launched_processes()} in all): use one of the two"
        )
    if not on_cpu:
        raise UsageError(
            f"--processes {count} starts processes on a CPU: add --cpu, or for GPUs use accelerate "
            f"launch --multi_gpu --num_processes {count}"
        )
    threads, usable = compute.threads or environment.threads() or 1, cores()
    if count * threads > usable:
        each = f" of {threads} threads" if threads > 1 else ""
        raise UsageError(
            f"--processes {count}{each} needs {count * threads} cores, and this process "
            f"can use {usable}: processes would wait for each other; use fewer"
        )


def _check_precision(numerics: NumericsConfig, on_cpu: bool) -> None:
    import torch

    precision = launched_precision(numerics)
    if precision == "fp16" and on_cpu:
        raise UsageError("fp16 needs a GPU (a CPU would compute in fp32); use bf16 or no")
    if numerics.float64 and precision != "no":
        raise UsageError(f"--float64 and mixed precision {precision} exclude each other")
    if numerics.tf32 and (on_cpu or not torch.cuda.is_available()):
        raise UsageError("--tf32 needs a CUDA GPU; drop it here")
    if numerics.float64 and not on_cpu and not torch.cuda.is_available():
        raise UsageError("--float64: Apple GPUs have no double precision; add --cpu")


def _check_apple_gpu(on_cpu: bool) -> None:
    import torch

    device = None if on_cpu else torch.accelerator.current_accelerator()
    if device is None or device.type != "mps":
        return
    if torch_release() < _APPLE_TORCH:
        raise UsageError(
            f"on Apple GPUs the optimizer of torch {torch.__version__} cannot skip a step whose "
            "loss is not finite; use torch 2.15 or newer, or add --cpu"
        )


def _check_gpus() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("several processes need CUDA GPUs or the CPU; add --cpu to train.py")
    world, gpus = environment.launched(), torch.cuda.device_count()
    if world.local_rank is None:
        raise UsageError(
            f"WORLD_SIZE is {world.size} but LOCAL_RANK is not set; start with accelerate launch "
            "or torchrun"
        )
    here = world.local_size or 1
    if here > gpus and not _was_given_a_gpu(gpus):
        raise UsageError(
            f"{here} processes on this machine but {gpus} GPU{'s' * (gpus > 1)}; start at most "
            f"{gpus} (--num_processes), give each its own (srun --gpus-per-task=1), or add --cpu "
            "to train.py"
        )


def _was_given_a_gpu(visible: int) -> bool:
    """Whether this process sees a GPU of its own, as each task of ``srun --gpus-per-task=1`` does.

    A launcher of torch starts all its processes with one environment, so these would share the GPU.
    Which GPU it is cannot be known here: every task may call its own 0. NCCL refuses a GPU that two
    processes use.
    """
    started_alone = not environment.started_by_torch()
    return visible == 1 and started_alone and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))


# ---------------------------------------------------------------- the CPU


def runs_on_cpu(compute: ComputeConfig) -> bool:
    """Whether the run uses the CPU: because it was asked to, or because there is no accelerator."""
    import torch

    asked = compute.cpu or environment.uses_cpu()
    return asked or not torch.accelerator.is_available()


def share_cores(compute: ComputeConfig) -> None:
    """Limit this process to its share of the machine's cores, if it runs on the CPU."""
    import torch

    threads = _threads(compute.threads, environment.launched())
    if threads and runs_on_cpu(compute):
        torch.set_num_threads(threads)


def threads_each(compute: ComputeConfig, count: int) -> int:
    """Return the threads of each of ``count`` processes on the CPU of this machine."""
    world = environment.World(count, local_size=count)
    return _threads(compute.threads, world) or environment.threads() or 1


def _threads(asked: int | None, world: environment.World) -> int | None:
    """Return the number of threads of this process on a CPU; None leaves it as it is.

    Launchers give each of several processes a single thread, however many cores there are.
    """
    if asked or world.size == 1 or (environment.threads() or 1) > 1:
        return asked
    return max(1, cores() // (world.local_size or world.size))
