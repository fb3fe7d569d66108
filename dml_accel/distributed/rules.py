"""What ``auto`` chooses for speed: fixed rules, so that equal commands choose alike.

Nothing is timed here. The rates and shares below follow from benchmarks/speed.md and
benchmarks/processes.md: pairs of ResNet-32 on two cores, with the machine, the versions and the
command. They decide when a choice repays what it costs, and need not be exact for that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dml_accel.core.updates import UpdateSchedule
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.plan import Machine, StepLoad, allocate, everywhere, predict

# Of one thread, training in single precision.
_MACS_PER_SECOND = 30e9
# Two threads train a network 1.79 times as fast as one; more are extrapolated by Amdahl's law.
_SERIAL_SHARE = 0.117
# Processes of one machine share caches and memory: a step must be predicted to be so much shorter.
_LEAST_GAIN = 0.05
# Processes start one after the other import their libraries and read the images again.
_SECONDS_TO_START = 15.0
# Compiled, a network takes so much less of a step in single precision; in bf16 it gains nothing.
_COMPILED_SAVES = 0.15
# To compile a network, for each operation of its forward pass; and to find it compiled for a peer.
_SECONDS_TO_COMPILE, _SECONDS_TO_FIND = 0.5, 0.05


@dataclass(frozen=True)
class Work:
    """What a command is going to compute, over all of its runs.

    Attributes:
        costs: of each peer.
        load: of an optimizer step.
        steps: optimizer steps.
    """

    costs: Mapping[str, Cost]
    load: StepLoad
    steps: int

    def seconds(self, threads: int) -> float:
        """Return the predicted seconds of all steps in one process of so many threads."""
        ranks = everywhere(self.costs, 1)
        return self.steps * predict(ranks, self.costs, self.load, _process(threads)).step_seconds


def processes_to_start(work: Work, schedule: UpdateSchedule, cores: int) -> int:
    """Return how many processes train a cohort fastest on the CPU of one machine; 1 for no others.

    Each trains peers of its own (``split``), with an equal share of the cores. Networks exchange
    logits only, while the threads of one process wait for each other at every operation.

    Args:
        work: of the command.
        schedule: how peers take turns.
        cores: that may be used.
    """
    if schedule.takes_turns:
        return 1
    macs = {name: float(cost.macs) for name, cost in work.costs.items()}
    seconds = {1: work.seconds(cores) * (1 - _LEAST_GAIN)}
    # Each process needs an image of every micro-batch.
    for count in range(2, min(len(macs), cores, *work.load.micro_batches) + 1):
        ranks, machine = allocate(macs, count), _process(cores // count)
        step = predict(ranks, work.costs, work.load, machine).step_seconds
        seconds[count] = work.steps * step + _SECONDS_TO_START
    return min(seconds, key=lambda count: seconds[count])


def seconds_saved(work: Work, kinds: Mapping[str, str], threads: int) -> float:
    """Return what compiling networks saves in single precision on a CPU, less what it takes.

    Args:
        work: of the peers that only this process trains.
        kinds: their architectures, by name: each is compiled once, and found for further peers.
        threads: of this process.
    """
    operations = {kind: work.costs[name].operations for name, kind in kinds.items()}
    compiling = _SECONDS_TO_COMPILE * sum(operations.values())
    finding = _SECONDS_TO_FIND * sum(work.costs[name].operations for name in kinds)
    return _COMPILED_SAVES * work.seconds(threads) - compiling - finding


def _process(threads: int) -> Machine:
    """Return the rates of a process with so many threads."""
    speedup = 1 / (_SERIAL_SHARE + (1 - _SERIAL_SHARE) / threads)
    return replace(Machine(), macs_per_second=_MACS_PER_SECOND * speedup)
