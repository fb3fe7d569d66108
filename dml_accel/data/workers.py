"""Processes that decode images: work that is handed to them, and its results in order.

They are torch's ``DataLoader`` workers. What they do is a function of the request alone, so their
number changes nothing but the speed.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dml_accel.core.errors import RunError, UsageError
from dml_accel.data.memory import processes_here

Request = TypeVar("Request")
Result = TypeVar("Result")
_SHARED_MEMORY = "/dev/shm"
_PART = 4  # one part in so many of shared memory is used by one reader
_LARGEST_PIECE, _FINEST = 32, 64  # items of a request; of a read that is shared out evenly
_MOST = 8  # workers that are used without being asked for
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def worker_count(asked: int | None, on_cpu: bool, cores: int, processes: int) -> int:
    """Return how many processes decode images for one training process.

    Args:
        asked: ``--workers``; None to choose.
        on_cpu: whether the networks are computed on the same cores.
        cores: that this process may use.
        processes: training processes on these cores.
    """
    if asked is not None:
        return asked
    share = cores // max(1, processes)
    return max(1, min(_MOST, share // 2 if on_cpu else share - 1))


class WorkerLostError(RunError):
    """A process that decodes images is gone, which the system does when memory is short."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "a process that decodes images was killed, as the system does when memory is short: "
            f"use fewer --workers ({reason})",
            prints=True,
        )


class Results(Generic[Request, Result]):
    """An iterator over the results of requests, in their order, computed ahead by workers.

    Close it, or use it as a context: the workers end then.

    Args:
        function: what is done with a request; it runs in the workers, and its results are sent
            from there. Tensors travel in shared memory.
        requests: in the order in which results are wanted; it is read ahead, and may have no end.
        workers: processes; 0: the function runs here, when a result is wanted.
        ahead: requests that are under way for each worker.
        result_bytes: of one result in shared memory, so that it can be refused before it overflows.

    Raises:
        UsageError: shared memory is too small.
        WorkerLostError: while results are read: a worker was killed.
    """

    def __init__(
        self,
        function: Callable[[Request], Result],
        requests: Iterable[Request],
        *,
        workers: int,
        ahead: int = 2,
        result_bytes: int = 0,
    ) -> None:
        _require_shared_memory(workers * (ahead + 1) * result_bytes, workers)
        options: dict[str, Any] = {}
        if workers:
            options = {"prefetch_factor": ahead, "worker_init_fn": _begin_worker}
            if sys.platform == "linux":
                # Other ways of starting one import torch anew, which takes seconds each.
                options["multiprocessing_context"] = multiprocessing.get_context("fork")
        with _without_warnings():
            self._loader: Any = DataLoader(
                _Function(function),
                batch_size=None,
                sampler=_InOrder(requests),
                num_workers=workers,
                collate_fn=_as_it_is,
                # Without one of its own it would draw from torch's, whose state is the caller's.
                generator=torch.Generator(),
                **options,
            )
        self._results: Iterator[Result] | None = None

    def __iter__(self) -> "Results[Request, Result]":
        return self

    def __next__(self) -> Result:
        if self._results is None:
            with _without_warnings(), _keeping_child_handler():
                self._results = iter(self._loader)
        try:
            return next(self._results)
        except (RuntimeError, OSError, EOFError) as error:
            # A result whose worker is gone cannot be fetched any more: its connection is closed.
            if "DataLoader worker" not in str(error) and not self._has_lost_one():
                raise
            self._kill()  # the others may wait for what it held
            raise WorkerLostError(" ".join(str(error).split())) from error

    def _has_lost_one(self) -> bool:
        sentinels = [one.sentinel for one in getattr(self._results, "_workers", ())]
        # Its connections are closed a moment before its end can be seen.
        return bool(multiprocessing.connection.wait(sentinels, timeout=1.0))

    def close(self) -> None:
        """End the workers."""
        shut_down = getattr(self._results, "_shutdown_workers", None)
        if shut_down is not None:
            with contextlib.suppress(AttributeError):  # it is being taken down with the program
                shut_down()
        self._kill()
        self._results = None

    def _kill(self) -> None:
        """Kill workers that do not end: they ignore signals, and Python would wait for them."""
        for worker in getattr(self._results, "_workers", ()):
            if worker.is_alive():
                worker.kill()

    def __enter__(self) -> "Results[Request, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # Python warns of forks of a process with threads, as torch's own are. Workers use a single
        # one, and none of what other threads may have held.
        warnings.simplefilter("ignore", DeprecationWarning)
        # More workers than cores are the user's choice.
        warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
        yield


@contextlib.contextmanager
def _keeping_child_handler() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD out: it raises where a worker's end happens to be noticed.

    That may be in the middle of an optimizer step. Without it, who reads results notices.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not before and before is not None:
            signal.signal(signal.SIGCHLD, before)


class Flight(NamedTuple):
    """How the items of a read are handed to workers.

    Attributes:
        piece: items of one request.
        ahead: requests that are under way for each worker.
    """

    piece: int
    ahead: int


def plan_flight(items: int, item_bytes: int, workers: int) -> Flight:
    """Return how to read ``items`` at a time: two reads are under way, if memory has room for them.

    Args:
        items: of the largest read.
        item_bytes: of one in shared memory.
        workers: processes.

    Raises:
        UsageError: shared memory has no room for one item of each worker.
    """
    workers = max(1, workers)
    piece = min(_LARGEST_PIECE, max(1, -(-min(items, _FINEST) // workers)))
    ahead = max(2, -(-2 * -(-items // piece) // workers))
    room = _shared_memory() // (_PART * processes_here())
    while workers * (ahead + 1) * piece * item_bytes > room and (ahead > 1 or piece > 1):
        piece, ahead = (piece, ahead - 1) if ahead > 2 or piece == 1 else (piece // 2, ahead)
    _require_shared_memory(workers * (ahead + 1) * piece * item_bytes, workers)
    return Flight(piece, ahead)


def in_pieces(rows: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    """Yield rows in pieces of at most ``size``."""
    left = iter(rows)
    while piece := tuple(itertools.islice(left, size)):
        yield piece


class _Function(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, request: Any) -> Any:
        return self._function(request)


class _InOrder(Sampler[Any]):
    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


def _as_it_is(result: Any) -> Any:
    return result


def _begin_worker(_: int) -> None:
    # A stop is the training process's business; a terminal signals all processes at once.
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    if sys.platform == "linux":
        # A worker has inherited files and connections, the lock of the run folder among them. They
        # must not outlive a training process that was killed.
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent or parent == 1:
            os._exit(1)


def _require_shared_memory(needed: int, workers: int) -> None:
    """Refuse what would end a worker with a bus error, as in containers with little of it."""
    free = _shared_memory()
    if workers and needed > free:
        raise UsageError(
            f"--workers {workers} need {needed / 2**20:,.1f} MiB of shared memory, and "
            f"{_SHARED_MEMORY} has {free / 2**20:,.1f} MiB left: use fewer --workers, or give the "
            "container more (docker run --shm-size)"
        )


def _shared_memory() -> int:
    """Return the bytes of shared memory that are left; all there could be where it has no limit."""
    if not os.path.isdir(_SHARED_MEMORY):
        return sys.maxsize
    return int(psutil.disk_usage(_SHARED_MEMORY).free)
