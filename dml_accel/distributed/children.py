"""Processes that a command starts by itself: copies of it, with the environment of torchrun.

    replace_by  for the command: from here on it waits for them, and ends with their exit code
    begin       for one of them: the first thing that it does

torch's elastic agent starts them, and ends all once one has failed. It runs in a thread: there it
handles no signals, which it would answer by killing everything after 30 seconds. The command passes
them on instead, and a step may take as long as it likes. No torch here until the agent is needed.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dml_accel.core.errors import OwnProcessesEndedError, RunError, one_line
from dml_accel.distributed import environment

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_SIGNAL_SECONDS = 0.5  # whoever sends one to a group of processes may send it to us as well
_LOOK_SECONDS = 1.0  # between two looks at whether the command is alive


# ---------------------------------------------------------------- in the command


def replace_by(count: int, arguments: Sequence[str], again: str) -> NoReturn:
    """Start ``count`` copies of this command and wait for them; they do all that is left to do.

    SIGINT, SIGTERM and SIGUSR1 are passed on; a second one ends everything at once.

    Args:
        count: of the processes.
        arguments: of the command, without the program's name.
        again: what resumes the run, for messages.

    Raises:
        OwnProcessesEndedError: always, with the exit code of this process.
        RunError: they could not be started.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    raise OwnProcessesEndedError(_Children(count, _program(arguments)).wait(again))


def can_repeat(arguments: Sequence[str]) -> bool:
    """Whether another process can be started as this one was, and then does the same.

    Not a program from the standard input, nor one that calls ``cli.main`` with words of its own and
    may have registered networks or methods before.
    """
    is_file = sys.argv[0] not in ("", "-")
    return is_file and list(arguments) in (sys.argv[1:], ["train", *sys.argv[1:]])


def _program(arguments: Sequence[str]) -> list[str]:
    """Return the command that does the same in another process, with the options of Python."""
    if can_repeat(arguments):
        return [sys.executable, *sys.orig_argv[1:]]
    return [sys.executable, "-m", "dml_accel", *arguments]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Within the context, processes that are started find who has started them, and this package.

    What the agent logs of failures, the children have said themselves.
    """
    before, disabled = dict(os.environ), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    os.environ |= {environment.OWN: str(os.getpid()), "PYTHONPATH": os.pathsep.join(paths)}
    try:
        yield
    finally:
        logging.disable(disabled)
        os.environ.clear()
        os.environ.update(before)


class _Children:
    """Copies of this command, the signals that are passed on to them, and how they have ended."""

    def __init__(self, count: int, program: Sequence[str]) -> None:
        self._count, self._program = count, program
        self._agent: Any = None
        self._ended = threading.Event()
        self._failures: Mapping[int, Any] = {}
        self._error: Exception | None = None
        self._signal: signal.Signals | None = None  # the first that was received, and when
        self._received = 0.0
        self._unsent: signal.Signals | None = None
        self._killed_by: signal.Signals | None = None  # the second one

    def wait(self, again: str) -> int:
        """Start the children, wait until all have ended, and return the exit code for this process.

        Args:
            again: see ``replace_by``.
        """
        # Only the main thread handles signals; elsewhere none is passed on.
        handles = threading.current_thread() is threading.main_thread()
        before = {one: signal.signal(one, self._receive) for one in _FORWARDED if handles}
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            while not self._ended.wait(_SAME_SIGNAL_SECONDS):
                self._send_unsent()  # it came before the children were there
            thread.join()
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        if self._error is not None:
            raise RunError(
                f"--processes {self._count}: they could not be started "
                f"({one_line(self._error)}); --processes 1 starts none"
            ) from self._error
        return self._exit_code(again)

    def _exit_code(self, again: str) -> int:
        """Return the exit code of the child that failed first, as shells report it; 0 if none has.

        A child that was killed cannot say so: it is named here.
        """
        if self._killed_by is not None:
            return 128 + self._killed_by
        if not self._failures:
            return 0
        rank, first = min(self._failures.items(), key=lambda one: one[1].timestamp)
        if first.exitcode >= 0:
            return int(first.exitcode)
        name = signal.Signals(-first.exitcode).name
        if self._signal == signal.SIGINT:
            print("interrupted", file=sys.stderr, flush=True)
        elif self._signal is None:
            print(
                f"error: rank {rank} of {self._count} was killed by {name}, so the run ends; "
                f"{again} resumes it",
                file=sys.stderr,
                flush=True,
            )
        return 128 - int(first.exitcode)

    # ------------------------------------------------------------ signals

    def _receive(self, number: int, _: object) -> None:
        if self._signal is None:
            self._signal, self._received = signal.Signals(number), time.monotonic()
            self._unsent = self._signal
        elif time.monotonic() - self._received > _SAME_SIGNAL_SECONDS:
            self._killed_by = signal.Signals(number)
            self._unsent = signal.SIGKILL
        self._send_unsent()

    def _send_unsent(self) -> None:
        """Pass a signal on that the children have not got, once all of them are there."""
        workers = self._agent.get_worker_group().workers if self._agent is not None else []
        pids = [worker.id for worker in workers]
        if self._unsent is None or len(pids) != self._count or None in pids:
            return
        number, self._unsent = self._unsent, None
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
                if number == signal.SIGKILL:  # and what it has started: each leads a group
                    os.killpg(pid, number)
                else:
                    os.kill(pid, number)

    # ------------------------------------------------------------ the thread of the agent

    def _run(self) -> None:
        try:
            # A child cannot handle SIGINT before it is ours: see ``begin``.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self._failures = self._run_agent()
        except Exception as error:
            self._error = error
        finally:
            self._ended.set()

    def _run_agent(self) -> Mapping[int, Any]:
        """Run the children to their end; return those that failed, by rank."""
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

        found = RendezvousParameters(
            backend="c10d",
            endpoint="localhost:0",  # a free port: other runs of this machine have their own
            run_id=str(uuid.uuid4()),
            min_nodes=1,
            max_nodes=1,
            local_addr="localhost",
        )
        # The agent wants a folder, though it writes nothing there.
        with _environment(), tempfile.TemporaryDirectory() as folder:
            spec = WorkerSpec(
                role="default",
                local_world_size=self._count,
                entrypoint=self._program[0],
                # The agent replaces ${local_rank} in them, and $$ by $.
                args=tuple(word.replace("$", "$$") for word in self._program[1:]),
                rdzv_handler=registry.get_rendezvous_handler(found),
                max_restarts=0,
                monitor_interval=0.1,
                local_addr="localhost",
            )
            self._agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder))
            try:
                return dict(self._agent.run().failures)
            finally:
                spec.rdzv_handler.shutdown()


# ---------------------------------------------------------------- in one of its processes


def begin() -> None:
    """Let this process end soon after the command that has started it; others are left alone.

    Call it before what takes long is imported. If the command was killed, this process is
    asked to stop, and so leaves a checkpoint. SIGINT, which the command passes on, ends it without
    a traceback until it can stop in order.
    """
    parent = environment.starter()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
