"""What ``auto`` chooses for speed, from costs that are written down here."""

import pytest

from dml_accel.core.config import Config
from dml_accel.core.updates import UPDATE_SCHEDULES
from dml_accel.distributed import rules
from dml_accel.distributed.costs import Cost
from dml_accel.distributed.plan import StepLoad
from dml_accel.distributed.rules import Work, processes_to_start, seconds_saved

SIMULTANEOUS = UPDATE_SCHEDULES["simultaneous"]


def work(steps: int, *macs: float, kl_weight: float = 1.0) -> Work:
    """Return the work of peers, each with 100 operations a forward pass, at 10 images a step."""
    config = Config(cohort=(str(len(macs)),), batch_size=10, kl_weight=kl_weight)
    costs = {f"peer-{i}": Cost(int(one), 0, 0, 0, 0, operations=100) for i, one in enumerate(macs)}
    return Work(costs, StepLoad.of(config, classes=10), steps)


def test_the_seconds_of_a_run_follow_from_its_operations() -> None:
    # 10 images x 3 passes x 2e9 operations = 6e10 a step: two seconds of one thread.
    assert work(100, 1e9, 1e9).seconds(threads=1) == pytest.approx(200)
    assert work(100, 1e9, 1e9).seconds(threads=2) == pytest.approx(200 * (0.117 + 0.883 / 2))


@pytest.mark.parametrize(
    ("macs", "cores", "steps", "expected"),
    [
        ((1e9, 1e9), 2, 1000, 2),
        ((1e9, 1e9), 2, 50, 1),  # starting them takes longer than they save
        ((1e9, 1e9), 1, 1000, 1),
        ((1e9,), 4, 1000, 1),
        ((1e9, 1e9), 8, 1000, 2),  # of four threads each
        ((1e9, 1e9, 1e9), 2, 1000, 1),  # one process would wait half of each step
        ((2e9, 1e9, 1e9), 2, 1000, 2),
        ((1e9,) * 4, 2, 1000, 2),
        ((1e9,) * 4, 4, 1000, 4),
        ((4e9, 1e9), 2, 1000, 1),
    ],
)
def test_processes_are_started_where_their_loads_are_equal_and_the_run_is_long(
    macs: tuple[float, ...], cores: int, steps: int, expected: int
) -> None:
    assert processes_to_start(work(steps, *macs), SIMULTANEOUS, cores) == expected


def test_no_processes_are_started_where_peers_take_turns() -> None:
    pair = (1e9, 1e9)
    assert processes_to_start(work(1000, *pair), UPDATE_SCHEDULES["sequential"], 2) == 1
    assert processes_to_start(work(1000, *pair, kl_weight=0.0), SIMULTANEOUS, 2) == 2


def test_compiling_is_weighed_against_its_time() -> None:
    # Two seconds a step of one thread, of which compiling saves a share; 100 operations are
    # compiled once, or twice for two architectures, and found for each peer.
    pair, share = work(1000, 1e9, 1e9), 0.15
    alike, apart = {"peer-0": "a", "peer-1": "a"}, {"peer-0": "a", "peer-1": "b"}
    assert seconds_saved(pair, alike, threads=1) == pytest.approx(share * 2000 - 50 - 10)
    assert seconds_saved(pair, apart, threads=1) == pytest.approx(share * 2000 - 100 - 10)
    assert seconds_saved(work(10, 1e9, 1e9), alike, threads=1) < 0


def test_equal_work_is_chosen_for_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # No clock is read.
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(f"time.{name}", lambda: 1 / 0)
    found = {processes_to_start(work(1000, 1e9, 1e9), SIMULTANEOUS, 2) for _ in range(3)}
    assert found == {2}
    assert rules.seconds_saved(work(1, 1e9), {"peer-0": "a"}, 1) < 0
