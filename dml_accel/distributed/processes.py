"""The process group of a run: collectives of a few bytes, and the end if a process is lost."""

import atexit
import contextlib
import itertools
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dml_accel.core.config import ComputeConfig, NumericsConfig
from dml_accel.core.errors import DivergedError, ProcessLostError, StoppedError, UsageError
from dml_accel.distributed.accelerator import OwnAccelerator
from dml_accel.distributed.device import own_device
from dml_accel.distributed.environment import shown_to_accelerate
from dml_accel.distributed.launch import (
    launched_precision,
    launched_processes,
    launched_rank,
    restarts,
    runs_on_cpu,
)
from dml_accel.distributed.liveness import Liveness, Record, connect

# How many times the processes have come together in this one; all of them count alike.
_calls, _FIRST = itertools.count(), "0-0"


class Processes:
    """The processes that were launched together: one group for all runs that they share.

    Attributes:
        accelerator: Accelerate's view of device, processes and precision.
        device: of this process's networks and batches.
        rank: of this process among ``world_size``; rank 0 prints and writes the records.

    Raises:
        ProcessLostError: the other processes did not appear in time.
        UsageError: fewer processes appeared than were launched.
    """

    def __init__(self, numerics: NumericsConfig, compute: ComputeConfig) -> None:
        launched = launched_processes()
        self._timeout = timedelta(minutes=compute.timeout)
        self._groups: dict[tuple[tuple[int, ...], ...], Any] = {}
        # The words of the last collectives, until the group has ended. Else gloo's thread may be
        # the last to hold one, and in torch 2.6 it then waits for Python's lock to free it, which
        # the main thread holds while it waits for that thread to end.
        self._words: deque[torch.Tensor] = deque(maxlen=4)
        # Without an accelerator, several processes must be told to use the CPU; else Accelerate
        # makes each of them a run of its own.
        on_cpu = compute.cpu or (launched > 1 and runs_on_cpu(compute))
        set_arithmetic(own_device(compute), numerics.tf32)  # before CUDA starts
        self._owns_group = not dist.is_initialized()
        try:
            with shown_to_accelerate(torch.get_num_threads()):
                label = f"{restarts()}-{next(_calls)}" if launched > 1 else _FIRST
                if label != _FIRST and self._owns_group:
                    self._join_again(compute, label)
                self.accelerator = OwnAccelerator(
                    cpu=on_cpu,
                    mixed_precision=launched_precision(numerics),
                    dynamo_plugin=TorchDynamoPlugin(backend="no"),
                    kwargs_handlers=[InitProcessGroupKwargs(timeout=self._timeout)],
                )
            self.device: torch.device = self.accelerator.device
            self.rank: int = self.accelerator.process_index
            self.world_size: int = self.accelerator.num_processes
            self._liveness: Liveness | None = None
            if self.world_size > 1:
                store = connect(self._timeout, label)
                self._liveness = Liveness(self.rank, self.world_size, store, self._timeout)
        except RuntimeError as error:
            if not _is_communication(error):
                raise
            raise ProcessLostError(
                f"the {launched} processes did not find each other within {compute.timeout:g} "
                f"minutes ({cause(error)}); WORLD_SIZE is {launched}: if there are not that many, "
                "unset it",
                prints=launched_rank() == 0,
            ) from error
        if launched != self.world_size:
            raise UsageError(
                f"{launched} processes were launched but only {self.world_size} found each other; "
                "add --cpu to the flags of train.py"
            )

    def _join_again(self, compute: ComputeConfig, label: str) -> None:
        """Join the process group after a restart by the launcher, or after an earlier run.

        The launcher's store still holds the addresses of the group before, under the names that
        these would use; a prefix keeps the two apart.
        """
        on_cpu = runs_on_cpu(compute)
        if not on_cpu:
            torch.cuda.set_device(own_device(compute))
        store, rank, size = next(rendezvous("env://", timeout=self._timeout))
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=PrefixStore(f"group-{label}", store),
            rank=rank,
            world_size=size,
            timeout=self._timeout,
        )

    @property
    def mixed_precision(self) -> str:
        """``no``, ``bf16`` or ``fp16``."""
        return str(self.accelerator.mixed_precision)

    def loss_scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler for one peer; without fp16 it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.mixed_precision == "fp16")

    # ------------------------------------------------------------ collectives

    def comes_to_collective(self) -> None:
        """Count a collective that all processes come to, which tells who is behind."""
        if self._liveness is not None:
            self._liveness.collectives += 1

    def broadcast_flag(self, decision: bool) -> bool:
        """Return rank 0's decision in every process."""
        if self.world_size == 1:
            return decision
        self.comes_to_collective()
        word = torch.tensor([decision], dtype=torch.uint8, device=self.device)
        self._words.append(word)
        dist.broadcast(word, src=0)
        return bool(word.item())

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Return the text of one process, rank 0's by default, in every process."""
        if self.world_size == 1:
            return text
        # As bytes in a tensor: torch's object collectives would unpickle what they receive.
        # Names of files need not be valid UTF-8.
        content = text.encode(errors="surrogateescape")
        size = self.all_reduce_max(len(content) if self.rank == source else 0)
        if size == 0:
            return ""
        word = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.rank == source:
            word.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._words.append(word)
        dist.broadcast(word, src=source)
        return bytes(word.tolist()).decode(errors="surrogateescape")

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of all processes' values."""
        if self.world_size == 1:
            return value
        self.comes_to_collective()
        word = torch.tensor([value], dtype=torch.int64, device=self.device)
        self._words.append(word)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return int(word.item())

    def failed_rank(self, failed: bool) -> int | None:
        """Return the highest rank that has failed, in every process; None if none has.

        All processes wait here for each other.
        """
        worst = self.all_reduce_max(1 + self.rank if failed else 0)
        return worst - 1 if worst else None

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.comes_to_collective()
            # NCCL warns if it has to guess the GPU, and gloo takes none.
            nccl = "nccl" in dist.get_backend()
            dist.barrier(device_ids=[self.device.index] if nccl else None)

    def group_in(self, parts: Iterable[Sequence[int]]) -> Any:
        """Return the process group of our part of all processes; None for all of them.

        Each process creates its own group only: the time does not grow with the number of parts.

        Args:
            parts: ranks of each, ascending; every process is in one. The same in all processes,
                which must ask for the same parts in the same order.
        """
        division = tuple(sorted(map(tuple, parts)))
        if len(division) in (1, self.world_size):
            return None
        if division not in self._groups:  # kept by the whole division: all processes have the same
            self._groups[division] = self._make_group(division)
        return self._groups[division]

    def _make_group(self, division: Sequence[tuple[int, ...]]) -> Any:
        # torch names a group by its ranks and by how many groups there are, which differs between
        # processes where a caller of ours has made groups of its own.
        world = dist.distributed_c10d._world
        made = [world.group_count, len(world.pg_names)]
        alike = [self.all_reduce_max(one) == -self.all_reduce_max(-one) for one in made]
        if not alike[0]:
            raise UsageError(
                "the processes have made different numbers of process groups before this run, so "
                "that torch cannot name further ones: call torch.distributed.new_group in all "
                "processes, or after it"
            )
        groups = [
            dist.new_group(list(part), timeout=self._timeout, use_local_synchronization=alike[1])
            for part in division
            if self.rank in part or not alike[1]
        ]
        return next(group for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER)

    # ------------------------------------------------------------ liveness

    @contextlib.contextmanager
    def watching(self, record: Record | None = None) -> Iterator[None]:
        """End the run if another process is lost, with an error that names it.

        A failed collective becomes that error. Where the main thread waits in vain instead, the
        process is ended (see ``liveness``).

        Args:
            record: writes down why the run has ended, where no exception can.

        Raises:
            ProcessLostError: a collective failed, or waited longer than the timeout.
        """
        if self._liveness is None:
            yield
            return
        with self._liveness.watching(record):
            try:
                yield
            except ProcessLostError:
                raise
            except RuntimeError as error:
                if not _is_communication(error):
                    raise
                # The launcher is about to stop the remaining processes: first say who is missing.
                handles = threading.current_thread() is threading.main_thread()
                before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if handles else None
                lost = self._liveness.why_it_failed(cause(error))
                if lost is None:
                    if handles:
                        signal.signal(signal.SIGTERM, before)
                    raise
                raise lost from error

    def looking_away(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, this process does what others do not wait for."""
        return self._liveness.looking_away() if self._liveness else contextlib.nullcontext()

    # ------------------------------------------------------------ the end

    def free_networks(self) -> None:
        """Drop the networks of a finished run, which Accelerate keeps in a list."""
        self.accelerator.free_memory()

    def close(self, keeps_group: bool = False) -> None:
        """Leave the process group in order; it stays if it was there before.

        Args:
            keeps_group: leave it at the end of the process: more runs may come, or the user's own.
        """
        self.stop_heartbeat()
        if self._owns_group and keeps_group:
            atexit.register(_leave)
        elif self._owns_group:
            self.accelerator.end_training()
        self.accelerator.release()

    def stop_heartbeat(self) -> None:
        """Send no more heartbeats: this process has ended in order."""
        if self._liveness:
            self._liveness.close()

    @contextlib.contextmanager
    def leaving_on_error(self, in_python: bool) -> Iterator[None]:
        """Leave the process group if an error ends the context.

        A command ends its process then. A call in Python leaves the group: where not all processes
        have the error, the others find this one lost, as if it had died.

        Args:
            in_python: whether a function was called in Python, not a command.
        """
        try:
            yield
        except BaseException as error:
            if not in_python:
                raise
            if self.world_size == 1 or isinstance(error, (DivergedError, StoppedError)):
                self.close()
            else:
                assert self._liveness
                self._liveness.close(in_order=False)
                self.accelerator.release()
            raise


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def set_arithmetic(device: torch.device, tf32: bool) -> None:
    """Let the same run give the same bits twice, in IEEE single precision unless TF32 is asked for.

    It is called before CUDA starts, because cuBLAS reads its workspace from the environment then.
    Nothing that a CPU computes with is changed.

    Args:
        device: that the process trains on.
        tf32: whether matrix products and convolutions may round their factors to TF32.
    """
    # cuDNN may not choose kernels by timing.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if device.type == "cpu":
        return
    # torch allows TF32 in convolutions by default. The older of its two interfaces is in all
    # versions and sets both.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # An operation that has only a kernel with atomics is named in a warning instead of refused.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every new tensor with NaN is for finding bugs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a tensor could not be allocated."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def cause(error: BaseException) -> str:
    """Return the first sentence of an error, without the place in gloo's source that has raised it.

    What gloo adds is advice, and a joke.
    """
    return re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0]


def _is_communication(error: RuntimeError) -> bool:
    """Whether an error comes from a connection; gloo has no exception class for those."""
    return isinstance(error, dist.DistError) or "gloo" in first_line(error).lower()
