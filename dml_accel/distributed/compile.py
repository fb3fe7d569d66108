"""torch.compile for networks: whether it pays, and what happens if it fails.

Compiled and eager kernels add up in different orders: a compiled run equals the eager one as two
placements equal each other, and equals itself bit for bit.
"""

import contextlib
import copy
import functools
import logging
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_compiled_module  # not exported before accelerate 1.10
from torch import nn

from dml_accel.core.config import OptimConfig
from dml_accel.core.errors import one_line
from dml_accel.data.batches import ImageFormat
from dml_accel.distributed.costs import seconds_of_step
from dml_accel.distributed.processes import is_out_of_memory
from dml_accel.models.build import set_memory_format
from dml_accel.models.optim import make_optimizer
from dml_accel.models.spec import PeerSpec

_SHORTEST = 600.0  # seconds of training: compiling a network takes from 20 seconds to minutes
_TIMED_STEPS = 5


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


class Trial:
    """Times the steps of networks eagerly and compiled, on copies of them.

    Args:
        accelerator: device and precision.
        optim: optimizer and batch.
        images: what the networks are given.
        mode: of torch.compile.
    """

    def __init__(
        self, accelerator: Accelerator, optim: OptimConfig, images: ImageFormat, mode: str
    ) -> None:
        self._accelerator, self._optim = accelerator, optim
        self._images, self._mode = images, mode

    def seconds_saved(
        self, specs: Sequence[PeerSpec], modules: Mapping[str, nn.Module], steps: int
    ) -> float:
        """Return what compiling saves over some steps, less the time that it takes; print it.

        Each architecture is timed once, alternating between eager and compiled steps. What was
        compiled stays in torch's own cache, so that the run need not compile it again.

        Args:
            specs: the peers that only this process trains.
            modules: their networks, left as they are.
            steps: optimizer steps of the run, or of all equal runs together.

        Returns:
            Seconds; 0 if the steps are too few to try.
        """
        kinds = {
            spec.name: repr((spec.arch, spec.arguments, self._optim.of_peer(spec.name)))
            for spec in specs
        }
        named = {kind: name for name, kind in kinds.items()}
        eager = {
            kind: self._prepared(modules[name], name, compiled=False)
            for kind, name in named.items()
        }
        for prepared in eager.values():
            self._step(*prepared)  # warm-up
        seconds = {kind: self._step(*prepared) for kind, prepared in eager.items()}
        if steps * sum(seconds[kind] for kind in kinds.values()) < _SHORTEST:
            _say("the run is too short to repay it")
            return 0.0
        found = {k: self._compare(modules[name], name, eager[k]) for k, name in named.items()}
        before, after = (sum(found[kind][i] for kind in kinds.values()) for i in (0, 1))
        once = sum(seconds for _, _, seconds in found.values())
        _say(
            f"{1e3 * before:.0f} ms per step eagerly, {1e3 * after:.0f} ms compiled, "
            f"{once:.0f} s to compile, {steps} steps"
        )
        return steps * (before - after) - once

    def _prepared(
        self, module: nn.Module, name: str, compiled: bool
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = copy.deepcopy(module)
        set_memory_format(module, self._images.layout)
        with compiling(self._accelerator, compiled, self._mode):
            net = self._accelerator.prepare_model(module, evaluation_mode=True)
        return net, make_optimizer(module, self._optim.of_peer(name))

    def _step(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Return the seconds of an optimizer step, all micro-batches included."""
        images = self._images.noise(self._optim.smallest_micro_batch)
        return seconds_of_step(net, optimizer, images) * self._optim.grad_accum

    def _compare(
        self, module: nn.Module, name: str, eager: tuple[nn.Module, torch.optim.Optimizer]
    ) -> tuple[float, float, float]:
        """Return the seconds of an eager and of a compiled step, and those that compiling took."""
        net, optimizer = self._prepared(module, name, compiled=True)
        start = time.perf_counter()
        net = or_eager(net, name, lambda net: self._step(net, optimizer))
        once = time.perf_counter() - start
        times = [(self._step(*eager), self._step(net, optimizer)) for _ in range(_TIMED_STEPS)]
        return median(a for a, _ in times), median(b for _, b in times), once


def _say(text: str) -> None:
    print(f"--compile auto: {text}", file=sys.stderr, flush=True)
