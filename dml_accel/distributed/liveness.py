"""Which processes of a run are alive, and how a run ends that has lost one.

Every process counts up a key of its own in the launcher's store, from a thread, because collectives
block the main one. Rank 0 looks at the keys of all others, and they look at that of rank 0: a look
is a few requests for each process, however many there are. Who finds a loss announces it in the
store, so that all processes name the same ranks and one of them prints.

Where a collective fails, ``Processes.watching`` asks who is lost. With NCCL it may never fail: the
main thread waits inside CUDA. Then a second thread ends the process.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dml_accel.core.errors import ProcessLostError
from dml_accel.distributed.launch import launched_local_rank

BEAT_SECONDS = 0.5
LOOK_SECONDS = 2.0
# A process whose main thread holds Python's lock, or that gets no processor, sends nothing although
# it is alive. After 20 seconds it counts as lost. More would be too late: a launcher that has seen
# a process die kills the others after 30.
LOOKS = 10
_LOOKS_FOR_MAIN_THREAD = 3  # to stand still, once another process has announced a loss
_LOOKS_WITHOUT_STORE = 60
_SECONDS_TO_ANSWER = 10.0  # a request to a store behind a broken link never returns
_ENDED = b"ended"
_LOST = "lost"

Record = Callable[[ProcessLostError], None]


class Silence:
    """Counts looks at the heartbeats of other processes that found no change.

    Looks are counted instead of seconds: a process that was suspended itself has not looked.

    Args:
        looks: in a row without a change, after which a process is lost.

    Attributes:
        still: looks in a row that found our main thread where it was.
    """

    def __init__(self, looks: int) -> None:
        self._looks = looks
        self._silent: dict[int, int] = {}
        self._beats: dict[int, bytes] = {}
        self._position: object = None
        self.still = 0

    def lost(self, beats: Mapping[int, bytes], position: object) -> list[int]:
        """Take a look; return the ranks that are lost.

        None is while our main thread moves: it does not wait for a lost process yet.

        Args:
            beats: the newest heartbeat of each rank that is watched.
            position: where our main thread is; equal if it has not moved.
        """
        self.still = self.still + 1 if position == self._position else 0
        self._position = position
        for rank, beat in beats.items():
            silent = beat == self._beats.get(rank) and beat != _ENDED
            self._silent[rank] = self._silent.get(rank, 0) + 1 if silent else 0
        self._beats = dict(beats)
        if self.still < self._looks:
            return []
        return [rank for rank in beats if self._silent[rank] >= self._looks]


class Liveness:
    """The heartbeat of this process, and its look at those of others.

    Args:
        rank: of this process.
        world_size: how many processes there are.
        store: that all of them reach; see ``connect``.
    """

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        self._rank, self._store = rank, store
        self._all = range(world_size)
        self._watched = [0] if rank else list(self._all[1:])
        self._seen: dict[int, bytes] = dict.fromkeys(self._watched, b"")
        self._announced = False
        self._main: int | None = None  # the thread that is watched over, while it is
        self._record: Record | None = None
        self._deciding = threading.RLock()  # contexts may be nested
        self._closing, self._in_order = threading.Event(), True
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._beat, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def watching(self, record: Record | None) -> Iterator[None]:
        """Within the context, end this process if another one is lost and we wait for it in vain.

        Args:
            record: writes down why the run has ended; called before the end, in another thread.
        """
        before = self._main, self._record
        self._main, self._record = threading.get_ident(), record or self._record
        try:
            yield
        finally:
            with self._deciding:  # who decides right now, decides about this context
                self._main, self._record = before

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Within the context, the main thread does what others do not wait for."""
        with self._deciding:
            before, self._main = self._main, None
        try:
            yield
        finally:
            self._main = before

    def why_it_failed(self, reason: str) -> ProcessLostError | None:
        """Return who is lost, after a collective has failed; None if all processes are there.

        Args:
            reason: of the failure.

        If somebody is lost, the main thread ends this process from here on, and no other does.
        """
        self._deciding.acquire()
        found = self._verdict(reason, ended=True)
        if found is None:
            self._deciding.release()
        return found

    def close(self, in_order: bool = True) -> None:
        """End the threads: a process must not exit while they use the store.

        Args:
            in_order: whether the others wait for nothing from this process; else they find it lost.
        """
        self._in_order = in_order
        self._closing.set()
        for thread in self._threads:
            thread.join(_SECONDS_TO_ANSWER)

    # ------------------------------------------------------------ the threads

    def _beat(self) -> None:
        """Send heartbeats and receive those of others."""
        count, looked = 0, time.monotonic()
        while not self._closing.wait(BEAT_SECONDS):
            with contextlib.suppress(RuntimeError):  # the next request may succeed again
                count += 1
                self._store.set(_key(self._rank), str(count))
                # A little sooner than the judge, who shall find something new at every look.
                if time.monotonic() - looked >= LOOK_SECONDS - BEAT_SECONDS:
                    looked = time.monotonic()
                    self._announced = self._store.check([_LOST])
                    self._seen = self._read(self._watched)
        if self._in_order:
            with contextlib.suppress(RuntimeError):
                self._store.set(_key(self._rank), _ENDED.decode())

    def _judge(self) -> None:
        """Judge what was received; in a thread of its own, because the store may not answer."""
        silence, last, unanswered = Silence(LOOKS), None, 0
        while not self._closing.wait(LOOK_SECONDS):
            if self._main is None:
                silence = Silence(LOOKS)
                continue
            seen = self._seen
            # A store that does not answer says little about the others: its launcher may have been
            # suspended. But it may also be gone, with the machine of rank 0.
            unanswered = unanswered + 1 if seen is last else 0
            if unanswered and (self._rank == 0 or unanswered < _LOOKS_WITHOUT_STORE):
                continue
            last = seen
            lost = silence.lost(seen, _position(self._main))
            waits = self._announced and silence.still >= _LOOKS_FOR_MAIN_THREAD
            if (lost or waits) and self._deciding.acquire(blocking=False):
                if self._main is not None:  # it has not left the context meanwhile
                    self._end()
                self._deciding.release()

    def _end(self) -> None:
        """End this process as ``ProcessLostError`` would; return if all processes are there."""
        seconds = LOOKS * LOOK_SECONDS
        error = self._verdict(f"no sign of life for {seconds:g} seconds", ended=False)
        if error is None:
            return
        try:
            if error.prints:
                # Past sys.stderr, whose lock the main thread may hold; below a progress bar.
                start = "\n" if os.isatty(2) else ""
                with contextlib.suppress(OSError):  # nobody may be there to read it
                    os.write(2, f"{start}error: {error}\n".encode(errors="replace"))
            record = self._record
            if record:
                record(error)
        finally:
            os._exit(error.exit_code)  # the main thread cannot raise: it may wait in the device

    # ------------------------------------------------------------ who is lost

    def _verdict(self, reason: str, ended: bool) -> ProcessLostError | None:
        """Return who is lost, as all processes name it; None if nobody is.

        Args:
            reason: why we think so.
            ended: whether a process that ended in order counts, if no other is missing.
        """
        # Without the store there is no agreement: the first process of each machine prints.
        who = "rank 0" if self._rank else "another process"
        prints = self._rank == 1 or launched_local_rank() == 0
        found = [ProcessLostError(_text(who, reason), prints)]

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                found[:] = self._agreed(reason, ended)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_SECONDS_TO_ANSWER)
        return found[0] if found else None

    def _agreed(self, reason: str, ended: bool) -> list[ProcessLostError]:
        """Return what was announced, or else announce who is lost; empty if nobody is."""
        if self._store.check([_LOST]):
            announced = self._store.get(_LOST)
        else:
            lost = self._stopped(ended)
            if not lost:
                return []
            text = _text(", ".join(f"rank {rank}" for rank in lost), reason)
            announced = self._store.compare_set(_LOST, "", f"{self._rank} {text}")
        by, _, text = announced.decode().partition(" ")
        return [ProcessLostError(text, prints=int(by) == self._rank)]

    def _stopped(self, ended: bool) -> list[int]:
        """Return the ranks whose heartbeat has stopped."""
        before = self._read(self._all)
        time.sleep(6 * BEAT_SECONDS)
        after = self._read(self._all)
        stopped = [rank for rank in self._all if before[rank] == after[rank]]
        missing = [rank for rank in stopped if after[rank] != _ENDED]
        return missing or (stopped if ended else [])

    def _read(self, ranks: Sequence[int]) -> dict[int, bytes]:
        """Return the newest heartbeat of each rank; empty before the first."""
        keys = [_key(rank) for rank in ranks]
        if self._store.check(keys):
            return dict(zip(ranks, self._store.multi_get(keys), strict=True))
        return {
            rank: self._store.get(key) if self._store.check([key]) else b""
            for rank, key in zip(ranks, keys, strict=True)
        }


def connect(timeout: timedelta, label: str) -> Any:
    """Return a connection of our own to the launcher's store.

    On the connection of the process group, heartbeats would wait while the main thread waits for a
    key, as it does when NCCL starts.

    Args:
        timeout: for connecting.
        label: keeps the heartbeats of this run apart from those of an earlier one.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        address = store.host, store.port
        store = TCPStore(*address, is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(f"alive-{label}", store)


def _key(rank: int) -> str:
    return str(rank)


def _text(who: str, reason: str) -> str:
    return f"{who} stopped responding, so the run ends ({reason})"


def _position(thread: int) -> list[tuple[int, int]]:
    """Return where a thread is: the instruction of each of its frames.

    A loop may be found at the same instruction again, so equal positions do not prove a wait.
    """
    frame, found = sys._current_frames().get(thread), []
    while frame:
        found.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return found
