"""Figures say what the numbers say, and look alike where they are compared."""

import base64
import json
from pathlib import Path

import pytest

from dml_accel.analysis import figures, page, plots
from dml_accel.analysis.runs import Run
from dml_accel.analysis.statistics import curve
from dml_accel.core.config import Config


def run(folder: Path, method: str, nets: str, evaluations: list[dict]) -> Run:
    names = [f"{net}-0" for net in nets.split()]
    events = [
        {"event": "eval", "step": 5 * (place + 1)} | scores
        for place, scores in enumerate(evaluations)
    ]
    description = {"images": {"train": 80}, "peers": [{"name": name} for name in names]}
    return Run(folder, str(folder), method, Config(batch_size=16), description, {}, events)


def scores(*top1: float) -> dict:
    """Return metrics of the peers a-0, b-0 and so on."""
    peers = {f"{net}-0": {"top1": one} for net, one in zip("ab", top1, strict=False)}
    matrix = {one: dict.fromkeys(peers, top1[0]) for one in peers}
    entropy = dict.fromkeys(peers, 1.0)
    found = {"peers": peers, "kl": matrix, "entropy": entropy, "agreement": 0.5}
    return found | {"ensemble": {"top1": max(top1)}}


def test_many_methods_are_told_apart() -> None:
    styles = plots.styles([str(place) for place in range(35)])
    assert len({(style.colour, style.dash) for style in styles.values()}) == 35


@pytest.mark.parametrize(("seeds", "lines", "bands"), [(1, 1, 0), (2, 3, 0), (3, 1, 1)])
def test_few_seeds_are_lines_and_more_are_a_band(seeds: int, lines: int, bands: int) -> None:
    line = curve([{1.0: 0.1 * seed, 2.0: 0.2, 5.0: 0.3} for seed in range(seeds)])
    (axes,) = plots.curves({"x": line}, plots.styles(["x"]), "epoch", "top-1, %", 100).axes
    assert (len(axes.lines), len(axes.collections)) == (lines, bands)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert list(axes.lines[0].get_ydata()) == pytest.approx([5.0 * (seeds - 1), 20, 30])


def test_both_themes_differ_in_the_ink_only() -> None:
    line = curve([{1.0: 0.1, 2.0: 0.2}])
    uris = plots.as_uris(lambda: plots.curves({"x": line}, plots.styles(["x"]), "epoch", "nats"))
    light, dark = (base64.b64decode(uris[one].partition(",")[2]) for one in ("light", "dark"))
    assert b"#e6e6e6" in dark and b"#222222" not in dark
    assert light == dark.replace(b"#e6e6e6", b"#222222")


def test_networks_that_differ_have_lines_of_their_own(tmp_path: Path) -> None:
    by_method = {
        method: [
            run(
                tmp_path, method, "a b", [{"test": scores(0.1, place), "val": scores(0.2, 0.5)}] * 2
            )
        ]
        for method, place in (("independent", 0.3), ("mutual", 0.4))
    }
    drawn = {
        one.title: one.draw() for one in figures._curves(by_method, plots.styles([*by_method]))
    }
    names = ["independent, a", "independent, b", "mutual, a", "mutual, b"]
    for title, ends in (("Test accuracy", [10, 30, 10, 40]), ("Validation accuracy", [20, 50] * 2)):
        (axes,) = drawn[title].axes
        lines = axes.lines
        assert [line.get_label() for line in lines] == names
        assert [line.get_ydata()[-1] for line in lines] == pytest.approx(ends)
        # The colour is the method's, the dashes are the network's.
        assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
        assert lines[0].get_linestyle() == lines[2].get_linestyle() != lines[1].get_linestyle()


def test_matrices_of_all_methods_share_a_scale(tmp_path: Path) -> None:
    by_method = {
        method: [run(tmp_path, method, "a b", [{"test": scores(value, value)}])]
        for method, value in (("independent", 0.1), ("mutual", 0.02))
    }
    found = [one.draw() for one in figures._divergences(by_method)]
    limits = [figure.axes[0].images[0].get_clim() for figure in found]
    assert limits == [(0.02, 0.1)] * 2


def test_methods_stand_as_they_were_asked_for(tmp_path: Path) -> None:
    alone = run(tmp_path / "other", "distill", "a", [])
    runs = [run(tmp_path / f"{m}/seed-0", m, "a", []) for m in ("dkd", "independent", "mutual")]
    assert page._as_asked([alone, *runs], page._comparisons_of([alone, *runs])) == [
        "independent",
        "distill",
        "dkd",
        "mutual",
    ]
    asked = [{"folder": f"{method}/seed-0"} for method in ("mutual", "independent", "dkd")]
    (tmp_path / "results.json").write_text(json.dumps({"runs": asked}))
    assert page._as_asked([alone, *runs], page._comparisons_of([alone, *runs])) == [
        "mutual",
        "independent",
        "dkd",
        "distill",
    ]


def test_differences_are_sorted_by_effect() -> None:
    def summary(method: str, of: str, mean: float) -> dict:
        numbers = {"n": 3, "mean": mean, "low": mean - 0.01, "high": mean + 0.01}
        return {"method": method, "of": of, "difference": {"top1": numbers}}

    effects = {"dkd": 0.01, "mutual": 0.03, "jeffreys": -0.02}
    summaries = [summary(m, of, e) for of in ("cohort", "ensemble") for m, e in effects.items()]
    summaries.append({"method": "independent", "of": "cohort", "difference": None})
    cohort = {"cohort": "ax2", "peers": [{}, {}], "summaries": summaries}
    (axes,) = plots.differences({"cohorts": [cohort]}, "").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["mutual", "dkd", "jeffreys"] and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert len(axes.containers) == 6  # the mean and the ensemble of each
