"""The speed benchmark's tables are what its readings give, by numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speed_report, speed_tables
from benchmarks.competitors import PARTS
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


def test_the_readmes_section_is_replaced_and_nothing_else() -> None:
    section = speed_report.section(made_up())
    assert row(section, "ours") == ["ours", "64", "4.00 (0.71 to 22.38)", "2.00 (2.00 to 2.00)"]
    assert "| slow" not in section
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
        names = [one.name for one in competitors()]
        assert len(names) == len(set(names))


def test_what_the_tree_says_is_what_its_readings_give() -> None:
    path = HERE / "speed.json"
    if not path.exists():
        pytest.skip("benchmarks/speed.json was not measured")
    found = json.loads(path.read_text())
    assert (HERE / "speed.md").read_text() == speed_tables.markdown(found)
    text = speed_report.PAGE.read_text()
    assert text == speed_report.with_section(text, speed_report.section(found))
