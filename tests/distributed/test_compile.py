"""Compiled networks: the same steps, whether it pays, what happens where it fails."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from accelerate.state import AcceleratorState
from accelerate.utils.other import is_compiled_module
from safetensors.torch import load_file
from timm.models import register_model
from torch import Tensor, nn

from dml_accel import cli
from dml_accel.data import sources
from dml_accel.distributed import rules
from dml_accel.distributed.compile import has_compiler, or_eager
from dml_accel.distributed.rules import Work
from dml_accel.distributed.wrap import Wrapper
from dml_accel.training import setup
from dml_accel.training.setup import image_format
from tests.helpers import (
    BIN,
    ROOT,
    Training,
    assert_same_state,
    load,
    run_program,
    tiny_config,
    train,
)

Build = Callable[..., Training]


class Small(nn.Module):
    """A network that compiles in a second, with batch norm, dropout and a residual."""

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
    for a, b in zip(eager.take(30), compiled.take(30), strict=True):
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


TINY = "--dataset digits --image-size 8 --batch-size 32 --lr 0.05 --train-limit 320 --cpu".split()
PEERS = ["small_for_compiling-0", "small_for_compiling-1"]


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / "peers" / name / "model.safetensors")


def test_an_interrupted_compiled_run_ends_bit_for_bit(tmp_path: Path) -> None:
    words = ["--cohort", "timm:small_for_compiling*2", *TINY, "--compile"]
    assert train(tmp_path / "whole", *words, "--max-steps", "6") == 0
    for steps in ("3", "6"):
        assert train(tmp_path / "cut", *words, "--max-steps", steps, "--resume", "auto") == 0
    for name in PEERS:
        assert_same_state(weights(tmp_path / "whole", name), weights(tmp_path / "cut", name))
    assert load(tmp_path / "cut/config.json")["compiled"] == PEERS


LAUNCHED = """
import sys
import tests.distributed.test_compile  # registers the network
from dml_accel.cli import main
sys.exit(main())
"""


def test_each_of_two_processes_compiles_its_peer(tmp_path: Path) -> None:
    words = ["--cohort", "timm:small_for_compiling*2", *TINY, "--float64"]
    words += ["--lr", "0.001", "--max-steps", "3"]
    # On several processes dropout draws for each slice, but here each peer has all rows.
    assert train(tmp_path / "alone", *words) == 0
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    launch = [BIN / "torchrun", "--nproc_per_node", "2", program, "train"]
    flags = [*words, "--placement", "split", "--compile", "--output-dir", tmp_path / "two"]
    done = run_program(*launch, *flags, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    description = load(tmp_path / "two/config.json")
    assert (description["compiled"], description["placement"]["kind"]) == (PEERS, "split")
    for name in PEERS:
        alone, two = weights(tmp_path / "alone", name), weights(tmp_path / "two", name)
        for key, value in alone.items():
            torch.testing.assert_close(value, two[key], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- where it fails


def test_what_cannot_be_compiled_runs_eagerly_with_a_message(
    training: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        peers = training(**PAIR, compile="on").peers
    assert not any(is_compiled_module(peer.net) for peer in peers)
    said = capfd.readouterr().err
    assert "--compile: small_for_compiling-0 runs eagerly because it cannot be compiled" in said


def test_running_out_of_memory_is_not_a_failed_compilation(training: Build) -> None:
    def short(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("no memory")

    (peer,) = training(cohort=("timm:small_for_compiling",), compile="on").peers
    with pytest.raises(torch.OutOfMemoryError):
        or_eager(peer.net, "x", short)


# ---------------------------------------------------------------- --compile auto


@pytest.fixture
def measured_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for which the rule holds, whichever this is."""
    monkeypatch.setattr(setup, "adds_up_in_pairs", lambda: True)


@pytest.mark.usefixtures("measured_torch")
def test_a_comparison_decides_once_for_all_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[int] = []

    def saved(work: Work, _: object, __: int) -> float:
        decided.append(work.steps)
        return 1.0

    monkeypatch.setattr(rules, "seconds_saved", saved)
    words = ["compare", "--cohort", "timm:small_for_compiling*2", *TINY, "--compile", "auto"]
    words += ["--output-dir", str(tmp_path), "--max-steps", "2"]
    assert cli.main([*words, "--seeds", "1"]) == 0
    assert decided == [4]  # two methods of two steps
    assert cli.main([*words, "--seeds", "2"]) == 0
    assert decided == [4]  # read from the folder
    found = [load(path) for path in tmp_path.glob("*/seed-*/config.json")]
    assert len(found) == 4
    assert all(len(description["compiled"]) == 2 for description in found)


@pytest.mark.usefixtures("measured_torch")
def test_a_decision_of_auto_is_kept_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "seconds_saved", lambda *_: 1.0)
    words = ["--cohort", "timm:small_for_compiling", *TINY, "--compile", "auto"]
    words += ["--resume", "auto"]
    assert train(tmp_path, *words, "--max-steps", "1") == 0
    monkeypatch.setattr(rules, "seconds_saved", lambda *_: 1 / 0)
    assert train(tmp_path, *words, "--max-steps", "2") == 0
    assert load(tmp_path / "config.json")["compiled"] == ["small_for_compiling-0"]


@pytest.mark.usefixtures("measured_torch")
def test_auto_says_that_it_compiles_and_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--cohort", "timm:small_for_compiling", *TINY, "--max-steps", "1"]
    for name, saved, compiler, compiled in (
        ("long", 1.0, True, True),
        ("short", -1.0, True, False),
        ("without", 1.0, False, False),
    ):
        monkeypatch.setattr(rules, "seconds_saved", lambda *_, saved=saved: saved)
        monkeypatch.setattr(setup, "has_compiler", lambda compiler=compiler: compiler)
        assert train(tmp_path / name, *words) == 0
        assert bool(load(tmp_path / name / "config.json")["compiled"]) == compiled
        assert ("(--compile off for none)" in capfd.readouterr().err) == compiled
    monkeypatch.setattr(rules, "seconds_saved", lambda *_: 1 / 0)
    for more in ("--float64", "--mixed-precision=bf16", "--compile=off"):
        assert train(tmp_path / more, *words, more) == 0  # the rule is not asked
    monkeypatch.setattr(setup, "adds_up_in_pairs", lambda: False)
    assert train(tmp_path / "older", *words) == 0


def test_a_compiler_is_looked_for_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_compiler()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not has_compiler()


def test_gradients_with_memory_of_their_own_are_the_same(training: Build) -> None:
    # What CUDA graphs need, as far as a CPU can tell.
    plain, kept = training(**PAIR, low_memory=True), training(**PAIR, low_memory=True)
    for peer in kept.peers:
        peer.keeps_gradients = True
    for a, b in zip(plain.take(3), kept.take(1), strict=False):
        assert torch.equal(a, b)
    places = [weight.grad.data_ptr() for peer in kept.peers for weight in peer.module.parameters()]
    kept.take(2, start=1)
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
        images = image_format(it.config, it.placement.device)
        Wrapper(it.placement, it.config.optim, images)._warm_up(net)
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
    eager = Training(config, digits).take(1)[0]
    on = Training(config.changed(compile="on"), digits)
    assert all(is_compiled_module(peer.net) for peer in on.peers)
    torch.testing.assert_close(eager, on.take(1)[0], rtol=2e-2, atol=2e-2)
    AcceleratorState._reset_state(reset_partial_state=True)
