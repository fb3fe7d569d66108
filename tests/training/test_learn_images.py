"""``learn`` on images of the caller's: a ``Dataset``, a ``DataLoader``, batches of any kind."""

import copy
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from dml_accel import Config, EvaluationRecord, StepRecord, StoppedError, UsageError, learn
from dml_accel.core.files import read_json
from dml_accel.core.rng import generator, key
from dml_accel.mutual import reference
from tests.helpers import assert_same_state, events, saved_steps, status_of

ROWS, CLASSES, SIZE = 22, 3, 8
FLAGS: dict[str, Any] = {"lr": 0.05, "epochs": 2, "cpu": True, "float64": True, "weight_decay": 0}
ITEMS = FLAGS | {"batch_size": SIZE, "workers": 0}


class Noisy(Dataset[tuple[Tensor, int]]):
    """Features with noise from the states of torch, numpy and Python; it counts what is read."""

    def __init__(self, rows: int = ROWS, noise: float = 0.1) -> None:
        generate = torch.Generator().manual_seed(rows)
        self.images = torch.randn(rows, 6, generator=generate, dtype=torch.float64)
        self.labels = torch.randint(0, CLASSES, (rows,), generator=generate)
        self.noise, self.read = noise, list[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        draws = torch.rand(6) + np.random.rand() + random.random()
        return self.images[index] + self.noise * draws, int(self.labels[index])


TEST = Noisy(5)


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(6, CLASSES), "b": nn.Sequential(nn.Dropout(0.2), nn.Linear(6, CLASSES))}


def trained(data: Any, test: Any = TEST, **flags: Any) -> tuple[dict[str, nn.Module], list[Any]]:
    """Train; return the networks and the records. A callable makes the data for each call."""
    modules = nets()
    return modules, list(learn(modules, data, test, **flags))


def assert_same_nets(found: dict[str, nn.Module], expected: dict[str, nn.Module]) -> None:
    for name, module in expected.items():
        assert_same_state(found[name].state_dict(), module.state_dict())


def steps(records: list[Any]) -> list[StepRecord]:
    return [record for record in records if isinstance(record, StepRecord)]


def loader(rows: int = ROWS, **options: Any) -> "DataLoader[Any]":
    return DataLoader(Noisy(rows), **{"batch_size": SIZE, "shuffle": True} | options)


class Again:
    """Batches without a length, from the start at each iteration; endless if so."""

    def __init__(self, count: int, endless: bool = False) -> None:
        self.count, self.endless = count, endless

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        place = 0
        while self.endless or place < self.count:
            generate = torch.Generator().manual_seed(place)
            yield (
                torch.randn(4, 6, generator=generate),
                torch.randint(0, CLASSES, (4,), generator=generate),
            )
            place += 1


class Counted(Again):
    def __len__(self) -> int:
        return self.count


# ---------------------------------------------------------------- a Dataset


def test_order_and_draws_of_a_dataset_are_keyed_by_seed_epoch_and_row() -> None:
    modules, data = nets(), Noisy()
    modules["b"][0].p = 0.0
    twins = [copy.deepcopy(modules[name]).double() for name in "ab"]
    config = Config(**ITEMS | {"seed": 3})
    optimizers = [
        torch.optim.SGD(one.parameters(), 0.05, momentum=0.9, nesterov=True) for one in twins
    ]
    found = steps(list(learn(modules, data, TEST, config, lr_schedule="constant")))
    assert len(found) == 4 and data.read[:2] == [0, 1]  # looked at, once
    order = list[int]()
    for step, record in enumerate(found):
        epoch, index = divmod(step, 2)
        shuffled = torch.randperm(ROWS, generator=generator("order and augmentation", 3, epoch))
        rows = shuffled[index * SIZE : (index + 1) * SIZE].tolist()
        order += rows
        images = []
        for row in rows:
            seed = key("item", 3, epoch, row)
            draws = torch.rand(6, generator=torch.Generator().manual_seed(seed))
            draws = (
                draws + np.random.RandomState(seed % 2**32).rand() + random.Random(seed).random()
            )
            images.append(data.images[row] + 0.1 * draws)
        batch = torch.stack(images), data.labels[rows]
        expected = reference.step(twins, optimizers, [batch])
        assert record.losses_KP[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    assert data.read[2:] == order
    for name, twin in zip("ab", twins, strict=True):
        for mine, right in zip(modules[name].parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)


def test_workers_do_not_change_what_a_dataset_trains() -> None:
    here, records = trained(Noisy(), **ITEMS, max_steps=3)
    apart, again = trained(Noisy(), **ITEMS | {"max_steps": 3, "workers": 2})
    assert_same_nets(apart, here)
    assert again[-1].test == records[-1].test


@pytest.mark.parametrize("kind", ["Dataset", "DataLoader"])
def test_the_states_of_numpy_python_and_the_loader_are_left_alone(kind: str) -> None:
    generate = torch.Generator().manual_seed(4)
    data: Any = Noisy() if kind == "Dataset" else loader(generator=generate)
    before = generate.get_state(), random.getstate()
    numbers = np.random.get_state()[1].copy()
    for _ in learn(nets(), data, TEST, **(ITEMS if kind == "Dataset" else FLAGS)):
        pass
    assert torch.equal(generate.get_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == numbers).all()


def test_draws_between_two_records_change_nothing() -> None:
    straight, _ = trained(loader(), **FLAGS)
    modules = nets()
    for _ in learn(modules, loader(), TEST, **FLAGS):
        torch.manual_seed(random.getrandbits(32))
        np.random.rand()
        random.random()
    assert_same_nets(modules, straight)


# ---------------------------------------------------------------- resumed

DATA: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Dataset": lambda: (Noisy(), ITEMS),
    "DataLoader": lambda: (loader(), FLAGS),
    "generator": lambda: (loader(generator=torch.Generator().manual_seed(9)), FLAGS),
    "sampler": lambda: (loader(shuffle=False, sampler=RandomSampler(Noisy())), FLAGS),
    "list": lambda: (list(Again(3)), FLAGS),
    "len": lambda: (Counted(3), FLAGS),
    "endless": lambda: (Again(0, endless=True), FLAGS | {"steps_per_epoch": 3}),
    "tensors": lambda: ((TEST.images, TEST.labels), FLAGS | {"batch_size": 2}),
}


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [(kind, "max_steps") for kind in DATA] + [("Dataset", "break"), ("DataLoader", "break")],
)
def test_a_run_goes_on_in_the_middle_of_an_epoch_as_if_uninterrupted(
    kind: str, leaves: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, flags = DATA[kind]()
    flags = flags | {"epochs": 3}
    straight, records = trained(data, **flags)
    per_epoch = len(steps(records)) // 3
    folder = tmp_path / "run"
    flags |= {"output_dir": str(folder), "save_every": "1", "resume": "auto"}
    stop = per_epoch + 1
    first, data = nets(), DATA[kind]()[0]
    if leaves == "break":
        for record in learn(first, data, TEST, **flags):
            if record.step == stop + 1:  # after the checkpoint of the step before
                break
        assert status_of(folder)["status"] == "stopped", status_of(folder)
    else:
        list(learn(first, data, TEST, **flags, max_steps=stop))
        assert status_of(folder)["status"] == "done"
    taken = saved_steps(folder)[-1]
    assert per_epoch < taken < 3 * per_epoch and taken % per_epoch
    capfd.readouterr()
    resumed, rest = trained(DATA[kind]()[0], **flags)
    assert_same_nets(resumed, straight)
    assert [record.step for record in steps(rest)] == list(range(taken + 1, 3 * per_epoch + 1))
    assert rest[-1].test == records[-1].test
    said = capfd.readouterr().err
    read_again = f"reading {taken % per_epoch} batches of epoch {taken // per_epoch + 1} again"
    assert (read_again in said) == (kind not in ("Dataset", "tensors"))
    assert status_of(folder)["status"] == "done"


def test_a_batch_that_is_read_again_does_not_have_to_be_checked_or_trained(tmp_path: Path) -> None:
    flags = FLAGS | {"output_dir": str(tmp_path), "resume": "auto", "save_every": "1"}
    list(learn(nets(), loader(), TEST, **flags, max_steps=1))
    with pytest.raises(UsageError, match="train is now DataLoader of Noisy, 1 workers|1 workers"):
        learn_all = learn(nets(), loader(num_workers=1), TEST, **flags)
        next(learn_all)


# ---------------------------------------------------------------- batches


def test_batches_train_as_the_reference_and_evaluation_reads_all() -> None:
    batches, modules = list(Again(3)), nets()
    modules["b"][0].p = 0.0
    twins = [copy.deepcopy(modules[name]).double() for name in "ab"]
    optimizers = [
        torch.optim.SGD(one.parameters(), 0.05, momentum=0.9, nesterov=True) for one in twins
    ]
    test = [(TEST.images[:3], TEST.labels[:3]), (TEST.images[3:], TEST.labels[3:].int())]
    found = list(learn(modules, batches, test, **FLAGS, lr_schedule="constant"))
    for record, (x, y) in zip(steps(found), batches * 2, strict=True):
        expected = reference.step(twins, optimizers, [(x.double(), y)])
        assert record.losses_KP[:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        right = modules["a"](TEST.images).argmax(1) == TEST.labels
    assert found[-1].test["peers"]["a"]["top1"] == right.sum().item() / 5
    assert found[-1].test["ensemble"]["n"] == 5


def test_without_a_length_steps_per_epoch_says_how_many_batches_are_one() -> None:
    for stream in (Again(4), Again(0, endless=True), Counted(4)):
        _, records = trained(stream, **FLAGS, steps_per_epoch=2)
        assert [one.epoch for one in steps(records)] == [0, 0, 1, 1]
    with pytest.raises(UsageError, match=r"train has no len\(\): say with steps_per_epoch="):
        trained(Again(4), **FLAGS)
    with pytest.raises(UsageError, match="train ended after 4 batches of epoch 1, not 5: each"):
        trained(Again(4), **FLAGS, steps_per_epoch=5)
    # Each epoch of a whole one begins anew; what is read to its end needs no length.
    _, records = trained(Again(4), Again(2), **FLAGS, steps_per_epoch=4)
    assert records[-1].test["ensemble"]["n"] == 8


def test_what_is_left_out_or_not_exact_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(TEST.images[0], 0), (TEST.images[1], 1)] * 8)

    class Odd(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(16))

        def __len__(self) -> int:
            return 16

    partial = "train: the last batch of an epoch has 6 of 8 images and is left out"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (loader(), {}, partial),
        (loader(drop_last=True), {}, ""),
        (loader(16), {}, ""),
        (loader(), {"steps_per_epoch": 1}, ""),
        ([*Again(1), (TEST.images[:2], TEST.labels[:2])], {}, "has 2 of 4 images and is left out"),
        (Counted(2), {}, "its order and whatever it draws are its own"),
        (DataLoader(Stream(), batch_size=8), {"steps_per_epoch": 1}, "its IterableDataset decides"),
        (DataLoader(Noisy(16), batch_size=8, sampler=Odd()), {}, "its sampler may keep a state"),
        (
            loader(16, num_workers=1, persistent_workers=True),
            {"epochs": 1},
            "its persistent_workers are seeded once",
        ),
    ]
    for data, flags, text in cases:
        trained(data, **FLAGS | flags)
        said = capfd.readouterr().err
        assert (said.count(text) == 1) if text else (not said), said


def test_the_best_weights_by_val_are_kept(tmp_path: Path) -> None:
    flags = ITEMS | {"eval_every": "1", "keep": "best", "output_dir": str(tmp_path)}
    _, records = trained(Noisy(), val=DataLoader(Noisy(9), batch_size=4), **flags)
    found = [one for one in records if isinstance(one, EvaluationRecord)]
    for peer in read_json(tmp_path / "results.json")["peers"]:
        name = peer["name"]
        scores = [(one.val["peers"][name]["top1"], -one.val["peers"][name]["nll"]) for one in found]
        best = found[scores.index(max(scores))]
        assert peer["best"]["step"] == best.step == records[-1].best[name]["step"]
        assert (tmp_path / "peers-best" / name / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="val"):
        trained(Noisy(), **ITEMS, keep="best", output_dir=str(tmp_path / "other"))


def test_a_signal_leaves_a_checkpoint(tmp_path: Path) -> None:
    flags = FLAGS | {"output_dir": str(tmp_path), "resume": "auto", "epochs": 3}
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    for one in (signal.SIGTERM, signal.SIGINT):
        taken = 0
        with pytest.raises(StoppedError, match="resume"):
            for record in learn(nets(), loader(), TEST, **flags):
                taken = record.step
                if taken in (2, 4):
                    signal.raise_signal(one)
        assert status_of(tmp_path)["status"] == "stopped"
        assert saved_steps(tmp_path)[-1] == taken
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    resumed, _ = trained(loader(), **flags)
    straight, _ = trained(loader(), **FLAGS | {"epochs": 3})
    assert_same_nets(resumed, straight)
    assert [one["event"] for one in events(tmp_path)].count("resume") == 2
