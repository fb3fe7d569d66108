"""The process of somebody else that a call runs in: what the call needs set, it puts back.

A command has its process for itself. A call finds what its caller has set, computes as the command
does all the same, and leaves everything as it was:

    threads, default dtype and device, autocast, gradients     of torch
    deterministic algorithms, precision of float32             of torch
    random numbers                                             of torch, numpy and Python
    environment variables, filters of warnings, SIGHUP         of the process

One thing stays: glibc goes on keeping freed memory, unless a run has ``return_memory``.
"""

import contextlib
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dml_accel.core.errors import UsageError
from dml_accel.core.host import ignoring_hangup
from dml_accel.core.streams import only_displayed
from dml_accel.distributed import environment
from dml_accel.distributed.launch import launched_processes

_running = threading.Lock()
_IEEE = "highest"
_NOT_SET: tuple[str, ...] = ("none", "ieee")


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within the context, torch computes as in a process of its own; then as it did before."""
    with contextlib.ExitStack() as stack:
        stack.callback(_put_back, dict(os.environ))  # the last of all: torch sets some of its own
        for get, put in _SETTINGS:
            stack.callback(_put, get, put, get())
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # the context costs a little in every call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_usual_precision())
        yield


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


# How each is read, and how it is set.
_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_deterministic, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
    _attribute(torch.backends.cudnn, "deterministic"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
]


def _put(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> None:
    if get() != value:  # setting some of them takes long
        put(value)


@contextlib.contextmanager
def _usual_precision() -> Iterator[None]:
    """Within the context, float32 has the precision that torch starts with."""
    backends: Any = torch.backends
    # Since torch 2.9 there are two interfaces; the older one cannot be read where the newer one
    # was used in a way that it cannot express.
    parts = {
        owner: [getattr(owner, name, None) for name in names]
        for owner, names in (
            (backends.cudnn, ("conv", "rnn")),
            (backends.mkldnn, ("matmul", "conv", "rnn")),
        )
    }
    usual_of = dict.fromkeys((backends, backends.cuda.matmul, *parts), _NOT_SET)
    usual_of |= dict.fromkeys(parts[backends.mkldnn], _NOT_SET)
    usual_of |= dict.fromkeys(parts[backends.cudnn], (*_NOT_SET, "tf32"))
    before = [(one, one.fp32_precision) for one in usual_of if hasattr(one, "fp32_precision")]
    matmul = convolutions = None
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    usual = all(value in usual_of[one] for one, value in before)
    if not (usual and matmul == _IEEE and convolutions):
        for one, _ in before:
            one.fp32_precision = "none"
        torch.set_float32_matmul_precision(_IEEE)
        backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for one, value in before:
            one.fp32_precision = value


def _put_back(variables: dict[str, str]) -> None:
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update({n: value for n, value in variables.items() if os.environ.get(n) != value})


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Put back at the end the state of the random numbers of torch, numpy and Python."""
    python, numpy = random.getstate(), np.random.get_state()
    started = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if started else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def borrowed(function: str) -> Iterator[None]:
    """Within the context, a call may do in this process what its command does in its own.

    Args:
        function: its name, for messages.

    Raises:
        UsageError: another call is running in another thread, gradients are off for good, or
            variables of a launcher make no sense.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError(f"{function} cannot run under torch.inference_mode(): leave it first")
    if not _running.acquire(blocking=False):
        raise UsageError(
            f"{function}: another call of dml_accel is running in this process, whose random "
            "numbers and precision it shares: wait for it, or start a process of its own"
        )
    try:
        with (
            warnings.catch_warnings(),
            own_settings(),
            random_numbers_kept(),
            torch.enable_grad(),
            only_displayed("stderr"),
            ignoring_hangup() if launched_processes() == 1 else contextlib.nullcontext(),
        ):
            environment.check()
            yield
    finally:
        _running.release()
