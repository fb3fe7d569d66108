"""Checkpoints: what is written is what is read, bit for bit; what is damaged is not read at all."""

import copy
import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dml_accel.core.errors import UnreadableError
from dml_accel.models.spec import PeerSpec
from dml_accel.mutual.peer import Peer
from dml_accel.mutual.snapshots import Snapshot
from dml_accel.training import checkpoint
from dml_accel.training.checkpoint import load_peers, named, read_state

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


def peer(
    name: str,
    optimizer: str = "sgd",
    width: int = 4,
    layout: torch.memory_format = torch.contiguous_format,
) -> Peer:
    torch.manual_seed(len(name))
    net = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(4 * width, 5)
    )
    net.to(memory_format=layout)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    return Peer(PeerSpec(name, "none"), net, net, OPTIMIZERS[optimizer](net.parameters()), scaler)


def learn(one: Peer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        one.optimizer.zero_grad()
        one.scaler.scale(one.net(x).square().mean()).backward()
        one.scaler.step(one.optimizer)
        one.scaler.update()


def saved(root: Path, peers: list[Peer], step: int, keep: int = 3) -> Path:
    folder = checkpoint.begin(root, step)
    for one in peers:
        checkpoint.write_peer(folder, one)
    names = [one.name for one in peers]
    return checkpoint.finish(folder, names, step, {"config": {"seed": 0}}, keep)


def everything(one: Peer) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.pack(one)
    return tensors


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[Peer]]:
    """A checkpoint of two peers that have learned."""
    peers = [peer("a-0"), peer("bb-0", "adamw")]
    for one in peers:
        learn(one, 3)
    return saved(tmp_path / "checkpoints", peers, 3), peers


# ---------------------------------------------------------------- what is read is what was written


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_peer_equals_one_that_never_stopped(
    tmp_path: Path, optimizer: str, layout: torch.memory_format
) -> None:
    straight = peer("a-0", optimizer, layout=layout)
    learn(straight, 7)
    first = peer("a-0", optimizer, layout=layout)
    learn(first, 4)
    folder = saved(tmp_path, [first], 4)
    second = peer("a-0", optimizer, layout=layout)
    learn(second, 1, start=100)  # another history, all of which must be replaced
    state = load_peers(folder, [second])
    assert state["step"] == 4 and state["config"] == {"seed": 0}
    learn(second, 3, start=4)
    for name, value in everything(straight).items():
        assert torch.equal(everything(second)[name], value), name
    assert second.scaler.state_dict() == straight.scaler.state_dict()


def test_a_fresh_peer_without_optimizer_state_can_be_loaded(tmp_path: Path) -> None:
    first = peer("a-0", "adamw")
    learn(first, 2)
    fresh = peer("a-0", "adamw")
    load_peers(saved(tmp_path, [first], 2), [fresh])
    for name, value in everything(first).items():
        assert torch.equal(everything(fresh)[name], value), name


def test_weights_of_the_last_exchange_are_there_from_the_first_exchange_on(tmp_path: Path) -> None:
    def exchanging() -> Peer:  # before the fourth step
        one = peer("a-0")
        one.snapshot = Snapshot(copy.deepcopy(one.module), first=3)
        return one

    def taken(one: Peer) -> bool:
        assert one.snapshot is not None
        return one.snapshot.is_taken

    first, second = exchanging(), exchanging()
    learn(first, 3)
    early = saved(tmp_path / "early", [first], 3)
    load_peers(early, [second])
    assert not taken(second)
    assert first.snapshot is not None and second.snapshot is not None
    first.snapshot.is_taken = True
    learn(first, 1, start=3)
    load_peers(saved(tmp_path / "late", [first], 4), [second])
    assert taken(second)
    right = first.snapshot.module.state_dict()
    assert not torch.equal(right["3.weight"], first.module.state_dict()["3.weight"])
    for name, value in second.snapshot.module.state_dict().items():
        assert torch.equal(value, right[name])

    with pytest.raises(UnreadableError, match="safetensors has weights of an exchange at step 3"):
        load_peers(saved(tmp_path / "too early", [first], 3), [exchanging()])
    first.snapshot.is_taken = False
    with pytest.raises(UnreadableError, match="safetensors lacks weights of an exchange at step 4"):
        load_peers(saved(tmp_path / "too late", [first], 4), [exchanging()])
    first.snapshot = None
    with pytest.raises(UnreadableError, match="lacks weights"):
        load_peers(saved(tmp_path / "none", [first], 4), [exchanging()])
    first.snapshot = Snapshot(copy.deepcopy(peer("a-0", width=5).module), 3, is_taken=True)
    with pytest.raises(UnreadableError, match=r"snapshot\.\S+ .* does not fit a-0"):
        load_peers(saved(tmp_path / "other", [first], 4), [exchanging()])


def test_channels_last_and_tied_weights_are_written(tmp_path: Path) -> None:
    one = peer("a-0")
    one.module.to(memory_format=torch.channels_last)
    one.module[3].twin = one.module[3].weight
    learn(one, 1)
    other = peer("a-0")
    other.module[3].twin = other.module[3].weight
    load_peers(saved(tmp_path, [one], 1), [other])
    assert torch.equal(one.module[0].weight, other.module[0].weight)


# ---------------------------------------------------------------- complete or absent


def test_a_folder_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    folder = checkpoint.begin(tmp_path, 5)
    checkpoint.write_peer(folder, peer("a-0"))
    assert named(tmp_path) == []
    checkpoint.finish(folder, ["a-0"], 5, {}, keep=1)
    assert [path.name for path in named(tmp_path)] == ["step-00000005"]
    assert sorted(path.name for path in named(tmp_path)[0].iterdir()) == [
        "a-0.json",
        "a-0.safetensors",
        "state.json",
    ]


def test_the_newest_are_kept_and_leftovers_cleared(tmp_path: Path) -> None:
    one = peer("a-0")
    (tmp_path / ".new-step-00000001").mkdir(parents=True)
    for step in (1, 2, 10, 100_000_000):
        saved(tmp_path, [one], step, keep=2)
    assert [path.name for path in named(tmp_path)] == ["step-100000000", "step-00000010"]
    assert not list(tmp_path.glob(".*"))


def test_the_last_one_is_there_until_the_next_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = peer("a-0")
    old = saved(tmp_path, [one], 1, keep=1)
    folder = checkpoint.begin(tmp_path, 2)
    checkpoint.write_peer(folder, one)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.finish(folder, ["a-0"], 2, {}, keep=1)
    assert named(tmp_path) == [old] and read_state(old)["step"] == 1


# ---------------------------------------------------------------- damage


def refused(folder: Path, file: Path) -> None:
    """The checkpoint is refused with the file's name, and no peer is touched."""
    peers = [peer("a-0"), peer("bb-0", "adamw")]
    before = [everything(one) for one in peers]
    with pytest.raises(UnreadableError) as error:
        load_peers(folder, peers)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    for one, values in zip(peers, before, strict=True):
        for name, value in everything(one).items():
            assert torch.equal(value, values[name]), name


FILES = ["state.json", "a-0.json", "a-0.safetensors", "bb-0.json", "bb-0.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(written: tuple[Path, list[Peer]], name: str) -> None:
    folder, _ = written
    content = (folder / name).read_bytes()
    for part in range(20):
        (folder / name).write_bytes(content[: len(content) * part // 20])
        refused(folder, folder / name)
    (folder / name).unlink()
    refused(folder, folder / name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_refused(written: tuple[Path, list[Peer]], name: str) -> None:
    folder, _ = written
    content, chance = (folder / name).read_bytes(), random.Random(name)
    for _ in range(200):
        place = chance.randrange(len(content))
        spoiled = bytearray(content)
        spoiled[place] ^= chance.randrange(1, 256)
        (folder / name).write_bytes(spoiled)
        refused(folder, folder / name)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_executed(
    written: tuple[Path, list[Peer]], tmp_path: Path, name: str
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    folder, _ = written
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, folder / name)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_far_too_large_is_not_read(written: tuple[Path, list[Peer]]) -> None:
    folder, _ = written
    for name in FILES:
        content = (folder / name).read_bytes()
        with open(folder / name, "r+b") as file:
            file.truncate(2**40)  # sparse: it takes no room on the disk
        refused(folder, folder / name)
        (folder / name).write_bytes(content)


def test_weights_of_another_network_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path, [peer("a-0", width=8)], 1)
    with pytest.raises(UnreadableError, match=r"a-0\.safetensors: .* does not fit a-0"):
        load_peers(folder, [peer("a-0")])


@pytest.mark.parametrize("beyond", [0, 90])
def test_a_well_formed_stranger_is_refused(written: tuple[Path, list[Peer]], beyond: int) -> None:
    # Every sha256 right, and yet a tensor too many: shapes and names are checked too.
    folder, peers = written
    path = folder / "a-0.safetensors"
    index = (
        len(list(peers[0].module.parameters())) + beyond
    )  # one past the last, and one far beyond
    tensors = load_file(path) | {f"optimizer.{index}.momentum_buffer": torch.zeros(3)}
    save_file(tensors, path, metadata={"format": "pt"})
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    state["files"]["a-0.safetensors"] = checkpoint._sha256(path.read_bytes())
    state["sha256"] = checkpoint._sha256(checkpoint._dump(state))
    (folder / "state.json").write_bytes(checkpoint._dump(state))
    refused(folder, path)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    folder = saved(tmp_path, [peer("a-0")], 1)
    monkeypatch.undo()
    with pytest.raises(UnreadableError, match="has format 2, not 1"):
        read_state(folder)


def test_the_state_lists_the_sha256_of_every_file(written: tuple[Path, list[Peer]]) -> None:
    folder, _ = written
    files = json.loads((folder / "state.json").read_text())["files"]
    found = {path for path in folder.iterdir() if path.name != "state.json"}
    assert files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_file_names_in_the_state_are_never_opened(
    written: tuple[Path, list[Peer]], tmp_path: Path
) -> None:
    folder, peers = written
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    state = json.loads((moved / "state.json").read_text())
    del state["sha256"]
    state["files"]["../../etc/passwd"] = "0" * 64
    state["sha256"] = checkpoint._sha256(checkpoint._dump(state))
    (moved / "state.json").write_bytes(checkpoint._dump(state))
    assert load_peers(moved, peers)["step"] == 3  # never opened


def test_invalid_json_is_refused(written: tuple[Path, list[Peer]]) -> None:
    folder, _ = written
    for content in (
        '{"format": NaN, "sha256": "0"}',
        "[1]",
        "[" * 100_000,
        '{"sha256": "\\ud800"}',
    ):
        (folder / "state.json").write_text(content)
        refused(folder, folder / "state.json")
