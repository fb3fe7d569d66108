"""One network in each process, which learn from each other's logits, with Accelerate.

    accelerate launch --multi_gpu --num_processes 2 docs/examples/accelerate_apart.py --epochs 5

Two things differ from a loop of one network. All processes read the same batches: the loader is
left out of ``accelerator.prepare``, which would deal them out, and its order is seeded alike. And
the network is not prepared: DDP would average the gradients of different networks.
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
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> dml_accel.Losses:
    """Take one step of this process's network; return the losses of all networks, [K, B] each."""
    optimizer.zero_grad()
    logits = dml_accel.gather_logits(net(images), labels)
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
    if accelerator.num_processes == 1:
        parser.error("a single process has a single network: see above how to start two")
    rank, device = accelerator.process_index, accelerator.device
    set_seed(rank)  # each network has initial weights of its own
    train, test = digits()
    net = make_net(8 * 4**rank).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)  # the same batches everywhere
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True, generator=order)
    for epoch in range(epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            losses = train_step(accelerator, net, optimizer, images, labels)
        shown = ", ".join(f"{kl:.3f}" for kl in losses.kl.mean(1).tolist())
        accelerator.print(f"epoch {epoch + 1}: KL {shown}")
    images, labels = (one.to(device) for one in test.tensors)
    with torch.no_grad():
        logits = dml_accel.gather_logits(net(images), labels)
    for place, predicted in enumerate(logits.argmax(-1)):
        share = 100 * (predicted == labels).float().mean()
        accelerator.print(f"the network of process {place}: {share:.1f}%")
    accelerator.end_training()


if __name__ == "__main__":
    main()
