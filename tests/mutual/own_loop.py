"""One process of the example loops: take a step in double precision, and write its gradients.

python tests/forked.py 2 tests/mutual/own_loop.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs/examples")]

import accelerate_apart  # noqa: E402
import accelerate_loop  # noqa: E402
from torch_loop import digits, make_net  # noqa: E402

import dml_accel  # noqa: E402

# Arguments of the loss, whose names are those of the flags.
METHODS = {
    "mutual": {},
    "dkd": {"divergence": "dkd", "temperature": 4.0},
    "renyi": {"divergence": "renyi", "gate": "correct"},
    "kdcl": {"target": "min-logit", "temperature": 2.0},
    "standardized": {"target": "mean-logit-all", "standardize": True, "ce_weight": 0.1},
}
ROWS = 12


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels that all processes agree on."""
    images, labels = digits()[0][:ROWS]
    return images.double(), labels


def nets() -> list[nn.Module]:
    """Return two networks with the same weights in every process."""
    torch.manual_seed(0)
    return [make_net(4).double(), make_net(8).double()]


def gradients(net: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return the gradients of a network by name."""
    return {f"{prefix}.{name}": one.grad for name, one in net.named_parameters()}


def sharded(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return the gradients of networks that every process has, each on its rows."""
    images, labels = batch()
    found = {}
    rank, world = accelerator.process_index, accelerator.num_processes
    bare = nets()
    wrapped = [accelerator.prepare(net) for net in bare]
    optimizer = torch.optim.SGD([w for net in bare for w in net.parameters()], lr=0.0)
    ours = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    accelerate_loop.train_step(accelerator, wrapped, optimizer, images[ours], labels[ours])
    for place, net in enumerate(bare):
        found |= gradients(net, f"sharded.{place}")
    return found


def apart(accelerator: Accelerator, method: dict) -> dict[str, torch.Tensor]:
    """Return the gradients of this process's network, by a method."""
    images, labels = batch()
    rank = accelerator.process_index
    net = nets()[rank]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    if not method:  # the example as it is
        accelerate_apart.train_step(accelerator, net, optimizer, images, labels)
    else:
        logits = dml_accel.gather_logits(net(images), labels)
        accelerator.backward(dml_accel.mutual_loss(logits, labels, **method).loss)
    return gradients(net, str(rank))


def refusals(rank: int) -> list[str]:
    """Return what is said of other batches and of other shapes."""
    found = []
    for rows, label in ((3, rank), (3 + rank, 0)):
        try:
            dml_accel.gather_logits(torch.zeros(rows, 5), torch.full((rows,), label))
        except dml_accel.UsageError as error:
            found.append(str(error))
    return found


def main() -> None:
    """Write what this process finds."""
    folder = Path(sys.argv[1])
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    accelerator = Accelerator(cpu=True)
    found = sharded(accelerator)
    for name, method in METHODS.items():
        found |= {f"{name}.{key}": grad for key, grad in apart(accelerator, method).items()}
    rank = accelerator.process_index
    save_file(found, folder / f"{rank}.safetensors")
    (folder / f"{rank}.txt").write_text("\n".join(refusals(rank)))
    accelerator.end_training()


if __name__ == "__main__":
    main()
