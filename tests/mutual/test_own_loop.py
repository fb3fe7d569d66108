"""The loss in a loop of one's own: the gradients of the package's own steps, alone and apart."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import dml_accel
from tests.helpers import accelerate_launch, forked, run_program
from tests.mutual import own_loop


def of_the_engine(method: dict) -> dict[str, torch.Tensor]:
    """The gradients of both networks by ``learn``: how far a step at a rate of 1 moves weights."""
    images, labels = own_loop.batch()
    nets = own_loop.nets()
    before = [[weight.detach().clone() for weight in net.parameters()] for net in nets]
    flags = {"float64": True, "epochs": 1, "batch_size": own_loop.ROWS, "lr": 1.0}
    flags |= {"momentum": 0.0, "weight_decay": 0.0, "cpu": True}
    config = dml_accel.Config(**flags, **method)
    named = {f"net-{place}": net for place, net in enumerate(nets)}
    for _ in dml_accel.learn(named, (images, labels), (images, labels), config):
        pass
    return {
        f"{place}.{name}": old - new.detach()
        for place, net in enumerate(nets)
        for old, (name, new) in zip(before[place], net.named_parameters(), strict=True)
    }


@pytest.mark.parametrize("name", own_loop.METHODS)
def test_a_loop_of_ones_own_has_the_gradients_of_the_engine(name: str) -> None:
    images, labels = own_loop.batch()
    nets, method = own_loop.nets(), own_loop.METHODS[name]
    if method:
        logits = [net(images) for net in nets]
        dml_accel.mutual_loss(logits, labels, **method).loss.backward()
    else:  # the example as it is
        weights = [weight for net in nets for weight in net.parameters()]
        torch_loop = sys.modules["torch_loop"]
        torch_loop.train_step(nets, torch.optim.SGD(weights, lr=0.0), images, labels)
    found = own_loop.gradients(nets[0], "0") | own_loop.gradients(nets[1], "1")
    expected = of_the_engine(method)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert grad.abs().max() > 1e-4
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, torch.Tensor]], list]:
    """What two processes of ``own_loop.py`` have written."""
    folder = tmp_path_factory.mktemp("two")
    done = run_program(*forked(2, "tests/mutual/own_loop.py", folder))
    assert done.returncode == 0, done.stderr[-3000:]
    grads = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    return grads, [(folder / f"{rank}.txt").read_text().splitlines() for rank in range(2)]


def test_networks_apart_have_the_gradients_of_the_engine(two: tuple) -> None:
    for name, method in own_loop.METHODS.items():
        for key, expected in of_the_engine(method).items():
            found = two[0][int(key[0])][f"{name}.{key}"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_dealt_batches_have_the_gradients_of_the_engine(two: tuple) -> None:
    for key, expected in of_the_engine({}).items():
        for grads in two[0]:
            torch.testing.assert_close(grads[f"sharded.{key}"], expected, rtol=0, atol=1e-10)


def test_other_batches_and_other_shapes_are_refused_by_all(two: tuple) -> None:
    for said in two[1]:
        assert len(said) == 2
        assert "rank 1 has another batch than rank 0" in said[0]
        assert "logits of [1, 3, 5], [1, 4, 5], by rank" in said[1]


def test_alone_the_logits_are_gathered_from_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.arange(4) % 3
    assert torch.equal(dml_accel.gather_logits(logits, labels), logits[None])
    several = torch.randn(2, 4, 3)
    assert dml_accel.gather_logits(several, labels) is several
    with pytest.raises(dml_accel.UsageError, match=r"logits are \[4\]"):
        dml_accel.gather_logits(torch.zeros(4), labels)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(dml_accel.UsageError, match=r"Accelerator\(cpu=True\)"):
        dml_accel.gather_logits(logits, labels)


LABELS = torch.tensor([0, 2, 1])
REFUSED = {
    "no peers": ([], LABELS, "the peers' logits are []"),
    "other shapes": ([torch.zeros(3, 3), torch.zeros(2, 3)], LABELS, "logits are [[3, 3], [2, 3]]"),
    "one network": (torch.zeros(3, 3), LABELS, "logits are [3, 3]; give one"),
    "other rows": (torch.zeros(2, 4, 3), LABELS, "labels [3]: each image"),
    "one-hot": (torch.zeros(2, 3, 3), torch.eye(3), "labels.argmax(1)"),
    "a list": (torch.zeros(2, 3, 3), [0, 2, 1], "torch.as_tensor(labels)"),
    "no label": (torch.zeros(2, 3, 3), LABELS - 1, "labels are from -1 to 1"),
    "a class too many": (torch.zeros(2, 3, 2), LABELS, "2 classes, 0 to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    logits, labels, text = REFUSED[case]
    with pytest.raises(dml_accel.UsageError) as caught:
        dml_accel.mutual_loss(logits, labels)
    assert text in str(caught.value)


def test_arguments_of_the_divergence_are_names_and_numbers() -> None:
    with pytest.raises(dml_accel.UsageError, match="it must map names to numbers"):
        dml_accel.mutual_loss(torch.zeros(2, 3, 3), LABELS, divergence_args=["beta=1"])


def test_a_list_is_a_stack_and_labels_may_be_short() -> None:
    logits = list(torch.randn(3, 3, 3))
    found = dml_accel.mutual_loss(logits, LABELS.to(torch.uint8))
    expected = dml_accel.mutual_loss(torch.stack(logits), LABELS)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert found.loss == expected.total.mean(1).sum()


@pytest.mark.parametrize("file", ["accelerate_loop", "accelerate_apart"])
def test_the_examples_learn_on_two_processes(file: str) -> None:
    words = accelerate_launch(2, f"docs/examples/{file}.py", "--epochs", 2)
    done = run_program(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [float(line.split()[-1][:-1]) for line in done.stdout.splitlines() if "%" in line]
    assert len(shares) == 2
    assert min(shares) > 75


def test_the_example_of_plain_torch_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["torch_loop.py", "--epochs", "2"])
    sys.modules["torch_loop"].main()
    shares = [float(x.split()[-1][:-1]) for x in capsys.readouterr().out.splitlines() if "%" in x]
    assert len(shares) == 3
    assert min(shares) > 80


def test_a_network_apart_needs_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate_apart.py"])
    with pytest.raises(SystemExit):
        sys.modules["accelerate_apart"].main()
