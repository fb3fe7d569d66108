"""What the plain command chooses by itself for the cohort that is measured."""

import torch

from benchmarks.competitors import THREADS, Mode
from benchmarks.measuring import networks
from benchmarks.workloads import configuration
from dml_accel.distributed.plan import StepLoad
from dml_accel.distributed.rules import Work, processes_to_start, seconds_saved
from dml_accel.training.setup import count_all, image_format

STEPS = 1000  # of the run for which it chooses


def chosen(classes: int, *, bf16: bool = False, steps: int = STEPS) -> Mode:
    """Return what ``python train.py --cohort 2`` chooses on as many cores as there are threads.

    Args:
        classes: of the images.
        bf16: whether ``--mixed-precision bf16`` is given, as the only flag.
        steps: of the run.
    """
    config = configuration(None, {"mixed_precision": "bf16" if bf16 else "no"})
    costs, load = count_all(config, networks(config, classes)), StepLoad.of(config, classes)
    count = processes_to_start(Work(costs, load, steps), config.method.schedule, THREADS)
    # The peers are equal: what pays for those of one process pays for all.
    mine = dict(list(costs.items())[: len(costs) // count])
    saved = seconds_saved(
        Work(mine, load, steps), dict.fromkeys(mine, "resnet32"), THREADS // count
    )
    layout = image_format(config, torch.device("cpu")).layout
    return Mode(bf16, saved > 0 and not bf16, layout == torch.channels_last, count)
