"""One process of a parity test: run cases, and write what this process computed.

    accelerate launch --multi_gpu --num_processes N tests/worker.py CASES.json FOLDER

``CASES.json`` maps a case's name to {"config": ..., "break": what to break or None}, where each of
some methods is to take a step, to their "methods": flags by name, and to "own group" where ranks 0
and 1 are in a process group more than the others.
"""

import dataclasses
import json
import os
import socket
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

from dml_accel.core.config import Config
from dml_accel.data import sources
from dml_accel.data.batches import ImageSet
from dml_accel.distributed.launch import check_launch
from dml_accel.distributed.placement import Placement
from dml_accel.mutual.links import read_links
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.step import Step, train_step
from dml_accel.mutual.targets import Targets
from dml_accel.mutual.teaching import Teaching
from dml_accel.training.loop import EvaluationRecord, StepRecord, fit
from tests.helpers import Training


def undetached(_: Teaching, logits: torch.Tensor, *__: object) -> Targets:
    """Targets that carry gradients: the commonest bug."""
    log_p = logits.log_softmax(-1)
    p, others = log_p.exp(), len(log_p) - 1
    taught = torch.cat([p, (p * log_p).sum(-1, keepdim=True)], -1)
    return Targets((taught.sum(0) - taught) / others, torch.full_like(p[..., 0], others))


def break_it(what: str | None, patch: dict) -> None:
    """Break the code on purpose; ``patch`` records how to mend it."""
    targets = {
        "detach": (Teaching, "targets", undetached),
        "gradient mean": (Placement, "gradient_scale", property(lambda self: 1)),
        "reversed batch": (ImageSet, "batch", reversed_batch),
        "spoiled": (Step, "forward", spoiled),
        "apart": (Step, "forward", apart),
    }
    if what is not None:
        owner, name, broken = targets[what]
        patch[(owner, name)] = owner.__dict__[name]
        setattr(owner, name, broken)


whole_batch = ImageSet.batch


def reversed_batch(self: ImageSet, *words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch in the opposite order: the same sums, added up differently."""
    x, y = whole_batch(self, *words)
    return x.flip(0), y.flip(0)


whole_forward = Step.forward


def spoiled(self: Step, peer: Peer, x: torch.Tensor, part: int) -> torch.Tensor:
    """The logits, but resnet8-0 sees NaN in the second step."""
    spoils = self.number == 1 and peer.name == "resnet8-0"
    return whole_forward(self, peer, x * torch.nan if spoils else x, part)


def apart(self: Step, peer: Peer, x: torch.Tensor, part: int) -> torch.Tensor:
    """The logits, but resnet8-0 is sure of something in the second step, right or wrong."""
    factor = 100 if self.number == 1 and peer.name == "resnet8-0" else 1
    return factor * whole_forward(self, peer, x, part)


def weights(peer: Peer) -> torch.Tensor:
    """All that a step may change, running statistics and momentum included."""
    momentum = [t for state in peer.optimizer.state.values() for t in state.values()]
    return torch.cat(
        [t.flatten().double() for t in [*peer.module.state_dict().values(), *momentum]]
    )


def keep_images(images: ImageSet) -> list[torch.Tensor]:
    """Keep all images that a run trains on, as they are given to the networks."""
    found, whole = [], images.batch

    def batch(*words: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = whole(*words)
        found.append(x.clone())
        return x, y

    images.batch = batch
    return found


def keep_first(tensors: dict, name: str, _: object, __: object, logits: torch.Tensor) -> None:
    """Keep the logits of our rows in the first forward of training."""
    tensors.setdefault(f"logits/{name}", logits.detach().clone())


def run_case(case: dict, source: sources.Source, folder: Path) -> None:
    """Train as the case says; write gradients of the first step, states, metrics."""
    training = Training(Config(**case["config"]), source)
    peers, placement = training.peers, training.placement
    before = training.states()
    tensors, rates, reductions = {}, [], [0]
    reads = training.config.compute.feed == "loader"
    shown = keep_images(training.data.train) if reads else []

    def count(
        group: torch.distributed.ProcessGroup, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        reductions[0] += 1
        return allreduce_hook(group, bucket)

    skipped, unmoved = [], []
    previous = {peer.name: weights(peer) for peer in peers}
    for peer in peers:
        peer.module.register_forward_hook(partial(keep_first, tensors, peer.name))
        if isinstance(peer.net, DistributedDataParallel):
            peer.net.register_comm_hook(peer.net.process_group, count)
    for record in fit(training.cohort, training.data, training.config.run):
        if isinstance(record, EvaluationRecord):
            metrics = record.test
        if not isinstance(record, StepRecord):
            continue
        rates.append(record.lr)
        finite = record.losses_KP[:, 0].isfinite().tolist()
        found = zip(placement.names, finite, strict=True)
        skipped.append([name for name, is_finite in found if not is_finite])
        for peer in peers:
            if torch.equal(now := weights(peer), previous[peer.name]):
                unmoved.append([peer.name, record.step])
            previous[peer.name] = now
        if record.step == 1:
            tensors["losses"] = record.losses_KP
            for peer in peers:
                for name, weight in peer.module.named_parameters():
                    tensors[f"gradient/{peer.name}/{name}"] = weight.grad.clone()
    tensors |= {f"images/{step}": x for step, x in enumerate(shown)}
    for name, state in training.states().items():
        for key, value in state.items():
            tensors[f"state/{name}/{key}"] = value
            if value.is_floating_point() and key in before[name] and "running" not in key:
                tensors[f"moved/{name}/{key}"] = (value - before[name][key]).abs().max()
    placement.processes.stop_heartbeat()  # the next case has processes of its own
    report = {
        "pid": os.getpid(),
        "collectives": collectives(placement),
        "host": socket.gethostname(),
        "rank": placement.processes.rank,
        "world_size": placement.processes.world_size,
        "kind": placement.kind,
        "ranks": placement.ranks,
        "rows": placement.rows(training.config.optim.batch_size),
        "rates": rates,
        "steps": len(rates),
        "reductions": reductions[0],
        "skipped": skipped,
        "unmoved": unmoved,
        "held": [peer.name for peer in peers],
        "metrics": metrics,
    }
    write(folder, placement.processes.rank, tensors, report)


def run_methods(case: dict, source: sources.Source, folder: Path) -> None:
    """Take a step by each method in turn; write its losses and gradients, and the state in the end.

    One set of networks for all methods, because building them takes longer than a step.
    """
    training = Training(Config(**case["config"]), source)
    turns, tensors = training.cohort.teaching.turns, {}
    for number, (name, flags) in enumerate(case["methods"].items()):
        config = training.config.changed(**flags)
        links = read_links(config.method.links, turns, [])
        teaching = Teaching(config.method, turns, (), links, exchange=config.compute.exchange)
        cohort = dataclasses.replace(training.cohort, teaching=teaching)
        tensors[f"losses/{name}"], _ = train_step(cohort, number, config.optim.lr)
        for peer in training.peers:
            for key, weight in peer.module.named_parameters():
                tensors[f"gradient/{name}/{peer.name}/{key}"] = weight.grad.clone()
    for name, state in training.states().items():
        tensors |= {f"state/{name}/{key}": value for key, value in state.items()}
    training.placement.processes.stop_heartbeat()
    placement = training.placement
    report = {
        "rank": placement.processes.rank,
        "kind": placement.kind,
        "collectives": collectives(placement),
    }
    write(folder, placement.processes.rank, tensors, report)


def collectives(placement: Placement) -> int:
    """How many collectives this process has come to, by which the slow ones are known."""
    liveness = placement.processes._liveness
    return liveness.collectives if liveness else 0


def write(folder: Path, rank: int, tensors: dict[str, torch.Tensor], report: dict) -> None:
    """Write what a process computed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{rank}.tensors")
    (folder / f"{rank}.json").write_text(json.dumps(report))


def main(cases: str, folder: str) -> None:
    """Run every case in turn."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    work = json.loads(Path(cases).read_text())
    configs = [Config(**case["config"]) for case in work.values()]
    source = sources.read(configs[0].data)
    # A few images are enough; 101 to test, so that no number of processes divides them.
    few = {name: getattr(source, name) for name in ("train", "test")}
    source = dataclasses.replace(
        source,
        train=few["train"].select(torch.arange(170)),
        test=few["test"].select(torch.arange(101)),
    )
    check_launch(configs[0].numerics, configs[0].compute, configs[0].optim)
    for name, case in work.items():
        patch: dict = {}
        AcceleratorState._reset_state()  # its precision is fixed for good otherwise
        break_it(case["break"], patch)
        if case.get("own group") and torch.distributed.is_initialized():
            torch.distributed.new_group([0, 1])  # as a caller of ours may
        config, images = Config(**case["config"]), source
        if config.data.dataset != configs[0].data.dataset:
            images = sources.read(config.data, True, None, config.compute)
        run = run_methods if case.get("methods") else run_case
        run(case, images, Path(folder) / name)
        for (owner, attribute), value in patch.items():
            setattr(owner, attribute, value)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
