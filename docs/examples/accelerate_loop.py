"""Networks that teach each other, in a training loop of Accelerate: each process has all of them.

    accelerate launch --multi_gpu --num_processes 2 docs/examples/accelerate_loop.py --epochs 5

Accelerate deals the batches out to the processes and averages the gradients of each network, as in
any of its loops. Two lines make it mutual learning: the logits of all networks, one loss of them.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_loop import digits, make_net

import dml_accel


def train_step(
    accelerator: Accelerator,
    nets: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> dml_accel.Losses:
    """Take one step of all networks; return the parts of their losses, [K, B] each."""
    optimizer.zero_grad()
    logits = [net(images) for net in nets]
    losses = dml_accel.mutual_loss(logits, labels, kl_weight=1.0, temperature=1.0)
    accelerator.backward(losses.loss)
    optimizer.step()
    return losses


def main() -> None:
    """Train, and print the accuracy of each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    # --multi_gpu starts processes on a machine without a GPU as well; there they need cpu=True.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    train, test = digits()
    nets: list[nn.Module] = [make_net(8), make_net(32)]
    weights = [weight for net in nets for weight in net.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    loader = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)
    optimizer, loader, test_loader, *nets = accelerator.prepare(
        optimizer, loader, DataLoader(test, batch_size=64), *nets
    )
    for epoch in range(epochs):
        for images, labels in loader:
            losses = train_step(accelerator, nets, optimizer, images, labels)
        kl = accelerator.reduce(losses.kl.mean(1), "mean").tolist()
        accelerator.print(f"epoch {epoch + 1}: KL {', '.join(f'{one:.3f}' for one in kl)}")
    right, count = torch.zeros(len(nets), device=accelerator.device), 0
    for images, labels in test_loader:
        with torch.no_grad():
            predicted = torch.stack([net(images).argmax(-1) for net in nets], dim=1)  # [B, K]
        predicted, labels = accelerator.gather_for_metrics((predicted, labels))
        right += (predicted == labels[:, None]).sum(0)
        count += len(labels)
    for name, hits in zip(("narrow", "wide"), right.tolist(), strict=True):
        accelerator.print(f"{name}: {100 * hits / count:.1f}%")
    accelerator.end_training()


if __name__ == "__main__":
    main()
