"""Who counts as lost: a process that was silent for long while we wait, and nobody else."""

import contextlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dml_accel.core.errors import ProcessLostError
from dml_accel.distributed import liveness
from dml_accel.distributed.liveness import Liveness, Silence, connect
from dml_accel.distributed.processes import cause

WAITS = "in a collective"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer "
            "[127.0.0.1]:25486. This is typically caused by a remote worker crashing. GLHF!",
            "Connection closed by peer [127.0.0.1]:25486",
        ),
        (
            "[../gloo/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation\nat a",
            "Timed out waiting 4000ms for recv operation",
        ),
        ("[1] is no place. It stays", "[1] is no place"),
        ("wait timeout after 5000ms", "wait timeout after 5000ms"),
    ],
)
def test_the_cause_is_what_happened_without_place_and_advice(text: str, expected: str) -> None:
    assert cause(RuntimeError(text)) == expected


def looks(silence: Silence, beats: list[dict[int, bytes]], positions: list[object]) -> list[int]:
    """Take several looks; return the ranks that were lost at the last one."""
    found = [silence.lost(*look) for look in zip(beats, positions, strict=True)]
    assert not any(found[:-1])
    return found[-1]


def numbers(count: int) -> list[bytes]:
    return [str(i).encode() for i in range(count)]


def test_a_rank_is_lost_after_as_many_looks_in_a_row_without_a_heartbeat() -> None:
    beats = [{1: beat, 2: b"7"} for beat in numbers(4)]
    # The first look finds a heartbeat; three more find the same one.
    assert looks(Silence(3), beats, 4 * [WAITS]) == [2]
    assert looks(Silence(3), beats[:3], 3 * [WAITS]) == []


def test_one_heartbeat_starts_the_count_again() -> None:
    beats = [{1: beat} for beat in (b"1", b"1", b"1", b"2", b"2", b"2", b"2")]
    assert looks(Silence(3), beats, 7 * [WAITS]) == [1]
    assert looks(Silence(3), beats[:6], 6 * [WAITS]) == []


def test_a_rank_that_never_sent_a_heartbeat_is_lost_too() -> None:
    assert looks(Silence(2), 3 * [{1: b""}], 3 * [WAITS]) == [1]


def test_nobody_is_lost_while_our_own_main_thread_moves() -> None:
    moving = list(range(20))
    silence = Silence(3)
    assert looks(silence, 20 * [{1: b"1"}], moving) == []
    # It has stood still since the look before: two more find it there.
    assert looks(silence, 2 * [{1: b"1"}], 2 * [19]) == []
    assert looks(silence, [{1: b"1"}], [19]) == [1]


def test_a_rank_that_ended_in_order_is_not_lost() -> None:
    assert looks(Silence(2), 9 * [{1: b"ended"}], 9 * [WAITS]) == []


# ---------------------------------------------------------------- two processes, in one


@pytest.fixture
def store() -> Iterator[Any]:
    """A launcher's store."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def group(store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The connection of a process group to the store, wrapped as torch wraps it."""
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.1)  # faster than in a run
    client = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    wrapped = PrefixStore("default_pg", PrefixStore("attempt", client))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: wrapped)
    return wrapped


@pytest.fixture
def pair(group: Any) -> Iterator[list[Liveness]]:
    """The liveness of rank 0 and of rank 1."""
    both = [Liveness(rank, 2, connect(timedelta(seconds=20), "0-0")) for rank in (0, 1)]
    yield both
    for one in both:
        one.close()


def test_all_processes_name_the_lost_ones_and_one_prints(pair: list[Liveness]) -> None:
    assert pair[0].why_it_failed("a test") is None
    pair[1].close()
    first, second = pair[0].why_it_failed("closed"), pair[1].why_it_failed("another")
    assert isinstance(first, ProcessLostError) and isinstance(second, ProcessLostError)
    text = "rank 1 stopped responding, so the run ends (closed)"
    assert str(first) == str(second) == text
    assert (first.prints, second.prints) == (True, False)


def test_heartbeats_go_on_while_the_main_thread_waits_for_the_store(
    store: Any, group: Any, pair: list[Liveness]
) -> None:
    # As it does when NCCL starts. On one connection the heartbeats would wait behind it.
    waits = threading.Thread(target=group.get, args=("later",))
    waits.start()
    try:
        assert pair[0].why_it_failed("a test") is None
        assert waits.is_alive()
    finally:
        store.set("attempt/default_pg/later", "now")
        waits.join()


# ---------------------------------------------------------------- when the process is ended


@pytest.fixture
def exits(group: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have been ended, within three short looks."""
    found: list[int] = []
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(liveness, "LOOKS", 3)
    monkeypatch.setattr(liveness.os, "_exit", found.append)
    return found


@pytest.mark.parametrize("place", ["waits", "looks away", "has left"])
def test_the_process_is_ended_only_while_its_main_thread_waits(
    exits: list[int], place: str
) -> None:
    said: list[ProcessLostError] = []
    alone = Liveness(0, 2, connect(timedelta(seconds=20), "0-0"))  # rank 1 never appears
    with contextlib.ExitStack() as stack:
        if place != "has left":
            stack.enter_context(alone.watching(said.append))
        if place == "looks away":
            stack.enter_context(alone.looking_away())
        threading.Event().wait(3)
    alone.close()
    assert bool(exits) == (place == "waits")
    assert set(exits) <= {1} and all("rank 1 stopped" in str(error) for error in said)
    assert len(said) == len(exits)


def test_an_announced_loss_ends_a_process_once_its_main_thread_stands_still(
    exits: list[int], pair: list[Liveness], store: Any
) -> None:
    store.set("alive-0-0/lost", "1 rank 7 stopped responding")
    with pair[0].watching(None):
        # Another instruction at each look: it works, and waits for nobody.
        exec("import time\n" + 20 * "time.sleep(0.1)\n", {})
        assert not exits
        threading.Event().wait(2)
        assert exits


@pytest.mark.parametrize("looks", [3, 10**6])
def test_a_store_that_does_not_answer_counts_only_after_longer(
    exits: list[int], monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    def refuse(self: Liveness, ranks: object) -> None:
        raise RuntimeError("no answer")

    monkeypatch.setattr(liveness, "_LOOKS_WITHOUT_STORE", looks)
    monkeypatch.setattr(Liveness, "_read", refuse)
    alone = Liveness(1, 2, connect(timedelta(seconds=20), "0-0"))
    with alone.watching(None):
        threading.Event().wait(3)
    alone.close()
    assert bool(exits) == (looks == 3)
