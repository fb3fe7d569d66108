"""The speed benchmark's tables are what its readings give, by numbers worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    chosen,
    eager,
    first_step,
    rivals,
    speed_report,
    speed_tables,
    worker,
    workloads,
)
from benchmarks.children import _launcher, measure
from benchmarks.competitors import BF16, EAGER, PARTS, Asked, Competitor, Mode, others
from benchmarks.measuring import HERE, ratio


def reading(name: str, seconds: list[float], steps: int = 2, **about: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "training",
        "options": {},
        "about": {"whose": "ours", "bf16": False} | about,
        "processes": 1,
        "threads": 2,
        "environment": {},
        "steps": steps,
        "seconds": seconds,
        "prepared_s": 1.0,
        "warm_up_s": 2.0,
        "memory_bytes": 500_000_000,
    }


def part(*readings: dict[str, Any]) -> dict[str, Any]:
    return {
        "processor": "P",
        "cores": 2,
        "system": "S",
        "versions": {"torch": "2"},
        "commit": "c",
        "date": "2000-01-01",
        "command": "python -m benchmarks.speed",
        "images": "noise",
        "blocks": 3,
        "macs_per_image": 10**9,
        "macs_per_product": 10**9,
        "before": "0123456789",
        "steps_of_the_command": 1000,
        "readings": list(readings),
    }


def made_up() -> dict[str, Any]:
    """Ours takes 1 s a step; the README's pytorch-dml 2, 4 and 8 times that, block by block."""
    ours = reading("ours", [2.0, 2.0, 2.0])
    failed = reading("other", [], whose="plain") | {"failed": "no compiler"}
    return {
        "others": part(
            reading("readme", [4.0, 8.0, 16.0], whose="pytorch-dml"),
            reading("slow", [8.0, 8.0, 8.0], whose="pytorch-dml", tuned=True),
            reading("fast", [4.0, 4.0, 4.0], whose="pytorch-dml", tuned=True),
            failed,
            ours,
        ),
        "limits": part(
            ours | {"about": ours["about"] | {"limit": "alone"}},
            reading("alone", [1.6, 1.6, 1.6], whose="limit"),
            reading("mm", [0.004, 0.004, 0.004], whose="products") | {"kind": "products"},
        ),
        "growth": part(
            reading("1", [1.0, 1.0, 1.0], steps=10, series="peers", x=1),
            reading("8", [1.0, 1.0, 1.0], steps=1, series="peers", x=8),
            reading("losses", [1.0, 1.0, 1.0], steps=100, whose="losses", of="8"),
        ),
    }


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def two_ways() -> list[dict[str, Any]]:
    """A step of ours takes 4 s by the plain command in 2 processes, 5 s in one; tuned ones less."""
    single: dict[str, Any] = {"options": EAGER.flags}
    half: dict[str, Any] = {"options": BF16.flags}
    two = {"processes": 2}
    plain = {"command": "plain command"}
    asked_half = {"bf16": True, "command": "--mixed-precision bf16"}
    return [
        reading("readme", [16.0], whose="pytorch-dml"),
        reading("tuned", [8.0], whose="pytorch-dml", tuned=True, bf16=True),
        reading("loop", [18.0], whose="plain"),
        reading("launched", [12.0], whose="plain") | two,
        reading("loop, tuned", [10.0], whose="plain", tuned=True) | two,
        reading("before, plain", [14.0], whose="before", **plain),
        reading("ours, plain", [8.0], **plain) | single | two,
        reading("ours, alone", [10.0]) | single,
        reading("ours, compiled", [5.0]) | {"options": Mode(compiled=True).flags},
        reading("ours, half", [4.0], **asked_half) | half | two,
    ]


def test_like_is_set_beside_like() -> None:
    lines = speed_tables.alike(two_ways()).splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert found == [
        ["plain", "1", "readme: 8", "alone: 13", "1.60"],
        ["plain", "2", "launched: 11", "plain: 16", "1.50"],
        ["tuned, single precision", "1", "readme: 8", "compiled: 26", "3.20"],
        ["tuned, single precision", "2", "loop, tuned: 13", "plain: 16", "1.25"],
        ["tuned, any precision", "1", "tuned: 16", "compiled: 26", "1.60"],
        ["tuned, any precision", "2", "loop, tuned: 13", "half: 32", "2.50"],
    ]


def test_what_the_commands_do_by_themselves_is_set_beside_before_and_our_best() -> None:
    lines = speed_tables.commands(two_ways()).splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert found == [
        ["plain", "before", "1.75"],
        ["plain", "pytorch-dml, as its README", "2.00"],
        ["plain", "our fastest in single precision", "0.62"],  # compiled takes 5 of its 8
        ["half", "pytorch-dml, as its README", "4.00"],
        ["half", "our fastest in bf16", "1"],
        ["half", "pytorch-dml, as its README", "4.00"],
        ["half", "the fastest pytorch-dml", "2.00"],
    ]


def test_one_network_is_set_beside_timms_step_and_first_steps_have_their_range() -> None:
    ours = reading("ours, ready", [2.06] * 3, way="ready", beside="timm, ready")
    text = speed_tables.markdown(
        {
            "single": part(ours, reading("timm, ready", [2.0] * 3, whose="timm")),
            "first-step": part({"name": "now", "flags": ["--cohort"], "seconds": [6.0, 4.0, 5.0]}),
        }
    )
    assert row(text, "ready")[1:] == ["1030.0 ms", "1000.0 ms", "+3.0% (+3.0% to +3.0%)"]
    assert row(text, "now")[1:] == ["5.0 s", "4.0 to 6.0", "3"]


def test_a_ratio_is_a_geometric_mean_with_students_interval_of_logs() -> None:
    # Logs ln 2, 2 ln 2, 3 ln 2: mean 2 ln 2, so 4; half width 4.302653 ln 2 / sqrt 3 = 1.721880.
    found = ratio([2, 4, 8], [1, 1, 1])
    assert found.mean == pytest.approx(4)
    assert found.low == pytest.approx(0.714918, rel=1e-5)  # 4 exp(-1.721880)
    assert found.high == pytest.approx(22.38014, rel=1e-5)
    assert str(ratio([3], [2])) == "1.50"  # one block has no interval
    assert ratio([2, 4, 8], [2, 4, 8]).as_change() == "+0.0% (+0.0% to +0.0%)"


def test_the_table_is_what_the_readings_give() -> None:
    text = speed_tables.markdown(made_up())
    others, limits, growth = text.split("\n## ")[1:]
    # 64 images in 1 s; the fastest of the tuned ones takes 2 s; the plain loop was not measured.
    assert row(others, "ours")[2:] == [
        *("64", "4.00 (0.71 to 22.38)", "2.00 (2.00 to 2.00)", "", "0.50", "3")
    ]
    assert row(others, "fast")[4] == "1"
    assert row(others, "other")[2] == "failed: no compiler"
    # 6 x 1e9 x 64 in 1 s is 384 GFLOP/s, of 2e9 in 0.002 s, 1000 GFLOP/s.
    assert row(limits, "ours")[1:] == [
        *("1000 ms", "+25.0% (+25.0% to +25.0%)", "384", "38.4% (38.4 to 38.4)")
    ]
    # 1 peer takes 0.1 s, 8 take 1 s: 1.25 times 8 times that.
    assert row(growth, "8")[1:4] == ["1000.0 ms", "125.00 ms", "+25.0% (+25.0% to +25.0%)"]
    assert "losses, forward and backward: 10.00 ms, 1.0% (1.0 to 1.0) of their step" in growth


def test_a_profile_is_sorted_into_kinds_of_work() -> None:
    operations = {
        "aten::convolution_backward": 0.3,
        "aten::mkldnn_convolution": 0.1,
        "graph_0_cpp_fused__native_batch_norm_legit_functional_add_3": 0.2,
        "aten::native_batch_norm_backward": 0.15,
        "Optimizer.step#SGD.step": 0.05,
        "aten::copy_": 0.2,
    }
    ours = reading("ours", [2.0], steps=2) | {"operations": operations}
    text = speed_tables.markdown({"profile": part(ours)})
    assert row(text, "convolutions, backward")[1] == "150.0 (30%)"
    assert row(text, "compiled kernels (batch norm, ReLU, sums, casts)")[1] == "100.0 (20%)"
    assert row(text, "batch norm")[1] == "75.0 (15%)"
    assert row(text, "everything else in torch, loss and input among it")[1] == "100.0 (20%)"
    assert row(text, "in all")[1] == "500"


def test_the_docs_section_is_replaced_and_nothing_else() -> None:
    section = speed_report.section(made_up() | {"others": part(*two_ways())})
    assert "| readme: 8" in section and "| before" in section
    assert (
        "A step of 8 ResNet-8 takes 1.25 (1.25 to 1.25) times as long as 8 steps of 1." in section
    )
    begin, end = speed_report.BEGIN, speed_report.END
    once = speed_report.with_section(f"a\n{begin}\nold\n{end}\nb\n", section)
    assert once == f"a\n{begin}\n{section}{end}\nb\n"
    assert speed_report.with_section(once, section) == once
    with pytest.raises(ValueError, match="speed: begin"):
        speed_report.with_section(f"{end} {begin}", section)


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    for found in (made_up(), {}):
        speed_report.write(found, tmp_path)
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_every_competitor_has_a_name_of_its_own() -> None:
    for competitors in PARTS.values():
        names = [one.name for one in competitors(Asked(before=Path("older")))]
        assert len(names) == len(set(names))


def test_what_a_command_chooses_is_measured_once_and_named() -> None:
    plain, half = Mode(compiled=True, processes=2), Mode(bf16=True)  # the second one in no table
    found = [one for one in others(Asked(plain, half)) if one.about["whose"] == "ours"]
    assert [one.about["command"] for one in found[:2]] == [
        "plain command",
        "--mixed-precision bf16",
    ]
    assert len(found) == 8 + 4 + 1
    ways = [(tuple(one.options.items()), one.processes) for one in found]
    assert len(set(ways)) == len(ways)
    assert found[0].options == {
        "mixed_precision": "no",
        "compile": "on",
        "memory_format": "contiguous",
    }


def test_the_plain_command_is_asked_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for saved, processes, bf16 in ((1.0, 2, False), (-1.0, 1, False), (1.0, 1, True)):
        monkeypatch.setattr(chosen, "seconds_saved", lambda *_, saved=saved: saved)
        monkeypatch.setattr(chosen, "processes_to_start", lambda *_, count=processes: count)
        found = chosen.chosen(100, bf16=bf16)
        assert found.compiled == (saved > 0 and not bf16)
        assert (found.processes, found.bf16) == (processes, bf16)


def test_several_processes_are_started_by_whom_they_are_to_be() -> None:
    one = Competitor("", "plain")
    assert _launcher(one) == []
    assert "torch.distributed.run" in _launcher(replace(one, processes=2))
    launched = _launcher(replace(one, processes=2, by_accelerate=True))
    assert "accelerate.commands.launch" in launched
    assert launched[launched.index("--num_processes") + 1] == "2"


def test_a_dry_run_of_an_older_checkout(tmp_path: Path) -> None:
    """A checkout is run from its own folder: here one whose worker answers by itself."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "worker.py").write_text(
        "import json, os, sys\n"
        "print(json.dumps({'warm_up_s': 0.0, 'where': os.getcwd()}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'seconds': 2.0, 'memory_bytes': 1}), flush=True)\n"
    )
    older = Competitor("older", "training", checkout=tmp_path)
    *_, (found,) = measure([older], None, 2, 1, tmp_path)
    assert (found["where"], found["seconds"]) == (str(tmp_path), [2.0, 2.0])


def test_the_first_step_is_timed_from_the_command_on(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import json, pathlib, sys, time\n"
        "run = pathlib.Path(sys.argv[-1])\n"
        "run.mkdir(parents=True)\n"
        "start = {'event': 'start', 'time': time.time()}\n"
        "step = {'event': 'step', 'time': time.time() + 100}\n"
        "(run / 'metrics.jsonl').write_text(json.dumps(start) + '\\n' + json.dumps(step) + '\\n')\n"
    )
    *_, readings = first_step.measure({"here": tmp_path, "there": tmp_path}, 2, [])
    assert [one["name"] for one in readings] == ["here", "there"]
    assert all(100 < took < 110 for one in readings for took in one["seconds"])
    assert [len(one["seconds"]) for one in readings] == [2, 2]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("training", {"cohort": ["resnet32"], "ready": True, **EAGER.flags}),
        ("changed", {"change": "optimizer: foreach instead of fused"}),
        ("plain", {}),
        ("plain", {"tuned": True, "channels_last": True, "bf16": True}),
        ("accelerate", {}),
        ("timm", {"ready": True, "channels_last": True, "bf16": True}),
        ("timm", {}),
    ],
)
def test_every_kind_takes_steps(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "BATCH", 4)
    monkeypatch.setattr(workloads, "_MADE_IMAGES", 8)
    monkeypatch.setattr(rivals, "BATCH", 4)
    monkeypatch.setattr(rivals, "_WORKERS", 0)
    steps = worker.KINDS[kind](None, **options)
    steps(1)
    steps(2)  # beyond an epoch of two batches


def test_a_change_of_eager_mode_is_undone_after_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def training(images: str | None, **flags: Any) -> Any:
        seen.append(eager.optim.has_fused("sgd"))
        return lambda count: seen.append(eager.networks.F.relu)

    monkeypatch.setattr(eager, "training", training)
    relu = eager.networks.F.relu
    eager.changed(None, change="ReLU: clamp_min")(1)
    assert seen[0] is True and seen[1] is not relu and eager.networks.F.relu is relu
    eager.changed(None, change="optimizer: foreach instead of fused")(1)
    assert seen[2] is False and seen[3] is relu and eager.optim.has_fused("sgd")


def test_what_the_tree_says_is_what_its_readings_give() -> None:
    path = HERE / "speed.json"
    if not path.exists():
        pytest.skip("benchmarks/speed.json was not measured")
    found = json.loads(path.read_text())
    assert (HERE / "speed.md").read_text() == speed_tables.markdown(found)
    text = speed_report.PAGE.read_text()
    assert text == speed_report.with_section(text, speed_report.section(found))
