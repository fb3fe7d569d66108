"""torch.compile for networks: its settings, and what happens if it fails.

Compiled and eager kernels add up in different orders: a compiled run equals the eager one as two
placements equal each other, and equals itself bit for bit.
"""

import contextlib
import functools
import logging
import sys
import typing
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_compiled_module  # not exported before accelerate 1.10
from torch import nn

from dml_accel.core.errors import one_line
from dml_accel.core.versions import torch_release
from dml_accel.distributed.processes import is_out_of_memory


@contextlib.contextmanager
def compiling(accelerator: Accelerator, on: bool, mode: str) -> Iterator[None]:
    """Make Accelerate compile the networks that are prepared within the context, or not."""
    plugin = accelerator.state.dynamo_plugin
    plugin.backend = DynamoBackend.INDUCTOR if on else DynamoBackend.NO
    plugin.mode, plugin.dynamic = mode, False
    if on:
        _configure(accelerator.device, mode)
    try:
        yield
    finally:
        plugin.backend = DynamoBackend.NO


def _configure(device: torch.device, mode: str) -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    # Dropout draws what it draws in an eager run; its key is set before each forward pass.
    inductor.fallback_random = True
    # Every peer and every size of a micro-batch is a graph: exceeding the limit must not be silent.
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # 2.6
    fails = f"fail_on_{limit.replace('_size', '')}_hit"
    for name, value in {limit: 256, fails: True, f"accumulated_{limit}": 1024}.items():
        setattr(dynamo, name, value)
    # Kernels may not be chosen by timing: a resumed run must get the same ones. On a CPU only
    # max-autotune times any, and the flag prevents fusions that save a tenth of a step.
    times_kernels = device.type != "cpu" or mode != "default"
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = times_kernels
    elif times_kernels:
        _say_that_kernels_are_timed()
    # Without this, machines that have no GPU are told so at every start.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@functools.cache  # once, for all networks
def _say_that_kernels_are_timed() -> None:
    print(
        f"--compile: torch {torch.__version__} chooses some kernels by timing them: a resumed run "
        "may differ in its last bits",
        file=sys.stderr,
        flush=True,
    )


def or_eager(net: nn.Module, name: str, attempt: Callable[[nn.Module], object]) -> nn.Module:
    """Return a network that was prepared for compilation, or the eager one if compiling fails.

    Args:
        net: the network; one that is not compiled is returned as it is.
        name: of the peer, for the message.
        attempt: a pass through the network, without effect, that compiles it.

    Raises:
        RuntimeError, MemoryError: memory ran out, which is not the compiler's fault.
    """
    if not is_compiled_module(net):
        return net
    try:
        attempt(net)
    except Exception as error:  # every part of the compiler raises its own kinds
        if is_out_of_memory(error):
            raise
        reason = one_line(error)[:200]
        text = f"--compile: {name} runs eagerly because it cannot be compiled: {reason}"
        print(text, file=sys.stderr, flush=True)
        return typing.cast(nn.Module, net._orig_mod)
    return net


def adds_up_in_pairs() -> bool:
    """Whether torch's compiler for CPUs adds up in pairs, which is exact in any layout.

    2.14 does. In channels last, 2.6 adds up all pixels of a channel one after the other, as torch's
    own kernels do; releases between were not measured.
    """
    return torch_release() >= (2, 14)


def has_compiler() -> bool:
    """Whether this machine has the C++ compiler that torch compiles with for CPUs."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to import

    try:
        return bool(get_cpp_compiler())
    except Exception:  # of a kind that torch's versions do not agree on
        return False
