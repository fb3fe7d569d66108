"""The page shows what it should, and is self-contained."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from dml_accel import cli
from dml_accel.analysis import page
from dml_accel.analysis.runs import find_runs


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    assert cli.main(["report", str(runs), "--analyse", "50"]) == 0
    return runs / "report.html"


def test_the_page_has_the_numbers_of_the_table(report: Path, runs: Path) -> None:
    text = report.read_text()
    assert "5 finished runs" in text and "resnet8 + resnet8 on digits" in text
    record = json.loads((runs / "pair/results.json").read_text())
    for summary in record["cohorts"][0]["summaries"]:
        assert f"{100 * summary['top1']['mean']:.2f}" in text
    for title in ("Training loss under weight noise", "Calibration", "Agreement of the peers"):
        assert title in text
    assert "exactly the gradient of Deep Mutual Learning" in text
    assert "accuracy against the size of the cohort" in text  # K = 1 and 2


def test_the_page_loads_nothing_and_runs_nothing(report: Path) -> None:
    text = report.read_text()
    links = re.findall(r"(?:src|href|srcset)=\"([^\"]{0,5})", text)
    assert links and all(link.startswith(("data:", "#s")) for link in links)
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_what_a_run_says_is_text(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run")
    path = tmp_path / "run/config.json"
    description = json.loads(path.read_text()) | {"command": "<script>alert(1)</script>"}
    description["peers"][0]["name"] = "<b>net</b>-0"
    path.write_text(json.dumps(description))
    results = json.loads((tmp_path / "run/results.json").read_text())
    results["peers"][0]["name"] = "<b>net</b>-0"
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    page.write_page(find_runs([tmp_path]), tmp_path / "x.html", 0)
    text = (tmp_path / "x.html").read_text()
    assert "<script" not in text and "<b>" not in text and "&lt;script&gt;" in text


def test_without_weights_there_is_a_page_all_the_same(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run", ignore=shutil.ignore_patterns("peers"))
    page.write_page(find_runs([tmp_path]), tmp_path / "x.html", 100)
    assert "weight noise" not in (tmp_path / "x.html").read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(
    report: Path, tmp_path: Path, theme: str, width: int
) -> None:
    picture = tmp_path / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --hide-scrollbars"
    flags += f" --enable-logging=stderr --window-size={width},1600"
    flags += f" --blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    flags += f" --user-data-dir={tmp_path}/profile --screenshot={picture}"
    done = subprocess.run(
        ["chromium", *flags.split(), report.as_uri()], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    with Image.open(picture) as image:
        assert image.size == (width, 1600)
        brightness = ImageStat.Stat(image.convert("L")).mean[0]
    assert brightness < 70 if theme == "dark" else brightness > 200


def test_macro_f1_has_a_table_where_classes_are_unbalanced(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "alone", tmp_path / "run", ignore=shutil.ignore_patterns("peers"))
    path = tmp_path / "run/results.json"
    results = json.loads(path.read_text())
    shown = f"{100 * results['peers'][0]['test']['macro_f1']:.2f}"
    older = json.loads(path.read_text())
    for metrics in (older["peers"][0]["test"], older["ensemble"]):
        del metrics["macro_f1"]
    del older["imbalance"], older["splits"]
    for content, has in ((results | {"imbalance": 2.0}, True), (results, False), (older, False)):
        path.write_text(json.dumps(content))
        page.write_page(find_runs([tmp_path]), tmp_path / "x.html", 0)
        text = (tmp_path / "x.html").read_text()
        assert ("Macro-F1" in text) == has
        assert (shown in text.partition("Macro-F1")[2].partition("Cost")[0]) == has
