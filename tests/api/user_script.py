"""A user's script that calls everything public: ``mypy --strict`` must accept it; it is not run."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dml_accel


@dml_accel.register_divergence("squared")
def squared(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The squared difference of posteriors."""
    return (log_p.exp() - log_q.exp()).square().sum(-1)


config = dml_accel.Config(cohort="resnet8*2", dataset="digits", epochs=8, lr=0.05)
run: dml_accel.Run = dml_accel.train(config, seed=1, output_dir=Path("runs/pair"))
top1: float = run.results["ensemble"]["top1"]
last = run.metrics.query("split == 'test'").groupby("peer")["top1"].last()
print(run.path.name, run.status, run.config.optim.lr, top1, last)

networks: dml_accel.Networks = run.networks(device="cpu")
for one in networks.predict(["a.png", Path("photos")]):
    print(one.image, one.best, one.classes, one.probabilities, one.indices)
networks.predict(Image.open("a.png"), peer=networks.names[0])
networks.predict(np.zeros((8, 8, 3), np.uint8), on_error=lambda name, reason: print(name, reason))
logits: Tensor = networks.logits(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
dml_accel.load("runs/pair", checkpoint="latest", weights="ema", device=torch.device("cpu"))

evaluation = dml_accel.evaluate(run, dataset="digits", to="evaluated", cpu=True)
print(evaluation.path, evaluation.results["ensemble"], evaluation.confusion, evaluation.title)
print(len(dml_accel.predict("runs/pair", ["a.png"], peer="resnet8-0")))
exported = dml_accel.export(run, peer="best", to="exported", format="onnx")
print(exported.folder, exported.text)

comparison: dml_accel.Comparison = dml_accel.compare(
    cohort="resnet8*2", methods=["independent", "mutual", "squared"], seeds=2, dataset="digits"
)
print(comparison.path, comparison.table, comparison.scores, comparison.failed)
print([other.results for other in comparison.runs])

nets: dict[str, nn.Module] = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
data = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
for record in dml_accel.learn(nets, data, data, dml_accel.Config(epochs=1, batch_size=4)):
    if isinstance(record, dml_accel.EvaluationRecord):
        print(record.epoch, record.test["ensemble"]["top1"])
    else:
        print(record.step, record.lr)

losses: dml_accel.Losses = dml_accel.mutual_loss([net(data[0]) for net in nets.values()], data[1])
torch.autograd.backward(losses.loss)

try:
    dml_accel.train(config, resume="auto", output_dir="runs/pair")
except (dml_accel.StoppedError, dml_accel.DivergedError, dml_accel.UsageError) as error:
    print(error)
