"""Two networks that teach each other, in a training loop of plain torch.

    python docs/examples/torch_loop.py --epochs 5

Two lines make it mutual learning: the logits of all networks, and one loss of them.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dml_accel


def make_net(width: int) -> nn.Module:
    """Return a network from digits [B, 1, 8, 8] to logits [B, 10]."""
    first = nn.Conv2d(1, width, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,437 images to train on and 360 to test with."""
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def train_step(
    nets: list[nn.Module], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> dml_accel.Losses:
    """Take one step of all networks; return the parts of their losses, [K, B] each."""
    optimizer.zero_grad()
    logits = [net(images) for net in nets]
    losses = dml_accel.mutual_loss(logits, labels, kl_weight=1.0, temperature=1.0)
    losses.loss.backward()  # each network gets the gradient of its own loss
    optimizer.step()
    return losses


def main() -> None:
    """Train, and print the accuracy of each network and of both together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train, test = digits()
    nets = [make_net(8), make_net(32)]
    # One optimizer of all weights does what one for each network does.
    weights = [weight for net in nets for weight in net.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            losses = train_step(nets, optimizer, images, labels)
        parts = zip(losses.cross_entropy.mean(1).tolist(), losses.kl.mean(1).tolist(), strict=True)
        shown = ", ".join(f"cross-entropy {one:.3f} KL {kl:.3f}" for one, kl in parts)
        print(f"epoch {epoch + 1}: {shown}")
    images, labels = test.tensors
    with torch.no_grad():
        posteriors = torch.stack([net(images).softmax(-1) for net in nets])
    for name, p in zip(("narrow", "wide", "both"), [*posteriors, posteriors.mean(0)], strict=True):
        print(f"{name}: {100 * (p.argmax(-1) == labels).float().mean():.1f}%")


if __name__ == "__main__":
    main()
