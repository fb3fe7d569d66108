"""Compiled networks: the same steps, whether it pays, what happens where it fails."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from accelerate.state import AcceleratorState
from accelerate.utils import is_compiled_module
from safetensors.torch import load_file
from timm.models import register_model
from torch import Tensor, nn

from dml_accel.cli import main
from dml_accel.core.config import Config
from dml_accel.data import sources
from dml_accel.distributed import compile as compiling
from dml_accel.distributed.processes import Processes
from dml_accel.training import setup as checking
from tests.conftest import Training, assert_same_state, tiny_config
from tests.test_engine import run

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
Build = Callable[..., Training]


class Small(nn.Module):
    """What takes a second to compile, with batch norm, dropout and a residual."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.body = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.norm(self.body(x)))
        return self.head(self.drop(x.mean((2, 3))))


@register_model
def small_for_compiling(pretrained: bool = False, num_classes: int = 10, **_: object) -> Small:
    net = Small(num_classes)
    net.pretrained_cfg = {"architecture": "small_for_compiling"}
    return net


PAIR = {"cohort": ("timm:small_for_compiling*2",)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, as a pool of compilers would outlive the test; nothing is left compiled."""
    with inductor.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


# ---------------------------------------------------------------- law 2


@pytest.mark.parametrize(
    "changes", [{}, {"grad_accum": 3}, {"low_memory": True}, {"update": "sequential"}], ids=str
)
def test_compiled_steps_are_the_eager_steps(training: Build, changes: dict) -> None:
    # 30 steps, within 1e-9; dropout draws the same.
    eager, compiled = training(**PAIR, **changes), training(**PAIR, **changes, compile="on")
    assert all(is_compiled_module(peer.net) for peer in compiled.peers)
    before = eager.states()
    for a, b in zip(run(eager, 30), run(compiled, 30), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    ours, theirs = eager.states(), compiled.states()
    for name in ours:
        for key, value in ours[name].items():
            torch.testing.assert_close(value, theirs[name][key], rtol=1e-9, atol=1e-9)
        assert not torch.equal(ours[name]["head.weight"], before[name]["head.weight"])


def test_compiling_leaves_no_trace_in_the_start(training: Build) -> None:
    eager, compiled = training(**PAIR), training(**PAIR, compile="on")
    for name, state in eager.states().items():
        assert_same_state(state, compiled.states()[name])


TINY = "--dataset digits --image-size 16 --batch-size 32 --lr 0.05 --train-limit 320 --cpu".split()


def test_an_interrupted_compiled_run_ends_bit_for_bit(tmp_path: Path) -> None:
    words = ["train", "--cohort", "timm:small_for_compiling*2", *TINY, "--compile"]
    assert main([*words, "--max-steps", "6", "--output-dir", str(tmp_path / "whole")]) == 0
    for steps in ("3", "6"):
        resumed = [*words, "--max-steps", steps, "--resume", "auto"]
        assert main([*resumed, "--output-dir", str(tmp_path / "cut")]) == 0
    for name in ("small_for_compiling-0", "small_for_compiling-1"):
        whole, cut = (
            load_file(tmp_path / run / "peers" / name / "model.safetensors")
            for run in ("whole", "cut")
        )
        assert_same_state(whole, cut)
    about = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert about["compiled"] == ["small_for_compiling-0", "small_for_compiling-1"]


LAUNCHED = """
import sys
import tests.test_compiling  # it registers the network
from dml_accel.cli import main
sys.exit(main())
"""


def test_each_of_two_processes_compiles_its_peer(tmp_path: Path) -> None:
    words = ["train", "--cohort", "timm:small_for_compiling*2", *TINY, "--float64"]
    words += ["--lr", "0.001", "--max-steps", "3"]
    # On several processes dropout draws for each slice, but here each peer has all rows.
    assert main([*words, "--output-dir", str(tmp_path / "alone")]) == 0
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    launch = [BIN / "torchrun", "--nproc_per_node", "2", program, *words, "--placement", "split"]
    done = subprocess.run(
        [str(word) for word in (*launch, "--compile", "--output-dir", tmp_path / "two")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peers = ["small_for_compiling-0", "small_for_compiling-1"]
    about = json.loads((tmp_path / "two/config.json").read_text())
    assert (about["compiled"], about["placement"]["kind"]) == (peers, "split")
    for name in peers:
        file = f"peers/{name}/model.safetensors"
        alone, two = load_file(tmp_path / "alone" / file), load_file(tmp_path / "two" / file)
        for key, value in alone.items():
            torch.testing.assert_close(value, two[key], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- where it fails


def test_what_cannot_be_compiled_runs_eagerly_and_says_so(
    training: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        peers = training(**PAIR, compile="on").peers
    assert not any(is_compiled_module(peer.net) for peer in peers)
    said = capfd.readouterr().err
    assert "--compile: small_for_compiling-0 runs eagerly, as compiling it fails" in said


def test_memory_that_runs_short_is_no_fault_of_the_compiler(training: Build) -> None:
    def short(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("no memory")

    (peer,) = training(cohort=("timm:small_for_compiling",), compile="on").peers
    with pytest.raises(torch.OutOfMemoryError):
        compiling.tried(peer.net, "x", short)


# ---------------------------------------------------------------- --compile auto


@pytest.mark.parametrize(
    ("steps", "compiled", "saved", "says"),
    [
        # Two peers of one architecture: 0.2 s a step eagerly, and it is compiled once.
        (100_000, 0.075, 5_000 - 20, "200 ms a step eagerly, 150 ms compiled, 20 s to compile"),
        (100_000, 0.105, -1_000 - 20, "200 ms a step eagerly, 210 ms compiled, 20 s to compile"),
        (2_999, 0.075, 0, "the steps are too few"),
    ],
)
def test_auto_weighs_what_compiling_saves(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    digits: sources.Source,
    steps: int,
    compiled: float,
    saved: float,
    says: str,
) -> None:
    class Trial:
        eager = 0.1

        def __init__(self, *_: object) -> None:
            pass

        def compare(self, _: str) -> tuple[float, float, float]:
            return 0.1, compiled, 20.0

    monkeypatch.setattr(compiling, "_Trial", Trial)
    config = tiny_config(**PAIR, compile="auto", float64=False)
    checked, processes = checking.check(config, digits), Processes(config)
    words = (checked.specs, checked.modules, config, steps, processes.accelerator)
    assert compiling.seconds_saved(*words) == pytest.approx(saved)
    assert says in capfd.readouterr().err


def test_the_trial_times_both_and_leaves_the_network_as_it_was(digits: sources.Source) -> None:
    config = tiny_config(**PAIR, compile="auto", float64=False)
    checked, processes = checking.check(config, digits), Processes(config)
    module = checked.modules["small_for_compiling-0"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trial = compiling._Trial(module, config, processes.accelerator)
    eager, compiled, seconds = trial.compare("small_for_compiling-0")
    assert 0 < eager < 5 and 0 < compiled < 5 and seconds > compiled
    assert_same_state(before, module.state_dict())


def test_a_comparison_decides_once_for_all_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[int] = []

    def saved(_: object, __: object, ___: Config, steps: int, ____: object) -> float:
        decided.append(steps)
        return 1.0

    monkeypatch.setattr(checking, "seconds_saved", saved)
    words = ["compare", "--cohort", "timm:small_for_compiling*2", *TINY, "--compile", "auto"]
    words += ["--output-dir", str(tmp_path), "--max-steps", "2"]
    assert main([*words, "--seeds", "1"]) == 0
    assert decided == [4]  # two methods of two steps
    assert main([*words, "--seeds", "2"]) == 0
    assert decided == [4]  # the folder knows
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/seed-*/config.json")]
    assert len(found) == 4
    assert all(len(about["compiled"]) == 2 for about in found)


def test_a_decision_of_auto_is_kept_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "seconds_saved", lambda *_: 1.0)
    words = ["train", "--cohort", "timm:small_for_compiling", *TINY, "--compile", "auto"]
    words += ["--output-dir", str(tmp_path), "--resume", "auto"]
    assert main([*words, "--max-steps", "1"]) == 0
    monkeypatch.setattr(checking, "seconds_saved", lambda *_: 1 / 0)
    assert main([*words, "--max-steps", "2"]) == 0
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["compiled"] == ["small_for_compiling-0"]


def test_gradients_with_memory_of_their_own_are_the_same(training: Build) -> None:
    # What CUDA graphs need, as far as a CPU can tell.
    plain, kept = training(**PAIR, low_memory=True), training(**PAIR, low_memory=True)
    for peer in kept.peers:
        peer.keeps_gradients = True
    for a, b in zip(run(plain, 3), run(kept, 1), strict=False):
        assert torch.equal(a, b)
    places = [weight.grad.data_ptr() for peer in kept.peers for weight in peer.module.parameters()]
    run(kept, 2, start=1)
    for name, state in plain.states().items():
        assert_same_state(state, kept.states()[name])
    again = [weight.grad.data_ptr() for peer in kept.peers for weight in peer.module.parameters()]
    assert places == again


def test_what_fails_after_its_forward_pass_leaves_no_trace(training: Build) -> None:
    it = training(**PAIR)
    (peer, _), before = it.peers, it.states()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(*_: object) -> Tensor:
            raise RuntimeError("no kernel for this")

    net = nn.Sequential(peer.module, Apply(Broken))
    with pytest.raises(RuntimeError, match="no kernel"):
        it.placement._settle(net)
    assert_same_state(before[peer.name], it.states()[peer.name])
    assert all(weight.grad is None for weight in peer.module.parameters())


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function.apply(x)


def test_half_precision_compiles(digits: sources.Source) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = tiny_config(**PAIR, float64=False, mixed_precision="bf16")
    eager = run(Training(config, digits), 1)[0]
    on = Training(dataclasses.replace(config, compile="on"), digits)
    assert all(is_compiled_module(peer.net) for peer in on.peers)
    torch.testing.assert_close(eager, run(on, 1)[0], rtol=2e-2, atol=2e-2)
    AcceleratorState._reset_state(reset_partial_state=True)
