"""What a run costs beside another one: steps and evaluations in forward passes of an image."""

from dataclasses import dataclass

from dml_accel.core.config import Config
from dml_accel.data import batches as data
from dml_accel.data.sources import Source
from dml_accel.models import spec as cohort
from dml_accel.training.agenda import steps_to_take


@dataclass(frozen=True)
class Workload:
    """What one run costs, in any unit that the runs of one display share."""

    steps: int
    step: float
    evaluations: int
    evaluation: float
    taken: int = 0  # steps that are behind it

    @property
    def total(self) -> float:
        """Cost of the whole run."""
        return self.steps * self.step + self.evaluations * self.evaluation

    @property
    def done(self) -> float:
        """Cost of what is behind it."""
        return (self.total - self.evaluation) * self.taken / self.steps


def workload(config: Config, source: Source, image_cost: float = 1.0, taken: int = 0) -> Workload:
    """Return what a run costs, in forward passes of an image times ``image_cost``.

    Backward passes count twice. Where evaluations follow the clock, the last one alone is counted.

    Args:
        config: the run.
        source: its images.
        image_cost: cost of a forward pass of one image through all networks.
        taken: optimizer steps that are behind it.
    """
    trained, held = data.check_sizes(source, config)
    steps = steps_to_take(config, trained)
    period = config.eval_interval.steps(trained // config.batch_size)
    evaluations = -(-steps // period) if period else 1
    evaluated = held + len(source.test)
    peers = len(cohort.parse(config.cohort))
    # Forward passes by all networks together, and a backward pass that costs two of them.
    passes = {"simultaneous": 3.0, "sequential": 3 + (peers - 1) / peers, "official": 2.0 + peers}
    step = passes[config.update] * config.batch_size * image_cost
    return Workload(steps, step, evaluations, evaluated * image_cost, taken)


def images_of_a_step(config: Config) -> int:
    """Images of an optimizer step, each counted once however many peers see it."""
    peers = len(cohort.parse(config.cohort))
    return config.batch_size * (peers if config.update == "official" else 1)
