"""Which processes of a run are alive, and how a run ends that has lost one.

Every process counts up a key of its own in the launcher's store, from a thread, because collectives
block the main one. Each looks at the key of the next rank, and the last one at that of rank 0: a
look is a few requests for each process, however many there are. The process before a run of dead
ranks is alive, so that the loss of a whole machine is found as well. Who finds a loss reads all
keys and announces who is lost, so that all processes name the same ranks and one of them prints.

Where a collective fails, ``Processes.watching`` asks who is lost. With NCCL it may never fail: the
main thread waits inside CUDA. Then a second thread ends the process.

A process that is alive but slow is waited for, and named: each heartbeat says how many collectives
the process has come to, and whether it waits in one.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dml_accel.core.errors import ProcessLostError
from dml_accel.core.tables import ranges
from dml_accel.distributed.launch import launched_local_rank

BEAT_SECONDS = 0.5
LOOK_SECONDS = 2.0
# A process whose main thread holds Python's lock, or that gets no processor, sends nothing although
# it is alive. After 20 seconds it counts as lost. More would be too late: a launcher that has seen
# a process die kills the others after 30.
LOOKS = 10
_LOOKS_FOR_MAIN_THREAD = 3  # to stand still, once another process has announced a loss
_LOOKS_WITHOUT_STORE = 60
_SECONDS_TO_READ = 3.0  # between two readings of all heartbeats: each has changed, or has stopped
_SECONDS_TO_INQUIRE = 4.5  # of another process, which reads them
# Two that inquire may die before we do; a request to a store behind a broken link never returns.
_SECONDS_TO_ANSWER = 2 * _SECONDS_TO_INQUIRE + 2 * _SECONDS_TO_READ
_LOOKS_TO_WAIT = 5  # in one collective, before the slow processes are named, and between readings
_LOOKS_BETWEEN_LINES = 30
_NAMES_AT_MOST = 8  # more ranks are named as ranges
_ENDED = b"ended"
_LOST = "lost"

Record = Callable[[ProcessLostError], None]


@dataclass(frozen=True)
class Beat:
    """One heartbeat, as it is written: ``COUNT COLLECTIVES PLACE``.

    Attributes:
        count: of this process's heartbeats.
        collectives: of all processes, that this one has come to.
        place: of its main thread: ``waits``, ``works``, or ``away`` from what others wait for.
    """

    count: int
    collectives: int
    place: str

    @classmethod
    def read(cls, written: bytes) -> Self | None:
        """Return a heartbeat; None before the first, and after the end."""
        if written in (b"", _ENDED):
            return None
        count, collectives, place = written.decode().split()
        return cls(int(count), int(collectives), place)

    def __str__(self) -> str:
        """Return what is written."""
        return f"{self.count} {self.collectives} {self.place}"


def behind(before: Mapping[int, bytes], after: Mapping[int, bytes]) -> list[int]:
    """Return the ranks that the others wait for, of those that are alive.

    These have come to the fewest collectives and do not wait in one themselves. If each of them
    waits, then for another of them, and all are behind. Nobody is if those are everyone.

    Args:
        before: the heartbeat of every rank, at an earlier look.
        after: the newest.
    """
    found = {rank: Beat.read(beat) for rank, beat in after.items() if beat != before[rank]}
    beats = {rank: beat for rank, beat in found.items() if beat and beat.place != "away"}
    fewest = min((beat.collectives for beat in beats.values()), default=0)
    last = {rank: beat.place for rank, beat in beats.items() if beat.collectives == fewest}
    working = [rank for rank, place in last.items() if place == "works"]
    return working or (list(last) if len(last) < len(beats) else [])


class Silence:
    """Counts looks at the heartbeat of another process that found no change.

    Looks are counted instead of seconds: a process that was suspended itself has not looked.

    Args:
        looks: in a row without a change, after which the other process is lost.

    Attributes:
        still: looks in a row that found our main thread where it was.
    """

    def __init__(self, looks: int) -> None:
        self._looks = looks
        self._silent = 0
        self._beat: bytes | None = None
        self._position: object = None
        self.still = 0

    def is_lost(self, beat: bytes, position: object) -> bool:
        """Take a look; return whether the other process is lost.

        It is not while our main thread moves: that does not wait for a lost process yet.

        Args:
            beat: the newest heartbeat.
            position: where our main thread is; equal if it has not moved.
        """
        self.still = self.still + 1 if position == self._position else 0
        self._position = position
        self._silent = self._silent + 1 if beat == self._beat and beat != _ENDED else 0
        self._beat = beat
        return min(self.still, self._silent) >= self._looks


class Waiting:
    """When to look for slow processes while our main thread waits, and when to name them.

    Attributes:
        reads: whether the heartbeats of all are wanted now. They are at two looks in a row, because
            those of a process that is alive change.
    """

    def __init__(self) -> None:
        self.reads = False
        self._named, self._quiet = "", _LOOKS_BETWEEN_LINES

    def names(self, waited: int, slow: str) -> bool:
        """Take a look; return whether to name the slow processes now.

        Args:
            waited: looks in a row that found our main thread waiting in one place.
            slow: names of the slow processes, by the last two readings; empty if there are none.
        """
        self.reads = (waited + 2) % _LOOKS_TO_WAIT < 2 <= waited
        self._quiet += 1
        if waited < _LOOKS_TO_WAIT:
            self._named = ""
            return False
        if slow in ("", self._named) or self._quiet < _LOOKS_BETWEEN_LINES:
            return False
        self._named, self._quiet = slow, 0
        return True


class Liveness:
    """The heartbeat of this process, and its look at those of others.

    Args:
        rank: of this process.
        world_size: how many processes there are.
        store: that all of them reach; see ``connect``.
        timeout: of a collective.

    Attributes:
        collectives: of all processes, that this one has come to; counted by the caller.
    """

    def __init__(self, rank: int, world_size: int, store: Any, timeout: timedelta) -> None:
        self._rank, self._store, self._timeout = rank, store, timeout
        self._all, self._next = range(world_size), (rank + 1) % world_size
        self.collectives = 0
        self._seen, self._looks = b"", 0  # the heartbeat of the next rank, at the last look
        self._announced = False
        self._waiting = Waiting()
        self._everyone, self._slow = dict.fromkeys(self._all, b""), ""
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
        with contextlib.suppress(RuntimeError):
            self._store.set(_host_key(self._rank), socket.gethostname())
        while not self._closing.wait(BEAT_SECONDS):
            with contextlib.suppress(RuntimeError):  # the next request may succeed again
                count += 1
                beat = Beat(count, self.collectives, _place(self._main))
                self._store.set(_key(self._rank), str(beat))
                # A little sooner than the judge, who shall find something new at every look.
                if time.monotonic() - looked >= LOOK_SECONDS - BEAT_SECONDS:
                    looked = time.monotonic()
                    self._announced = self._store.check([_LOST])
                    self._seen = self._read([self._next])[self._next]
                    self._looks += 1
                    if self._waiting.reads:
                        self._slow = self._who_is_slow()
        if self._in_order:
            with contextlib.suppress(RuntimeError):
                self._store.set(_key(self._rank), _ENDED.decode())

    def _judge(self) -> None:
        """Judge what was received; in a thread of its own, because the store may not answer."""
        silence, last, unanswered = Silence(LOOKS), 0, 0
        while not self._closing.wait(LOOK_SECONDS):
            if self._main is None:
                silence = Silence(LOOKS)
                continue
            looks = self._looks
            # A store that does not answer says little about the others: its launcher may have been
            # suspended. But it may also be gone, with the machine of rank 0.
            unanswered = unanswered + 1 if looks == last else 0
            if unanswered and (self._rank == 0 or unanswered < _LOOKS_WITHOUT_STORE):
                continue
            last = looks
            lost = silence.is_lost(self._seen, _position(self._main))
            self._name_slow(silence.still)
            waits = self._announced and silence.still >= _LOOKS_FOR_MAIN_THREAD
            if (lost or waits) and self._deciding.acquire(blocking=False):
                if self._main is not None:  # it has not left the context meanwhile
                    self._end()
                self._deciding.release()

    def _name_slow(self, still: int) -> None:
        """Name the processes that are waited for: rank 0 does, or rank 1 if 0 is one of them.

        Args:
            still: looks in a row that found our main thread in one place.
        """
        if self._rank > 1:
            return
        waited = still if _place(self._main) == "waits" else 0
        if self._waiting.names(waited, self._slow):
            minutes = self._timeout.total_seconds() / 60
            _say(
                f"waiting for {self._slow} for {waited * LOOK_SECONDS:g} seconds: alive but behind;"
                f" --timeout ends the run after {minutes:g} minute{'s' * (minutes != 1)}"
            )

    def _who_is_slow(self) -> str:
        """Return the names of the processes that are behind; empty if we are not to name them."""
        before, self._everyone = self._everyone, self._read(self._all)
        ranks = behind(before, self._everyone)
        if self._rank in ranks or (self._rank > 0 and 0 not in ranks):
            return ""
        keys = [_host_key(rank) for rank in ranks]
        if not ranks or len(ranks) > _NAMES_AT_MOST or not self._store.check(keys):
            return named(ranks)
        hosts = self._store.multi_get(keys)
        return ", ".join(
            f"rank {rank} (host {host.decode()})" for rank, host in zip(ranks, hosts, strict=True)
        )

    def _end(self) -> None:
        """End this process as ``ProcessLostError`` would; return if all processes are there."""
        seconds = LOOKS * LOOK_SECONDS
        error = self._verdict(f"no sign of life for {seconds:g} seconds", ended=False)
        if error is None:
            return
        try:
            if error.prints:
                _say(f"error: {error}")
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
        """Return what is announced, or else find out who is lost; empty if nobody is.

        One process reads the heartbeats of all, while the others wait for what it announces.
        """
        # Who ended in order counts in some inquiries only.
        inquiry, ours, awaited = f"inquiry-{ended}", str(self._rank).encode(), 0
        while not self._store.check([_LOST]):
            # The first inquiry may have begun before our collective failed, and the process may
            # have been alive then; the second has not.
            if awaited == 2:
                return []
            holder = self._store.compare_set(inquiry, "", ours.decode())
            if holder == ours:
                lost = self._stopped(ended)
                if lost:
                    text = f"{self._rank} {_text(named(lost), reason)}"
                    self._store.compare_set(_LOST, "", text)
                self._store.compare_set(inquiry, ours.decode(), "")
                if not lost:
                    return []
            else:
                awaited += self._ends_in_time(inquiry, holder)
        by, _, text = self._store.get(_LOST).decode().partition(" ")
        return [ProcessLostError(text, prints=int(by) == self._rank)]

    def _ends_in_time(self, inquiry: str, holder: bytes) -> bool:
        """Wait for the inquiry of another process; if it does not end, open it to others."""
        until = time.monotonic() + _SECONDS_TO_INQUIRE
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS)
            if self._store.get(inquiry) != holder:
                return True
        self._store.compare_set(inquiry, holder.decode(), "")
        return False

    def _stopped(self, ended: bool) -> list[int]:
        """Return the ranks whose heartbeat has stopped."""
        before = self._read(self._all)
        time.sleep(_SECONDS_TO_READ)
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


def _host_key(rank: int) -> str:
    return f"host-{rank}"


def named(ranks: Sequence[int]) -> str:
    """Return the names of ranks, ascending; more than a few as ranges: ``ranks 0-7, 12``."""
    if len(ranks) <= _NAMES_AT_MOST:
        return ", ".join(f"rank {rank}" for rank in ranks)
    return "ranks " + ranges(ranks).replace(" ", ", ")


def _say(line: str) -> None:
    """Print a line past sys.stderr, whose lock the main thread may hold; below a progress bar."""
    start = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # nobody may be there to read it
        os.write(2, f"{start}{line}\n".encode(errors="replace"))


def _text(who: str, reason: str) -> str:
    return f"{who} stopped responding, so the run ends ({reason})"


def _frames(thread: int) -> Iterator[FrameType]:
    """Yield the frames of a thread, the innermost first."""
    frame = sys._current_frames().get(thread)
    while frame:
        yield frame
        frame = frame.f_back


def _position(thread: int) -> list[tuple[int, int]]:
    """Return where a thread is: the instruction of each of its frames.

    A loop may be found at the same instruction again, so equal positions do not prove a wait.
    """
    return [(id(frame), frame.f_lasti) for frame in _frames(thread)]


def _place(thread: int | None) -> str:
    """Return where the main thread is (see ``Beat``); None if it does what nobody waits for.

    It may wait for others in a collective, and in a backward pass, which averages gradients.
    """
    if thread is None:
        return "away"
    modules = (frame.f_globals.get("__name__", "") for frame in _frames(thread))
    waits = any(name.startswith(("torch.distributed", "torch.autograd.graph")) for name in modules)
    return "waits" if waits else "works"
