"""A user's script: methods, a loop and modules of its own. ``mypy --strict`` must accept it."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dml_accel
from dml_accel import cli


@dml_accel.register_divergence("mine")
class Mine(dml_accel.Divergence):
    """A linear one."""

    linear = True

    def teach(self, log_p: Tensor, labels: Tensor) -> Tensor:
        return log_p.exp()

    def learn(self, log_q: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        return -(taught * log_q).sum(-1)


@dml_accel.register_target("largest")
def largest(logits: Tensor, weights: Tensor) -> Tensor:
    """Class by class, the largest logit of any teacher."""
    return logits.masked_fill((weights == 0)[..., None], -1e9).amax(0)


@dml_accel.register_target("mean")
class Mean(dml_accel.Target):
    """The mean of the logits."""

    def contribute(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits

    def combine(self, mean: Tensor, labels: Tensor) -> Tensor:
        return mean


dml_accel.register_method("both", "both of mine", divergence="mine", target="mean")


def own_loop(nets: list[nn.Module], images: Tensor, labels: Tensor) -> float:
    losses: dml_accel.Losses = dml_accel.mutual_loss([net(images) for net in nets], labels)
    torch.autograd.backward(losses.loss)
    apart = dml_accel.gather_logits(nets[0](images), labels)
    total: Tensor = dml_accel.mutual_loss(apart, labels, divergence="mine").total
    return float(total.mean())


def own_modules(nets: dict[str, nn.Module], folder: Path) -> list[float]:
    data = TensorDataset(torch.randn(64, 8), torch.zeros(64, dtype=torch.int64))
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=8)
    found = []
    try:
        for record in dml_accel.learn(
            nets,
            loader,
            data,
            epochs=2,
            output_dir=folder,
            resume="auto",
            optimizer=lambda net: torch.optim.Adam(net.parameters(), lr=1e-3),
            schedule=lambda step: 0.99**step,
        ):
            if isinstance(record, dml_accel.EvaluationRecord):
                found.append(float(record.test["ensemble"]["top1"]))
            elif isinstance(record, dml_accel.StepRecord):
                print(record.step, record.losses_KP.mean(0))
    except (dml_accel.StoppedError, dml_accel.DivergedError, dml_accel.RunError) as error:
        print(error)
    dml_accel.export(folder, peer="a", to=folder / "a", network=nets["a"])
    return found


if __name__ == "__main__":
    print(dml_accel.networks.__name__, dml_accel.__version__)
    sys.exit(cli.main())
