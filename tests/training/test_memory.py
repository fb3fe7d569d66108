"""Memory: one network's activations at a time, and what to do if it runs out."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.training import loop, setup
from tests.helpers import DIGITS, Training, assert_same_state, run_program, train

Build = Callable[..., Training]
DROPPING = "timm:resnet10t[drop_rate=0.3]"
PAIR = ["--cohort", "resnet8*2", "--compile", "off", *DIGITS]


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
    for a, b in zip(whole.take(3), low.take(3), strict=True):
        assert torch.equal(a, b)
    for name, state in whole.states().items():
        assert_same_state(state, low.states()[name])


def test_channels_last_steps_are_the_contiguous_steps(training: Build) -> None:
    # 30 steps, within 1e-9: the same sums in another order.
    flat = training(lr=0.001, memory_format="contiguous")
    last = training(lr=0.001, memory_format="channels_last")
    weight = last.peers[0].module.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    for a, b in zip(flat.take(30), last.take(30), strict=True):
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
def test_one_network_at_a_time_keeps_activations(
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
    it.take(1)
    assert counted == forwards
    assert most == (1 if changes else 3)


def test_running_statistics_move_once(training: Build) -> None:
    it = training(low_memory=True)
    it.take(2)
    for peer in it.peers:
        counts = {b.item() for n, b in peer.module.named_buffers() if "num_batches" in n}
        assert counts == {2}


@pytest.mark.parametrize("update", ["sequential", "official"])
def test_schedules_with_turns_refuse_low_memory(update: str) -> None:
    with pytest.raises(
        UsageError, match=f"--low-memory works with --update simultaneous only, not with {update}"
    ):
        Config(update=update, low_memory=True)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "--low-memory keeps .*; --grad-accum 2 .*; a --batch-size below 8"),
        ("--low-memory", "--grad-accum 2 uses .*; a --batch-size below 8"),
        ("--update official", "--grad-accum 2 .*; a --batch-size below 8"),
        ("--update sequential", "a --batch-size below 8"),
        ("--grad-accum 5 --low-memory", "a --batch-size below 8"),
    ],
)
def test_running_out_of_memory_names_the_flags_that_need_less(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    flags: str,
    says: str,
) -> None:
    monkeypatch.setattr(loop, "train_step", failing(error))
    assert train(tmp_path, *PAIR, *flags.split()) == 1
    assert re.search(f"^error: out of memory: {says}", capsys.readouterr().err, re.MULTILINE)


def test_images_that_do_not_fit_name_the_flags_that_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "prepare_images", failing(torch.OutOfMemoryError("of CUDA")))
    assert train(tmp_path, *PAIR) == 1
    says = "^error: out of memory: all images .* memory of cpu: an --image-size below 8 or a --tr"
    assert re.search(says, capsys.readouterr().err, re.MULTILINE)


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", failing(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        train(tmp_path, *PAIR)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


LIMITED = """
import resource, sys
import dml_accel.training.train  # the limit is for the run, not for the libraries
from dml_accel.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 700_000_000,) * 2)
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_run_without_memory_says_what_to_do(tmp_path: Path) -> None:
    # A ResNet-8's activations for 1,400 images are over 2 GB.
    words = "train --cohort resnet8*2 --dataset digits --batch-size 1400 --cpu --epochs 1".split()
    done = run_program(sys.executable, "-c", LIMITED, *words, "--output-dir", tmp_path / "run")
    assert done.returncode == 1
    assert "error: out of memory: --low-memory keeps" in done.stderr
    assert "Traceback" not in done.stderr
