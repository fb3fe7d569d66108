"""Who counts as lost: a process that was silent for long while we wait, and nobody else."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dml_accel.core.errors import ProcessLostError
from dml_accel.distributed import liveness
from dml_accel.distributed.liveness import (
    Liveness,
    Silence,
    Waiting,
    behind,
    connect,
    named,
)
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


def looks(silence: Silence, beats: Sequence[bytes], positions: Sequence[object]) -> bool:
    """Take several looks; return whether the other process was lost at the last one."""
    found = [silence.is_lost(*look) for look in zip(beats, positions, strict=True)]
    assert not any(found[:-1])
    return found[-1]


def test_a_process_is_lost_after_as_many_looks_in_a_row_without_a_heartbeat() -> None:
    # The first look finds a heartbeat; three more find the same one.
    assert looks(Silence(3), 4 * [b"7"], 4 * [WAITS])
    assert not looks(Silence(3), 3 * [b"7"], 3 * [WAITS])


def test_one_heartbeat_starts_the_count_again() -> None:
    beats = [b"1", b"1", b"1", b"2", b"2", b"2", b"2"]
    assert looks(Silence(3), beats, 7 * [WAITS])
    assert not looks(Silence(3), beats[:6], 6 * [WAITS])


def test_a_process_that_never_sent_a_heartbeat_is_lost_too() -> None:
    assert looks(Silence(2), 3 * [b""], 3 * [WAITS])


def test_nobody_is_lost_while_our_own_main_thread_moves() -> None:
    silence = Silence(3)
    assert not looks(silence, 20 * [b"1"], range(20))
    # It has stood still since the look before: two more find it there.
    assert not looks(silence, 2 * [b"1"], 2 * [19])
    assert looks(silence, [b"1"], [19])


def test_a_process_that_ended_in_order_is_not_lost() -> None:
    assert not looks(Silence(2), 9 * [b"ended"], 9 * [WAITS])


# ---------------------------------------------------------------- who is slow


@pytest.mark.parametrize(
    ("beats", "slow"),
    [
        # Rank 2 has not come to the collective in which the others wait.
        (["1 7 waits", "1 7 waits", "1 6 works", "1 7 waits"], [2]),
        # Ranks 1 and 2 share a peer: 1 waits for the gradients of 2.
        (["1 7 waits", "1 6 waits", "1 6 works"], [2]),
        # Nobody of the last works: those two wait for each other, or average gradients for long.
        (["1 7 waits", "1 6 waits", "1 6 waits"], [1, 2]),
        # Within one collective of a part of all.
        (["1 7 waits", "1 7 works"], [1]),
        (["1 7 waits", "1 7 waits"], []),
        # A caller has its record, another process has ended, one sends its first heartbeat soon.
        (["1 7 waits", "1 3 away", "ended", "", "1 7 waits"], []),
        (["1 7 waits", "1 3 away", "1 5 works", "1 4 works"], [3]),
        # The heartbeat of rank 1 has stopped: it may be lost, and is not slow.
        (["1 7 waits", "0 5 works", "1 6 works"], [2]),
    ],
)
def test_the_slow_ones_are_alive_and_have_come_to_the_fewest_collectives(
    beats: list[str], slow: list[int]
) -> None:
    after = {rank: beat.encode() for rank, beat in enumerate(beats)}
    before = dict.fromkeys(after, b"0 5 works")
    assert behind(before, after) == slow


def test_the_slow_ones_are_named_once_while_we_wait_and_no_more_than_once_a_minute() -> None:
    waiting, read, said = Waiting(), [], []
    # 12 looks in one place, then a step, then the others in a second place, where they change.
    for look, waited in enumerate([*range(12), 0, *range(1, 90)]):
        said += [look] if waiting.names(waited, "rank 5" if look < 80 else "rank 6") else []
        read += [look] if waiting.reads else []
    assert said == [5, 35, 80]
    assert read[:7] == [3, 4, 8, 9, 15, 16, 20]  # two in a row, before the look that names them
    assert not any(Waiting().names(waited, "") for waited in range(20))


def test_a_main_thread_waits_in_a_collective_and_in_a_backward_pass() -> None:
    def place(_: object = None) -> None:
        found.append(liveness._place(threading.get_ident()))

    found: list[str] = []
    place()
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(place)
    weight.sum().backward()
    # A function of torch.distributed that calls another one, as a collective waits.
    exec("place()", {"__name__": "torch.distributed.distributed_c10d", "place": place})
    assert found == ["works", "waits", "waits"] and liveness._place(None) == "away"


def test_many_ranks_are_named_as_ranges() -> None:
    assert named([3, 5]) == "rank 3, rank 5"
    assert named(range(8)).count("rank ") == 8
    assert named([0, *range(3, 11), 15]) == "ranks 0, 3-10, 15"


# ---------------------------------------------------------------- several processes, in one


@pytest.fixture
def store() -> Iterator[Any]:
    """A launcher's store."""
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def group(store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The connection of a process group to the store, wrapped as torch wraps it."""
    # Faster than in a run.
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(liveness, "_SECONDS_TO_READ", 0.5)
    monkeypatch.setattr(liveness, "_SECONDS_TO_INQUIRE", 0.8)
    client = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    wrapped = PrefixStore("default_pg", PrefixStore("attempt", client))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: wrapped)
    return wrapped


@pytest.fixture
def pair(group: Any) -> Iterator[list[Liveness]]:
    """The liveness of rank 0 and of rank 1."""
    both = [alive(rank, 2) for rank in (0, 1)]
    yield both
    for one in both:
        one.close()


def alive(rank: int, world_size: int) -> Liveness:
    return Liveness(rank, world_size, connect(timedelta(seconds=20), "0-0"), timedelta(minutes=10))


def test_all_processes_name_the_lost_ones_and_one_prints(pair: list[Liveness]) -> None:
    assert pair[0].why_it_failed("a test") is None
    pair[1].close()
    first, second = pair[0].why_it_failed("closed"), pair[1].why_it_failed("another")
    assert isinstance(first, ProcessLostError) and isinstance(second, ProcessLostError)
    text = "rank 1 stopped responding, so the run ends (closed)"
    assert str(first) == str(second) == text
    assert (first.prints, second.prints) == (True, False)


@pytest.fixture
def four(group: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Liveness], list[int]]]:
    """The liveness of four processes, and which of them have read the heartbeats of all."""
    found: list[int] = []
    whole = Liveness._stopped

    def stopped(self: Liveness, ended: bool) -> list[int]:
        found.append(self._rank)
        return whole(self, ended)

    monkeypatch.setattr(Liveness, "_stopped", stopped)
    everyone = [alive(rank, 4) for rank in range(4)]
    time.sleep(0.3)  # each has sent a heartbeat
    yield everyone, found
    for one in everyone:
        one.close()


def ask(asked: Sequence[Liveness]) -> list[ProcessLostError | None]:
    """Ask processes at once who is lost, after a collective has failed; return what each found."""
    found: dict[int, ProcessLostError | None] = {}

    def one(place: int) -> None:
        found[place] = asked[place].why_it_failed(f"test {place}")

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(asked))]


def test_one_process_reads_all_heartbeats_for_all(four: tuple[list[Liveness], list[int]]) -> None:
    everyone, read = four
    everyone[2].close(in_order=False)
    errors = ask([everyone[rank] for rank in (0, 1, 3)])
    assert len(read) == 1
    assert {str(error).partition(" (")[0] for error in errors} == {
        "rank 2 stopped responding, so the run ends"
    }
    assert [error.prints for error in errors if error].count(True) == 1


def test_nobody_is_lost_by_an_inquiry_that_began_after_the_failure(
    four: tuple[list[Liveness], list[int]],
) -> None:
    everyone, read = four
    assert ask(everyone) == [None] * 4
    # The first inquiry may have begun before the failure of those who wait for it.
    assert len(read) == 2


def test_another_process_inquires_where_the_first_has_died(
    four: tuple[list[Liveness], list[int]], store: Any
) -> None:
    everyone, read = four
    everyone[1].close(in_order=False)
    store.set("alive-0-0/inquiry-True", "1")  # it had begun, and announces nothing
    errors = ask([everyone[rank] for rank in (0, 2, 3)])
    assert len(read) == 1 and read != [1]
    assert all("rank 1 stopped" in str(error) for error in errors)


def test_who_ended_in_order_is_lost_only_if_nobody_else_is(
    four: tuple[list[Liveness], list[int]],
) -> None:
    everyone, _ = four
    everyone[1].close()
    assert everyone[0]._verdict("a test", ended=False) is None
    everyone[2].close(in_order=False)
    assert all("rank 2 stopped" in str(error) for error in ask([everyone[0], everyone[3]]))


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
    alone = alive(0, 2)  # rank 1 never appears
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
    alone = alive(1, 2)
    with alone.watching(None):
        threading.Event().wait(3)
    alone.close()
    assert bool(exits) == (looks == 3)


def test_each_process_watches_the_next_one_and_the_last_one_rank_0(
    exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone = [alive(rank, 4) for rank in range(4)]
    found: list[int] = []
    monkeypatch.setattr(Liveness, "_end", lambda self: found.append(self._rank))
    everyone[0].close(in_order=False)
    everyone[2].close(in_order=False)
    with everyone[1].watching(None), everyone[3].watching(None):
        threading.Event().wait(2)
    for one in (everyone[1], everyone[3]):
        one.close()
    assert set(found) == {1, 3}


@pytest.mark.parametrize("slow", [0, 2])
def test_a_slow_process_is_named_by_one_that_waits(
    group: Any, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(liveness, "_say", said.append)
    monkeypatch.setattr(liveness, "_place", lambda main: main or "away")
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    everyone = [alive(rank, 4) for rank in range(4)]
    for rank, one in enumerate(everyone):
        one._main = "works" if rank == slow else "waits"  # type: ignore[assignment]
        one.collectives = 7 - (rank == slow)
    time.sleep(3)
    for one in everyone:
        one.close()
    assert said == [
        f"waiting for rank {slow} (host here) for 1 seconds: alive but behind; "
        "--timeout ends the run after 10 minutes"
    ]
