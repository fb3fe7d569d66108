"""The group that this process belongs to, and who of it is alive.

Here, in launching.py and in placement.py alone is known what devices, processes and ranks are.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dml_accel.core.config import Config, UsageError
from dml_accel.distributed.launch import launched_processes, launched_rank, restarts, stays_on_cpu

_SECONDS_BETWEEN_BEATS = 0.5


class ProcessLostError(RuntimeError):
    """Other processes of the run are gone; the text names them.

    Attributes:
        speaks: whether this process, the first of those left, is the one to say it.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


class Processes:
    """The processes that were launched together: one for all runs that they share.

    Attributes:
        accelerator: Accelerate's view of the device, the processes and the precision.
        device: where this process's networks and batches are.
        rank: this process among ``world_size``; rank 0 speaks and writes.

    Raises:
        ProcessLostError: the others were not found in time.
        UsageError: fewer were found than launched.
    """

    def __init__(self, config: Config) -> None:
        launched = launched_processes()
        self._timeout = timedelta(minutes=config.timeout)
        self._groups: dict[tuple[int, ...], Any] = {}
        # Several processes without an accelerator need to be told, or each believes to be alone.
        try:
            if launched > 1 and restarts():
                self._meet_again(stays_on_cpu(config))
            self.accelerator = Accelerator(
                cpu=config.cpu or (launched > 1 and stays_on_cpu(config)),
                mixed_precision=config.mixed_precision,
                dynamo_plugin=TorchDynamoPlugin(backend="no"),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=self._timeout)],
            )
        except RuntimeError as error:
            if not _is_of_the_exchange(error):
                raise
            raise ProcessLostError(
                f"the {launched} processes did not find each other within {config.timeout:g} "
                f"minutes ({_first_line(error)})",
                speaks=launched_rank() == 0,
            ) from error
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        if launched != self.world_size:
            raise UsageError(
                f"launched as {launched} processes but only {self.world_size} found each other; "
                "add --cpu to the flags of train.py"
            )
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        # The same run twice is the same bit for bit: cuDNN may not choose otherwise.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        if self.world_size > 1:
            self._beating.start()

    def _meet_again(self, on_cpu: bool) -> None:
        """Make the group of processes that the launcher has started anew.

        Its store still holds the addresses of those before, under the names that these would use.
        """
        if not on_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(rendezvous("env://", timeout=self._timeout))
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=PrefixStore(f"restart-{restarts()}", store),
            rank=rank,
            world_size=size,
            timeout=self._timeout,
        )

    @property
    def mixed_precision(self) -> str:
        """``no``, ``bf16`` or ``fp16``."""
        return str(self.accelerator.mixed_precision)

    def agreed(self, decision: bool) -> bool:
        """Return rank 0's decision in every process."""
        if self.world_size == 1:
            return decision
        word = torch.tensor([decision], dtype=torch.uint8, device=self.device)
        dist.broadcast(word, src=0)
        return bool(word.item())

    def text_of_first(self, text: str) -> str:
        """Return rank 0's text in every process."""
        if self.world_size == 1:
            return text
        content = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = self.largest(len(content) if self.rank == 0 else 0)
        word = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            word.copy_(content)
        dist.broadcast(word, src=0)
        return bytes(word.tolist()).decode().strip()

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def largest(self, value: int) -> int:
        """Return the largest of all processes' values."""
        if self.world_size == 1:
            return value
        word = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        return int(word.item())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Turn a failed exchange into an error that names the processes that are gone.

        Raises:
            ProcessLostError: an exchange failed, or waited longer than the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            reason = _first_line(error)
            if self.world_size == 1 or not _is_of_the_exchange(error):
                raise
            # The launcher tells those left to stop, now or soon: first say who is missing.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            gone = self._missing()
            if not gone:
                raise
            names = ", ".join(f"rank {rank}" for rank in gone)
            left = set(range(self.world_size)) - set(gone)
            raise ProcessLostError(
                f"{names} no longer answers, so the run ends ({reason})",
                speaks=self.rank == min(left, default=self.rank),
            ) from error

    def _beat(self) -> None:
        """Say that this process lives, from a thread of its own: exchanges block the main one."""
        store: Any = dist.distributed_c10d._get_default_store()
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody listens any more
            while not self._closing.wait(_SECONDS_BETWEEN_BEATS):
                count += 1
                store.set(f"alive/{self.rank}", str(count))

    def _missing(self) -> list[int]:
        """Return the ranks whose sign of life in the launcher's store does not change."""
        found: list[int] = [0]  # where the store does not answer: it lives on rank 0's machine

        def look() -> None:
            with contextlib.suppress(dist.DistError):
                store: Any = dist.distributed_c10d._get_default_store()
                names = [f"alive/{rank}" for rank in range(self.world_size)]
                before = [store.get(name) if store.check([name]) else b"" for name in names]
                time.sleep(6 * _SECONDS_BETWEEN_BEATS)
                after = [store.get(name) if store.check([name]) else b"" for name in names]
                found[:] = [rank for rank in range(self.world_size) if before[rank] == after[rank]]

        # In a thread, because asking a store behind a broken link never returns.
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(20 * _SECONDS_BETWEEN_BEATS)
        return found

    def group(self, ranks: Sequence[int]) -> Any:
        """Return the process group of some ranks: None for all, or for one alone.

        All processes ask for the same groups in the same order.
        """
        if not 1 < len(ranks) < self.world_size:
            return None
        members = tuple(ranks)
        if members not in self._groups:
            self._groups[members] = dist.new_group(list(members), timeout=self._timeout)
        return self._groups[members]

    def release_networks(self) -> None:
        """Let go of the networks of a finished run, which Accelerate keeps a list of."""
        self.accelerator.free_memory()

    def close(self) -> None:
        """Leave the process group in order."""
        self.stop_beating()
        self.accelerator.end_training()

    def stop_beating(self) -> None:
        """End the thread that gives signs of life; a process must not end while it speaks."""
        self._closing.set()
        if self._beating.is_alive():
            self._beating.join()


class MemoryShortError(RuntimeError):
    """There was no memory for a tensor; the text names the way out."""

    speaks = True  # it is each process's own


@contextlib.contextmanager
def remedy_of_short_memory(config: Config, one_at_a_time: bool) -> Iterator[None]:
    """Say what needs less memory where it runs short.

    Args:
        config: the run's.
        one_at_a_time: whether one network's activations are held at a time as it is.

    Raises:
        MemoryShortError: in place of the error of torch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_short(error):
            raise
        ways, parts = [], 2 * config.grad_accum
        if not one_at_a_time and config.update == "simultaneous":
            ways.append("--low-memory keeps one network's activations at a time")
        if parts <= config.batch_size and config.update != "sequential":
            ways.append(f"--grad-accum {parts} computes a batch in smaller parts (another result)")
        ways.append(f"a smaller --batch-size than {config.batch_size} needs less (another result)")
        raise MemoryShortError(f"memory ran short: {'; '.join(ways)}") from error


def memory_ran_short(error: BaseException) -> bool:
    """Whether an error says that there was no memory for a tensor."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in _first_line(error)


def _is_of_the_exchange(error: RuntimeError) -> bool:
    """Whether an error is that of a connection; gloo has no class of its own for them."""
    return isinstance(error, dist.DistError) or "gloo" in _first_line(error).lower()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
