"""Compilation of networks by torch.compile: whether it pays, and what happens where it fails.

Compiled and eager kernels add up in different orders: a compiled run equals the eager one as two
partitions equal each other, and itself bit for bit.
"""

import contextlib
import copy
import logging
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, is_compiled_module
from torch import nn

from dml_accel.core.config import Config
from dml_accel.data.batches import lay_weights, memory_format
from dml_accel.distributed.processes import memory_ran_short
from dml_accel.models.spec import PeerSpec, optimizer

_SHORTEST = 600.0  # seconds: compiling one network takes from 20 seconds to minutes
_TIMED_STEPS = 5


@contextlib.contextmanager
def switched(accelerator: Accelerator, on: bool, mode: str) -> Iterator[None]:
    """Let Accelerate's dynamo plugin compile, or not, what is prepared within the context."""
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

    # Dropout draws what it draws in an eager run; the key is set before each forward pass.
    inductor.fallback_random = True
    # Every peer and every size of a part of a batch is one: running out of them must not be silent.
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 256, True
    dynamo.accumulated_recompile_limit = 1024
    # Kernels are chosen without timing them: a run that goes on must take the same. On a CPU only
    # max-autotune times any, and the flag keeps kernels apart that save a tenth of a step together.
    inductor.deterministic = device.type != "cpu" or mode != "default"
    # Machines without a GPU are told on every start that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def tried(net: nn.Module, name: str, attempt: Callable[[nn.Module], object]) -> nn.Module:
    """Return a network that was prepared for compilation, or its eager one where it fails, aloud.

    Args:
        net: the network; one that is not compiled is returned as it is.
        name: of the peer.
        attempt: a pass through it, without effect, that compiles it.

    Raises:
        RuntimeError, MemoryError: memory ran short, which is no fault of the compiler's.
    """
    if not is_compiled_module(net):
        return net
    try:
        attempt(net)
    except Exception as error:  # every part of the compiler raises its own kinds
        if memory_ran_short(error):
            raise
        reason = " ".join(str(error).split())[:200]
        text = f"--compile: {name} runs eagerly, as compiling it fails: {reason}"
        print(text, file=sys.stderr, flush=True)
        return typing.cast(nn.Module, net._orig_mod)
    return net


def seconds_saved(
    specs: Sequence[PeerSpec],
    modules: Mapping[str, nn.Module],
    config: Config,
    steps: int,
    accelerator: Accelerator,
) -> float:
    """Return what compiling saves over some steps less what it takes, by measured times; say it.

    Each architecture is timed once, eagerly and compiled, step by step in turns. What was compiled
    stays in torch's own cache, so that a run need not do it again.

    Args:
        specs: the peers that this process trains alone.
        modules: their networks, left as they are.
        config: batch and precision.
        steps: optimizer steps of the run, or of all runs alike.
        accelerator: device and precision.

    Returns:
        Seconds; 0 where the steps are too few to try it.
    """
    kinds = {spec.name: repr((spec.arch, spec.arguments)) for spec in specs}
    named = {kind: name for name, kind in kinds.items()}
    trials = {kind: _Trial(modules[name], config, accelerator) for kind, name in named.items()}
    if steps * sum(trials[kind].eager for kind in kinds.values()) < _SHORTEST:
        _say("the steps are too few to repay it")
        return 0.0
    found = {kind: trial.compare(named[kind]) for kind, trial in trials.items()}
    eager, compiled = (sum(found[kind][i] for kind in kinds.values()) for i in (0, 1))
    compiling = sum(seconds for _, _, seconds in found.values())
    _say(
        f"{1e3 * eager:.0f} ms a step eagerly, {1e3 * compiled:.0f} ms compiled, "
        f"{compiling:.0f} s to compile, {steps} steps"
    )
    return steps * (eager - compiled) - compiling


def _say(text: str) -> None:
    print(f"--compile auto: {text}", file=sys.stderr, flush=True)


class _Trial:
    """One network's step, timed on copies of it."""

    def __init__(self, module: nn.Module, config: Config, accelerator: Accelerator) -> None:
        self._module, self._config, self._accelerator = module, config, accelerator
        self._eager = self._prepared(compiled=False)
        self._step(*self._eager)
        self.eager = self._step(*self._eager)  # seconds of an optimizer step

    def _prepared(self, compiled: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        config = self._config
        module = copy.deepcopy(self._module)
        lay_weights(module, memory_format(config, self._accelerator.device))
        with switched(self._accelerator, compiled, config.compile_mode):
            net = self._accelerator.prepare_model(module, evaluation_mode=True)
        return net, optimizer(module, config)

    def _step(self, net: nn.Module, sgd: torch.optim.Optimizer) -> float:
        config, device = self._config, self._accelerator.device
        size, rows = config.image_size, config.batch_size // config.grad_accum
        like = next(net.parameters())
        images = like.new_empty(rows, 3, size, size).normal_()
        images = images.contiguous(memory_format=memory_format(config, device))
        start = time.perf_counter()
        sgd.zero_grad()
        net(images).float().logsumexp(1).mean().backward()
        sgd.step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) * config.grad_accum

    def compare(self, name: str) -> tuple[float, float, float]:
        """Return seconds of an eager step, of a compiled one, and those that compiling took."""
        net, sgd = self._prepared(compiled=True)
        start = time.perf_counter()
        net = tried(net, name, lambda net: self._step(net, sgd))
        compiling = time.perf_counter() - start
        times = [(self._step(*self._eager), self._step(net, sgd)) for _ in range(_TIMED_STEPS)]
        return median(a for a, _ in times), median(b for _, b in times), compiling
