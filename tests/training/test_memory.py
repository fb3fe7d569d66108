"""Memory: one network's activations at a time, and what is said where it runs short."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dml_accel.core.config import Config, UsageError
from dml_accel.distributed.processes import MemoryShortError, remedy_of_short_memory
from tests.conftest import Training, assert_same_state, tiny_config
from tests.test_engine import run

ROOT = Path(__file__).parents[2]
Build = Callable[..., Training]
DROPPING = "timm:resnet10t[drop_rate=0.3]"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cohort": ("resnet8", DROPPING), "image_size": 32},
        {"grad_accum": 3, "clip_norm": 0.5},
        {"float64": False},
        {"labelled_fraction": 0.3},
        {"links": "ring", "cohort": ("resnet8*3",)},
    ],
    ids=str,
)
def test_low_memory_is_the_same_bit_for_bit(training: Build, changes: dict) -> None:
    whole, low = training(**changes), training(**changes, low_memory=True)
    for a, b in zip(run(whole, 3), run(low, 3), strict=True):
        assert torch.equal(a, b)
    for name, state in whole.states().items():
        assert_same_state(state, low.states()[name])


def test_channels_last_steps_are_the_contiguous_steps(training: Build) -> None:
    # 30 steps, within 1e-9: the same sums in another order.
    flat = training(lr=0.001, memory_format="contiguous")
    last = training(lr=0.001, memory_format="channels_last")
    weight = last.peers[0].module.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    for a, b in zip(run(flat, 30), run(last, 30), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for name, state in flat.states().items():
        for key, value in state.items():
            # Momentum is a gradient, in which 1e-9 is less than rounding through the layers.
            close = 1e-7 if key.startswith("momentum") else 1e-9
            torch.testing.assert_close(last.states()[name][key], value, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("changes", "forwards"),
    [
        ({"low_memory": True}, {True: 3, False: 3}),
        ({}, {True: 3, False: 0}),
        ({"low_memory": True, "kl_weight": 0.0}, {True: 3, False: 0}),
    ],
    ids=str,
)
def test_one_network_at_a_time_holds_activations(
    training: Build, changes: dict, forwards: dict[bool, int]
) -> None:
    # Forward passes with and without a graph, and how many graphs there are at once.
    it = training(cohort=("resnet8*3",), **changes)
    counted, held, most = {True: 0, False: 0}, set(), 0

    def forward(module: torch.nn.Module, *_: object) -> None:
        nonlocal most
        counted[torch.is_grad_enabled()] += 1
        if torch.is_grad_enabled():
            held.add(module)
            most = max(most, len(held))

    for peer in it.peers:
        peer.module.register_forward_hook(forward)
        first = next(peer.module.parameters())
        first.register_hook(lambda _, module=peer.module: held.discard(module))
    run(it, 1)
    assert counted == forwards
    assert most == (1 if changes else 3)


def test_running_statistics_move_once(training: Build) -> None:
    it = training(low_memory=True)
    run(it, 2)
    for peer in it.peers:
        counts = {b.item() for n, b in peer.module.named_buffers() if "num_batches" in n}
        assert counts == {2}


@pytest.mark.parametrize("update", ["sequential", "official"])
def test_schedules_with_turns_refuse_it(update: str) -> None:
    with pytest.raises(UsageError, match=f"--low-memory cuts .*{update}"):
        Config(update=update, low_memory=True)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
@pytest.mark.parametrize(
    ("changes", "alone", "says"),
    [
        ({}, False, "short: --low-memory keeps .*; --grad-accum 2 .*; a smaller --batch-size than"),
        ({}, True, "short: --grad-accum 2 computes .*; a smaller --batch-size than 8"),
        ({"update": "official"}, False, "short: --grad-accum 2 .*; a smaller --batch-size than 8"),
        ({"update": "sequential"}, False, "short: a smaller --batch-size than 8"),
        ({"grad_accum": 5}, True, "short: a smaller --batch-size than 8"),
    ],
    ids=str,
)
def test_where_memory_runs_short_a_way_out_is_named(
    error: Exception, changes: dict, alone: bool, says: str
) -> None:
    with (
        pytest.raises(MemoryShortError, match=says),
        remedy_of_short_memory(tiny_config(**changes), alone),
    ):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="other"), remedy_of_short_memory(tiny_config(), False):
        raise RuntimeError("other")


LIMITED = """
import resource, sys
from dml_accel.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 700_000_000,) * 2)
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_run_without_memory_says_what_to_do(tmp_path: Path) -> None:
    # A ResNet-8's activations for 1,400 images are over 2 GB.
    words = (
        "train --cohort resnet8*2 --dataset digits --batch-size 1400 --cpu --epochs 1 --output-dir"
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words.split(), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "error: memory ran short: --low-memory keeps" in done.stderr
    assert "Traceback" not in done.stderr
