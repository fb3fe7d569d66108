"""Who trains what: allocation against brute force, predictions computed by hand, refusals."""

import dataclasses
import itertools
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dml_accel import cli
from dml_accel.core.config import Config
from dml_accel.core.tables import ranges
from dml_accel.core.updates import UPDATE_SCHEDULES
from dml_accel.data.batches import ImageFormat
from dml_accel.distributed.costs import Cost, _timed_rows, count, timed
from dml_accel.distributed.exchange import Team, overlaps_of
from dml_accel.distributed.plan import (
    Machine,
    StepLoad,
    allocate,
    choose,
    everywhere,
    predict,
    predict_both,
    splits,
    timed_as_a_whole,
)
from dml_accel.distributed.plan_tables import _which, scales
from dml_accel.models.spec import parse_cohort
from dml_accel.training.setup import image_format
from tests.helpers import build_peer, tiny_config

SMALL = Cost(1_000_000, 1000, activation_bytes=50, norms=2, channels=10, state_bytes=4100)
LARGE = Cost(3_000_000, 500_000, activation_bytes=70, norms=4, channels=20, state_bytes=2_000_400)
MACHINE = Machine(bandwidth=1e6, latency=1e-3, macs_per_second=1e9)


def load(config: Config) -> StepLoad:
    return StepLoad.of(config, classes=10)


# ---------------------------------------------------------------- allocation


def test_the_slowest_peer_is_as_fast_as_it_can_be() -> None:
    chance = random.Random(0)
    for _ in range(200):
        costs = [0.1 + 10 * chance.random() for _ in range(chance.randint(1, 4))]
        world = chance.randint(len(costs), 9)
        ranks = allocate({f"peer-{i}": cost for i, cost in enumerate(costs)}, world)
        assert sorted(itertools.chain(*ranks.values())) == list(range(world))
        found = max(cost / len(ranks[f"peer-{i}"]) for i, cost in enumerate(costs))
        best = min(
            max(cost / n for cost, n in zip(costs, sizes, strict=True))
            for sizes in itertools.product(range(1, world + 1), repeat=len(costs))
            if sum(sizes) == world
        )
        assert found == pytest.approx(best, rel=1e-12)


def test_the_costliest_peer_gets_the_processes() -> None:
    ranks = allocate({"resnet32-0": 69, "mobilenet-0": 176, "wrn_28_10-0": 5243}, 8)
    assert ranks == {
        "mobilenet-0": [0],
        "resnet32-0": [1],
        "wrn_28_10-0": [2, 3, 4, 5, 6, 7],
    }


def test_with_few_processes_peers_share_them_evenly() -> None:
    chance = random.Random(1)
    for _ in range(200):
        peers = {f"peer-{i}": 0.1 + chance.random() for i in range(chance.randint(3, 7))}
        world = chance.randint(1, len(peers) - 1)
        ranks = allocate(peers, world)
        load = [sum(c for n, c in peers.items() if ranks[n] == [r]) for r in range(world)]
        assert all(len(held) == 1 for held in ranks.values()) and min(load) > 0
        # Longest first is at most 4/3 - 1/(3 m) of the best (Graham 1969), which is at least this.
        least = max(sum(peers.values()) / world, max(peers.values()))
        best = (
            min(
                max(
                    sum(c for c, r in zip(peers.values(), where, strict=True) if r == rank)
                    for rank in range(world)
                )
                for where in itertools.product(range(world), repeat=len(peers))
            )
            if world ** len(peers) < 3000
            else None
        )
        assert max(load) >= least - 1e-12
        if best is not None:
            assert max(load) <= (4 / 3 - 1 / (3 * world)) * best + 1e-12


def test_the_order_of_the_cohort_does_not_matter() -> None:
    costs = {"b-0": 1.0, "a-0": 1.0, "c-0": 2.0}
    for world in (1, 2, 3, 5):
        permuted = allocate(dict(reversed(costs.items())), world)
        assert allocate(costs, world) == permuted


def test_a_split_may_have_smaller_blocks() -> None:
    # 16 processes for work of 1 and 2.1: 5 and 11 have one block of all. 8 of them have 3 and 5,
    # twice; 4 have 1 and 3, four times.
    found = list(splits({"a-0": 1.0, "b-0": 2.1}, 16))
    widths = [[len(held) for held in ranks.values()] for ranks in found]
    assert widths == [[5, 11], [6, 10], [4, 12], [8, 8]]
    assert all(list(itertools.chain(*ranks.values())) == list(range(16)) for ranks in found)
    assert list(splits({"a-0": 1.0, "b-0": 2.0, "c-0": 1.0}, 2)) == [
        {"a-0": [1], "b-0": [0], "c-0": [1]}
    ]
    costs = {"a-0": SMALL, "b-0": dataclasses.replace(SMALL, macs=2_100_000)}
    step = load(tiny_config(batch_size=1024, batch_norm="local"))
    for latency, best in ((0.0, [5, 11]), (1.0, [8, 8])):
        machine = dataclasses.replace(MACHINE, bandwidth=1e12, latency=latency)
        _, split = predict_both(costs, 16, step, machine)
        assert [len(held) for held in split.ranks.values()] == best


# ---------------------------------------------------------------- predictions


def test_split_sends_only_logits() -> None:
    config = tiny_config(batch_size=8, float64=False)
    ranks, costs = {"a-0": [0], "b-0": [1]}, {"a-0": SMALL, "b-0": LARGE}
    found = predict(ranks, costs, load(config), MACHINE)
    # 8 rows of 10 logits of 4 bytes; 2 x 3 loss sums, of which two processes send half twice.
    assert found.sent == [8 * 10 * 4 + 2 * 3 * 4] * 2
    # Three forward passes' worth of arithmetic for 8 images.
    assert found.busy == pytest.approx([8 * 3 * 1e6 / 1e9, 8 * 3 * 3e6 / 1e9])
    # Two messages for the losses, one for the logits.
    assert found.step_seconds == pytest.approx(0.072 + 344 / 1e6 + 3e-3)
    assert found.idle[0] == pytest.approx(1 - 0.024 / found.step_seconds)
    assert found.memory == [3 * 4 * 1000 + 8 * 50, 3 * 4 * 500_000 + 8 * 70]
    # What computing takes goes with the largest tensor of a process, not with its networks.
    costs = {n: dataclasses.replace(c, largest_bytes=c.norms) for n, c in costs.items()}
    working = dataclasses.replace(MACHINE, temporaries=5)
    for ranks_now, more in ((ranks, [5 * 8 * 2, 5 * 8 * 4]), (everywhere(costs, 1), [5 * 8 * 4])):
        without, found = (predict(ranks_now, costs, load(config), m) for m in (MACHINE, working))
        assert [a - b for a, b in zip(found.memory, without.memory, strict=True)] == more
    # Weights, gradients, two moments, the average and its moves, the best weights.
    moments = {"a-0": dataclasses.replace(SMALL, optimizer_state=2.0), "b-0": LARGE}
    config = tiny_config(batch_size=8, float64=False, ema=0.9, keep="best", val_fraction=0.1)
    found = predict(ranks, moments, load(config), MACHINE)
    assert found.memory == [7 * 4 * 1000 + 8 * 50, 6 * 4 * 500_000 + 8 * 70]


def test_replicate_sends_gradients_and_batch_statistics() -> None:
    ranks, costs = everywhere(["a-0", "b-0"], 2), {"a-0": SMALL, "b-0": LARGE}
    config = tiny_config(batch_size=8, float64=False)
    found = predict(ranks, costs, load(config), MACHINE)
    gradients = 4 * (1000 + 500_000)
    # Forward a table of both processes' count, means and variances; backward two sums a channel.
    norms = 4 * (2 * (2 * 10 + 2) + 2 * 10) + 4 * (2 * (2 * 20 + 4) + 2 * 20)
    assert found.sent == pytest.approx([gradients + norms + 24] * 2)
    found = predict(ranks, costs, load(config.changed(batch_norm="local")), MACHINE)
    assert found.sent == pytest.approx([gradients + 24] * 2)


def test_a_network_is_not_faster_than_the_host_starts_it() -> None:
    # 12 images at 3 ms each take 36 ms; 4 operations forward, 8 backward at 2 ms each take 24 ms,
    # and twice that in two micro-batches.
    cost = Cost(1_000_000, 1000, 50, 0, 0, operations=4)
    machine = Machine(bandwidth=1e6, latency=1e-3, macs_per_second=1e9, start=2e-3)
    for config, milliseconds in (
        (tiny_config(batch_size=12), 36),
        (tiny_config(batch_size=12, grad_accum=2), 48),
        (tiny_config(batch_size=12, grad_accum=2, low_memory=True), 64),
        (tiny_config(batch_size=2), 24),
    ):
        found = predict({"a-0": [0]}, {"a-0": cost}, load(config), machine)
        assert found.busy == pytest.approx([milliseconds / 1e3]), config.optim


@pytest.mark.parametrize("world", [4, 8, 16])
def test_what_a_process_receives_does_not_grow_with_the_processes(world: int) -> None:
    # 16 rows each, whatever the number: from 3 others 16 x 10 logits of 4 bytes.
    config = tiny_config(batch_size=4 * world, float64=False, batch_norm="local")
    width = world // 4
    ranks = {f"a-{i}": list(range(i * width, (i + 1) * width)) for i in range(4)}
    found = predict(ranks, dict.fromkeys(ranks, SMALL), load(config), MACHINE)
    assert found.rows == [16] * world and found.kind == "split"
    assert found.exchanged == [3 * 16 * 10 * 4] * world
    # In a block of 4 processes 3 messages come one after the other.
    assert found.exchange == pytest.approx(1920 / 1e6 + 3e-3)
    # Gradients around a ring of the peer's processes, and 3 losses of 4 peers around one of all.
    averaged = 2 * (width - 1) / width * 4000 + 2 * (world - 1) / world * 3 * 4 * 4
    assert found.sent == pytest.approx([1920 + averaged] * world)
    assert found.received == pytest.approx(found.sent)


def test_unequal_teams_swap_the_rows_that_they_share() -> None:
    config = tiny_config(batch_size=12, float64=False, batch_norm="local")
    ranks, costs = {"a-0": [0, 1, 2], "b-0": [3, 4]}, {"a-0": SMALL, "b-0": SMALL}
    found = predict(ranks, costs, load(config), MACHINE)
    assert found.rows == [4, 4, 4, 6, 6]
    assert found.exchanged == [160] * 3 + [240] * 2
    assert found.exchange == pytest.approx(240 / 1e6 + 4e-3)  # one block of 5
    sums = predict(ranks, costs, load(config.changed(exchange="sum")), MACHINE)
    assert sums.exchanged == [4 * 12 * 4] * 3 + [6 * 12 * 4] * 2
    # Two peers in one process send both, and receive one.
    ranks = {"a-0": [0], "a-1": [0], "b-0": [1]}
    found = predict(ranks, dict.fromkeys(ranks, SMALL), load(config), MACHINE)
    ring = 3 * 3 * 4
    assert found.sent == [2 * 480 + ring, 480 + ring]
    assert found.received == [480 + ring, 2 * 480 + ring]


def test_bytes_are_those_of_the_rows_that_overlap() -> None:
    chance = random.Random(3)
    for _ in range(30):
        widths = [chance.randint(1, 5) for _ in range(chance.randint(2, 4))]
        ends = list(itertools.accumulate(widths, initial=0))
        ranks = {f"a-{i}": list(range(*ends[i : i + 2])) for i in range(len(widths))}
        teams = [Team(tuple(held), (name,)) for name, held in ranks.items()]
        count = chance.randint(5, 23)
        config = tiny_config(batch_size=2 * count, grad_accum=2, batch_norm="local", float64=False)
        found = predict(ranks, dict.fromkeys(ranks, SMALL), load(config), MACHINE)
        for rank, received in enumerate(found.exchanged):
            rows = sum(one.end - one.first for one in overlaps_of(teams, rank, count))
            assert received == 2 * rows * 10 * 4


def test_sums_in_a_block_are_one_all_reduce() -> None:
    config = tiny_config(batch_size=32, float64=False, exchange="sum", batch_norm="local")
    ranks = {f"a-{i}": [2 * i, 2 * i + 1] for i in range(4)}
    found = predict(ranks, dict.fromkeys(ranks, SMALL), load(config), MACHINE)
    each = 2 * 3 / 4 * 16 * 12 * 4
    assert found.exchanged == [each] * 8
    assert found.exchange == pytest.approx(each / 1e6 + 6e-3)
    trees = dataclasses.replace(MACHINE, trees=True)  # 2 up, 2 down
    found = predict(ranks, dict.fromkeys(ranks, SMALL), load(config), trees)
    assert found.exchange == pytest.approx(each / 1e6 + 4e-3)


# ---------------------------------------------------------------- weights of the last exchange


def test_stale_weights_are_sent_now_and_then_and_predict_every_step() -> None:
    config = tiny_config(batch_size=8, float64=False, exchange_every=10)
    ranks, costs = {"a-0": [0], "b-0": [1]}, {"a-0": SMALL, "b-0": LARGE}
    found = predict(ranks, costs, load(config), MACHINE)
    assert found.exchanged == [200_040, 410]
    assert found.sent == [410 + 24, 200_040 + 24]
    assert found.exchange == pytest.approx((2_004_500 / 1e6 + 2e-3) / 10)
    # Each trains its own and predicts with the other.
    assert found.busy == pytest.approx([8 * (3e6 + 3e6) / 1e9, 8 * (9e6 + 1e6) / 1e9])
    fresh = predict(ranks, costs, load(config.changed(exchange_every=1)), MACHINE)
    assert [a - b for a, b in zip(found.memory, fresh.memory, strict=True)] == [2_004_500] * 2
    # All three predict where a process has two peers, and everywhere for a target of all.
    ranks = {"a-0": [0], "a-1": [0], "b-0": [1]}
    costs = {"a-0": SMALL, "a-1": SMALL, "b-0": LARGE}
    for target, macs in (("peers", [6 + 5, 9 + 2]), ("mean-logit-all", [6 + 5, 9 + 5])):
        found = predict(ranks, costs, load(config.changed(target=target)), MACHINE)
        assert found.busy == pytest.approx([8 * each * 1e6 / 1e9 for each in macs])
    alone = load(config.changed(kl_weight=0.0))
    assert predict(ranks, costs, alone, MACHINE).exchanged == [0, 0]


def test_weights_go_along_a_tree_within_a_block() -> None:
    config = tiny_config(batch_size=40, float64=False, exchange_every=5)
    costs = {f"a-{i}": dataclasses.replace(SMALL, state_bytes=10**i) for i in range(4)}
    ranks = {f"a-{i}": [2 * i, 2 * i + 1] for i in range(4)}
    found = predict(ranks, costs, load(config), MACHINE)
    assert found.exchanged == [each / 5 for each in (1110, 1110, 1101, 1101, 1011, 1011, 111, 111)]
    # A root sends to two, the next one on to the fourth; the processes of a block follow in turn.
    group = 2 * 1 / 2 * (4000 + 4 * 2 * 22 + 4 * 20) + 2 * 7 / 8 * 48
    sent = [(2 * 1 + 1000) / 5, (2 * 10 + 1) / 5, (2 * 100 + 10) / 5, (2 * 1000 + 100) / 5]
    assert found.sent[::2] == pytest.approx([each + group for each in sent])
    assert found.exchange == pytest.approx(2 * (1111 / 1e6 + 4e-3) / 5)


# ---------------------------------------------------------------- the time of a whole step


def test_a_measured_step_is_shared_by_the_peers() -> None:
    costs = {"a-0": SMALL, "b-0": LARGE}
    for flags in ({}, {"low_memory": True}, {"grad_accum": 2}, {"update": "sequential"}):
        step = load(tiny_config(batch_size=8, **flags))
        timed_costs, machine = timed_as_a_whole(costs, step, MACHINE, 0.4)
        one = predict(everywhere(costs, 1), timed_costs, step, machine)
        assert one.step_seconds == pytest.approx(0.4)
        both = predict({"a-0": [0], "b-0": [1]}, timed_costs, step, machine)
        assert both.busy == pytest.approx([0.1, 0.3])


def test_no_start_is_longer_than_the_measured_step_allows() -> None:
    costs = dict.fromkeys(("a-0", "a-1"), dataclasses.replace(SMALL, operations=4))
    step = load(tiny_config(batch_size=8, batch_norm="local"))
    machine = dataclasses.replace(MACHINE, start=2e-3, bandwidth=1e12, latency=0.0)
    # Assumed: 12 operations of each network take 24 ms to start. Measured: 24 ms for both.
    found, shorter = timed_as_a_whole(costs, step, machine, 24e-3)
    assert shorter.start == pytest.approx(1e-3)
    for world in (1, 2, 4):  # fewer rows do not take less
        one = predict(everywhere(costs, world), found, step, shorter)
        assert one.step_seconds == pytest.approx(24e-3, rel=1e-3)
    found, same = timed_as_a_whole(costs, step, machine, 96e-3)
    assert same.start == 2e-3
    for world, seconds in ((1, 96e-3), (2, 48e-3), (4, 48e-3)):
        one = predict(everywhere(costs, world), found, step, same)
        assert one.step_seconds == pytest.approx(seconds, rel=1e-3)


# ---------------------------------------------------------------- many processes


def test_a_step_on_many_processes() -> None:
    config = tiny_config(batch_size=64, float64=False, batch_norm="local")
    costs, step = {"a-0": SMALL, "a-1": SMALL}, load(config)
    update = config.method.schedule
    worlds = [1, 2, 128]
    found = scales(
        worlds, dict.fromkeys(worlds, costs), dict.fromkeys(worlds, step), "auto", update, MACHINE
    )
    one, two, many = found
    # 64 images of 2 networks at 3 ms: 384 ms; in two processes 192, logits and three messages.
    assert one.images_per_second == pytest.approx(64 / 0.384)
    assert one.efficiency == pytest.approx(1)
    seconds = 0.192 + (64 * 10 * 4 + 24) / 1e6 + 3e-3
    assert two.chosen is not None and two.chosen.kind == "split"
    assert two.chosen.step_seconds == pytest.approx(seconds)
    assert two.efficiency == pytest.approx(0.384 / 2 / seconds)
    assert many.chosen is None and many.batch_size == 128


def test_four_thousand_processes_are_planned_at_once() -> None:
    costs = {"a-0": SMALL, "b-0": LARGE, "b-1": LARGE, "c-0": SMALL}
    worlds = [1, *(2**n for n in range(3, 13))]
    step = load(tiny_config(batch_size=5000))
    update, began = UPDATE_SCHEDULES["simultaneous"], time.process_time()
    found = scales(
        worlds, dict.fromkeys(worlds, costs), dict.fromkeys(worlds, step), "auto", update, MACHINE
    )
    assert time.process_time() - began < 2
    assert all(one.chosen is not None for one in found)


def test_processes_are_named_in_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges([]) == ""
    assert _which([0, 1, 3, 5, 7]) == "0-1 3 5 7"
    assert _which(range(0, 1024, 2)) == "512 of 0-1022"
    update = UPDATE_SCHEDULES["simultaneous"]
    equal, step = {"a-0": LARGE, "b-0": LARGE}, load(tiny_config(batch_size=2048))
    why = choose(equal, 1024, step, "split", update, MACHINE)[1]
    assert why == "as asked, a-0 on 0-511, b-0 on 512-1023"


# ---------------------------------------------------------------- sums, rounding, decoding


@pytest.mark.parametrize("peers", [2, 4, 8])
def test_the_volume_of_summed_posteriors_does_not_grow_with_the_cohort(peers: int) -> None:
    config = tiny_config(batch_size=8, float64=False, exchange="sum")
    ranks = {f"a-{i}": [i] for i in range(peers)}
    found = predict(ranks, dict.fromkeys(ranks, SMALL), load(config), MACHINE)
    ring = 2 * (peers - 1) / peers
    assert found.sent[0] == pytest.approx(ring * (8 * 12 * 4 + 3 * 4 * peers))


def test_rounding_halves_the_logits() -> None:
    ranks, costs = {"a-0": [0], "b-0": [1]}, {"a-0": SMALL, "b-0": LARGE}
    config = tiny_config(batch_size=8, float64=False, exchange_dtype="bf16")
    assert predict(ranks, costs, load(config), MACHINE).sent[0] == 8 * 10 * 2 + 24


def test_peers_that_do_not_teach_send_nothing() -> None:
    ranks, costs = {"a-0": [0], "b-0": [1]}, {"a-0": SMALL, "b-0": LARGE}
    config = tiny_config(float64=False, kl_weight=0.0)
    assert predict(ranks, costs, load(config), MACHINE).sent[0] == 24


@pytest.mark.parametrize(
    ("flags", "workers", "decoded", "late_ms"),
    [
        # Computing takes 1 s here, as below; 8 images of 0.2 s are 1.6 s of one worker, 0.8 of two.
        ({}, 1, [8, 8], 600),
        ({}, 2, [8, 8], 0),
        ({}, 0, [8, 8], 1600),  # the process itself decodes before it computes
        ({"mixup": 0.2}, 2, [8, 8], 0),  # a whole batch has its partners
        ({"mixup": 0.2, "grad_accum": 2}, 2, [16, 16], 600),
    ],
)
def test_peers_of_one_process_each_decode_every_image(
    flags: dict[str, float], workers: int, decoded: list[int], late_ms: float
) -> None:
    config = tiny_config(batch_size=8, float64=False, **flags)
    step = dataclasses.replace(load(config), decoding=0.2, workers=workers)
    ranks, costs = {"a-0": [0], "b-0": [1]}, dict.fromkeys(("a-0", "b-0"), SMALL)
    machine = Machine(bandwidth=1e15, latency=0, macs_per_second=3e6 * 8)  # 8 images: 1 s
    found = predict(ranks, costs, step, machine)
    assert found.decoded == decoded
    assert found.late == pytest.approx(late_ms / 1e3)
    assert found.step_seconds == pytest.approx(1 + late_ms / 1e3)
    both = predict(everywhere(["a-0", "b-0"], 2), costs, step, machine)
    assert sum(both.decoded) == 8 * (2 if config.data.mixup else 1)  # halves of every image


def test_decoding_decides_for_replicate() -> None:
    equal, step = {"a-0": LARGE, "b-0": LARGE}, load(tiny_config(batch_size=8))
    update = UPDATE_SCHEDULES["simultaneous"]
    assert choose(equal, 2, step, "auto", update, MACHINE)[0] == {"a-0": [0], "b-0": [1]}
    slow = dataclasses.replace(step, decoding=10.0, workers=1)
    assert choose(equal, 2, slow, "auto", update, MACHINE)[0] == everywhere(equal, 2)


@pytest.mark.parametrize("measure", [False, True])
def test_plan_says_what_decoding_costs(
    measure: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in range(4):
        folder = tmp_path / "train" / "abc"[row % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (row, 0, 0)).save(folder / f"{row}.png")
    (tmp_path / "train").rename(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "test")
    (tmp_path / "one").rename(tmp_path / "train")
    words = ["--cohort", "resnet8*2", "--dataset", str(tmp_path), "--feed", "loader", "--cpu"]
    words += ["--workers", "3", "--batch-size", "8", *(["--measure"] if measure else [])]
    assert cli.main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert "8 images of 32 pixels per step, 3 classes" in text
    replicate, _, split = text.partition("split:")
    assert "each image is decoded 1 times an epoch: " in replicate
    assert "each image is decoded 2 times an epoch: " in split and "there are 3" in split
    assert ("(timed on this machine)" if measure else "3.0 ms of a core") in text


def test_auto_takes_what_is_predicted_to_be_faster() -> None:
    step, update = load(tiny_config(batch_size=8, float64=False)), UPDATE_SCHEDULES["simultaneous"]
    equal = {"a-0": SMALL, "a-1": SMALL}
    ranks, why = choose(equal, 2, step, "auto", update, MACHINE)
    assert ranks == {"a-0": [0], "a-1": [1]} and why.startswith("split, a-0 on 0, a-1 on 1: ")
    # One costly peer: apart, the other process would wait for it nearly all the time.
    unequal = {"a-0": SMALL, "b-0": Cost(3_000_000, 1000, 70, 0, 0)}
    fast = Machine(bandwidth=1e12, latency=1e-9, macs_per_second=1e9)
    ranks, why = choose(unequal, 2, step, "auto", update, fast)
    assert ranks == {"a-0": [0, 1], "b-0": [0, 1]}
    replicate, split = predict_both(unequal, 2, step, fast)
    assert replicate.step_seconds < split.step_seconds
    assert f"{1e3 * split.step_seconds:.0f} ms for split" in why
    assert choose(unequal, 2, step, "split", update, fast)[0]["a-0"] == [0]
    assert choose(equal, 2, step, "replicate", update, MACHINE)[0]["a-0"] == [0, 1]


# ---------------------------------------------------------------- costs


def test_a_network_is_counted_by_hand() -> None:
    # 3 x 8 x 8 images; convolution 3 x 3 to 4 channels, batch norm, mean, 5 classes.
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 5),
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = count(net, 8)
    assert found.macs == 8 * 8 * 4 * 3 * 9 + 4 * 5
    assert found.parameters == 4 * 3 * 9 + 8 + 4 * 5 + 5
    assert (found.norms, found.channels) == (1, 4)
    # Convolution, batch norm, ReLU, mean and the linear layer: flattening is a view.
    assert found.operations == 5
    # The image, the outputs of convolution and ReLU, the pooled four: what backward needs.
    least = 4 * (3 * 64 + 2 * 4 * 64 + 4)
    assert least <= found.activation_bytes <= least + 4 * 5 * 4
    assert found.largest_bytes == 4 * 4 * 64  # the output of the convolution or of ReLU
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_times_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DML_CACHE", str(tmp_path))
    config = tiny_config(cohort=("resnet8",))
    (spec,) = parse_cohort(config.cohort)
    modules = {spec.name: build_peer(spec, config, classes=10)}
    before = next(modules[spec.name].parameters()).clone()

    def measured() -> dict[str, float]:
        images = image_format(config, torch.device("cpu"))
        return timed([spec], modules, config.optim, "no", images)

    rows = []
    monkeypatch.setattr(ImageFormat, "noise", lambda self, n: rows.append(n) or self.zeros(n))
    first = measured()
    assert rows == [16]
    assert first["resnet8-0"] > 0
    assert measured() == first
    assert torch.equal(next(modules[spec.name].parameters()), before)


@pytest.mark.parametrize(
    ("device", "processes", "rows"),
    [("cpu", 1, 16), ("cuda", 1, 32), ("cuda", 4, 8), ("mps", 1, 32), ("cuda", 32, 2)],
)
def test_a_gpu_is_timed_with_the_images_of_a_process(
    device: str, processes: int, rows: int
) -> None:
    optim = tiny_config(batch_size=64, grad_accum=2).optim
    assert _timed_rows(torch.device(device), optim, processes) == rows


# ---------------------------------------------------------------- the command


def test_plan_prints_both_placements_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cohort", "resnet8*2", "--world", "3", "--bandwidth", "0.5", "--latency", "50"]
    assert cli.main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "replicate: " in said and "split: " in said and "--placement auto: " in said
    assert "0.5 GB/s, 50 us per message" in said
    assert sum(line.startswith("2 ") for line in said.splitlines()) == 2  # a row per process


def test_plan_counts_what_each_optimizer_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    def memory(*words: str) -> int:
        shape = ["--cohort", "resnet110", "--world", "1", "--batch-size", "2", "--cpu"]
        assert cli.main(["plan", *shape, *words]) == 0
        said = capsys.readouterr().out
        copies = "averages and" if words else "state of the optimizer and"
        assert f" {copies} activations, with 13 tensors like the largest of these" in said
        assert "; without images and libraries." in said
        (row,) = {line for line in said.splitlines() if line.startswith("0 ")}
        return int(row.split()[-1])

    # 1.7 million parameters of 4 bytes: a second moment, the average, and its moves.
    more = memory("--peer-opt", "resnet110-0:optimizer=adamw", "--ema", "0.9") - memory()
    assert 20 <= more <= 22


def test_the_assumed_speed_follows_from_the_threads(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        for count, rate in (("1", "40 billion"), ("3", "120 billion")):
            assert cli.main(["plan", "--cohort", "resnet8*2", "--cpu", "--threads", count]) == 0
            assert f"assumed: {rate} multiply-accumulates per second" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "0"], "--world is 0; it must be at least 1"),
        (["--bandwidth", "-1"], "--bandwidth is -1.0; it must be above 0"),
        (["--world", "65"], "--world 65 is more than the 64 images"),
        (["--cohort", "resnet33"], "unknown net 'resnet33'"),
        (["--cohort", "2", "--peer-opt", "b-7:lr=1"], "--peer-opt b-7: there is no such peer"),
        (["--optimizer", "adamv", "--measure"], "--optimizer adamv: there is no such optimizer"),
        (["--augment", "flop"], "--augment: unknown word 'flop'"),
        (["--exchange", "sum", "--exchange-dtype", "bf16"], "--exchange sum sends none"),
    ],
)
def test_plan_refuses(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
