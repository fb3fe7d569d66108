"""What processes of different peers exchange; 16 processes take the step of one."""

import json
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import slices
from dml_accel.distributed.exchange import Overlap, Team, blocks_of, overlaps_of, teams_of
from dml_accel.distributed.processes import Processes
from tests import worker
from tests.distributed.test_processes import worst
from tests.helpers import forked, load, run_program

PROCESSES = 16
# Of each peer. Costs are 1 for resnet8, 2 for wrn_16_2 and 3 for resnet20.
WIDTHS = {
    "equal": [4, 4, 4, 4],
    "equal, sums": [4, 4, 4, 4],
    "three and one": [12, 4],
    "of no common divisor, sums": [8, 3, 5],
    "five peers": [4, 3, 3, 3, 3],
}


def cases() -> dict[str, dict[str, Any]]:
    """What 16 processes run; 50 rows are shared unevenly, and in two parts."""
    shared = {
        "dataset": "digits",
        "image_size": 8,
        "batch_size": 50,
        "grad_accum": 2,
        "lr": 0.001,
        "max_steps": 1,
        "eval_every": "100ep",
        "placement": "split",
        "cpu": True,
        "float64": True,
    }
    cohorts = {
        "equal": ["resnet8*4"],
        "three and one": ["resnet20", "resnet8"],
        "of no common divisor": ["resnet20", "resnet8", "wrn_16_2"],
        "five peers": ["resnet8*5"],
    }
    found = {}
    for name in WIDTHS:
        cohort, _, sums = name.partition(", ")
        exchange = {"exchange": "sum"} if sums else {}
        found[name] = {"config": {**shared, "cohort": cohorts[cohort], **exchange}, "break": None}
    found["three and one"]["own group"] = True
    return found


def test_peers_of_the_same_processes_are_a_team() -> None:
    held = {"b": [0, 1], "a": [2], "c": [2]}
    assert teams_of(held) == [Team((0, 1), ("b",)), Team((2,), ("a", "c"))]


@pytest.mark.parametrize(
    ("widths", "blocks"),
    [
        ([2, 2], [(0, 2), (1, 3)]),
        ([4, 2], [(0, 1, 4), (2, 3, 5)]),
        ([3, 2], [(0, 1, 2, 3, 4)]),
        ([1, 1, 1], [(0, 1, 2)]),
        ([2, 4, 2], [(0, 2, 3, 6), (1, 4, 5, 7)]),
    ],
)
def test_a_block_is_what_has_the_same_rows(
    widths: list[int], blocks: list[tuple[int, ...]]
) -> None:
    assert blocks_of(of_widths(widths)) == blocks


def of_widths(widths: list[int]) -> list[Team]:
    firsts = [sum(widths[:place]) for place in range(len(widths))]
    return [
        Team(tuple(range(first, first + width)), (f"peer-{place}",))
        for place, (first, width) in enumerate(zip(firsts, widths, strict=True))
    ]


def test_a_process_receives_its_rows_from_every_other_team() -> None:
    # 7 rows: 0 to 2, 2 to 4, 4 to 7 of three processes; 0 to 3, 3 to 7 of the other two.
    teams = of_widths([3, 2])
    assert overlaps_of(teams, 1, 7) == [Overlap(3, 1, 0, 1), Overlap(4, 1, 1, 2)]
    assert overlaps_of(teams, 4, 7) == [Overlap(1, 0, 0, 1), Overlap(2, 0, 1, 4)]


@pytest.mark.parametrize("count", [1, 5, 16, 47, 101])
@pytest.mark.parametrize("widths", [[1, 1], [4, 4], [6, 3], [5, 3, 2], [12, 4], [3, 3, 4, 3, 3]])
def test_every_row_comes_once_from_every_other_team_and_from_the_own_block(
    widths: list[int], count: int
) -> None:
    teams = of_widths(widths)
    blocks = {rank: block for block in blocks_of(teams) for rank in block}
    assert sorted(blocks) == list(range(sum(widths)))
    assert {len(block) for block in blocks.values()} == {sum(widths) // gcd(*widths)}
    for place, team in enumerate(teams):
        for rank, (lo, hi) in zip(team.ranks, slices(count, len(team.ranks)), strict=True):
            found = overlaps_of(teams, rank, count)
            assert {one.rank for one in found} <= set(blocks[rank])
            for other in set(range(len(teams))) - {place}:
                rows = [row for o in found if o.team == other for row in range(o.first, o.end)]
                assert rows == list(range(hi - lo))
            for one in found:  # and the other process sends what we receive
                back = next(o for o in overlaps_of(teams, one.rank, count) if o.rank == rank)
                assert back.end - back.first == one.end - one.first


def test_groups_that_torch_cannot_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = object.__new__(Processes)
    processes.rank, processes.world_size, processes._groups = 0, 4, {}
    monkeypatch.setattr(processes, "all_reduce_max", lambda one: one + 1)  # others have made more
    with pytest.raises(UsageError, match="made different numbers of process groups before"):
        processes.group_in([[0, 1], [2, 3]])


def test_sixteen_processes_take_the_step_of_one(tmp_path: Path) -> None:
    work = tmp_path / "cases.json"
    work.write_text(json.dumps(cases()))
    ended = run_program(*forked(PROCESSES, "tests/worker.py", work, tmp_path / "many"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    threads = torch.get_num_threads()
    worker.main(str(work), str(tmp_path / "one"))
    torch.set_num_threads(threads)
    for name, widths in WIDTHS.items():
        one = load_file(tmp_path / "one" / name / "0.tensors")
        reports = [load(tmp_path / "many" / name / f"{rank}.json") for rank in range(PROCESSES)]
        assert [len(held) for held in reports[0]["ranks"].values()] == widths, name
        seen = set()
        for rank, report in enumerate(reports):
            assert (report["rank"], report["world_size"]) == (rank, PROCESSES)
            many = load_file(tmp_path / "many" / name / f"{rank}.tensors")
            mine = {key: value for key, value in one.items() if key in many}
            seen |= mine.keys()
            assert worst(many, mine, "gradient/") < 1e-10, (name, rank)
            assert worst(many, mine, "losses") < 1e-10, (name, rank)
            for key, value in mine.items():
                if key.startswith("state/") and "/momentum." not in key:
                    assert (many[key] - value).abs().max() < 1e-9, (name, rank, key)
        assert seen == one.keys(), name
        first, other = (
            load(tmp_path / where / name / "0.json")["metrics"] for where in ("one", "many")
        )
        assert first["ensemble"]["n"] == other["ensemble"]["n"] == 101
        assert other["ensemble"]["nll"] == pytest.approx(first["ensemble"]["nll"], rel=1e-9)
