"""Comparisons: which runs are made, what is counted, what is written, what is refused."""

import csv
import dataclasses
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from dml_accel import cli
from dml_accel.analysis import compare, comparison, plots
from dml_accel.analysis.methods import PRESETS, Preset
from dml_accel.analysis.tables import comparison_title
from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.data import sources
from tests.helpers import (
    BIN,
    DIGITS,
    assert_same_state,
    events,
    launched,
    load,
    run_program,
    status_of,
    train,
    wait_until,
)

TINY = [*DIGITS, "--max-steps", "6"]
COHORT = ("--cohort", "resnet8*2", "timm:test_efficientnet")
SEEDS = (3, 4, 5)
PLANNED = ([("resnet8*2", "timm:test_efficientnet")], ["independent", "mutual"], 3)


def compared(folder: Path, *words: str) -> int:
    return cli.main(["compare", *TINY, "--output-dir", str(folder), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three seeds, two of the three networks equal."""
    folder = tmp_path_factory.mktemp("compared") / "first"
    assert compared(folder, *COHORT, "--seeds", "3", "--seed", "3") == 0
    return folder


def record(folder: Path) -> dict:
    return load(folder / "results.json")


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as lines:
        return list(csv.DictReader(lines))


def summary(found: dict, method: str, name: str) -> dict:
    (one,) = (
        s for s in found["cohorts"][0]["summaries"] if (s["method"], s["name"]) == (method, name)
    )
    return one


def per_seed(folder: Path, method: str, peers: set[str], metric: str) -> list[float]:
    """Means over ``peers`` within each seed, from the table of raw numbers."""
    found = []
    for seed in SEEDS:
        values = [
            float(row[metric])
            for row in rows(folder)
            if (row["method"], row["seed"]) == (method, str(seed)) and row["peer"] in peers
        ]
        assert len(values) == len(peers)
        found.append(sum(values) / len(values))
    return found


# ---------------------------------------------------------------- the runs


def test_every_sub_run_is_an_ordinary_run(finished: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    words = [*TINY, *COHORT, "--seed", "4", "--kl-weight", "0"]
    assert train(alone, *words) == 0
    inside = finished / "independent" / "seed-4"
    assert {p.name for p in inside.iterdir()} == {p.name for p in alone.iterdir()}
    for peer in ("resnet8-0", "resnet8-1", "test_efficientnet-0"):
        states = [
            load_file(path / "peers" / peer / "model.safetensors") for path in (inside, alone)
        ]
        assert_same_state(*states)
    saved = load(inside / "config.json")
    assert Config(**saved["config"]).method.kl_weight == 0
    assert saved["command"].startswith("python ")


def test_methods_start_from_the_same_weights_and_images(finished: Path) -> None:
    def first_step(method: str, seed: int) -> dict:
        return events(finished / method / f"seed-{seed}")[1]["peers"]

    for seed in SEEDS:
        independent, mutual = first_step("independent", seed), first_step("mutual", seed)
        for peer, parts in independent.items():
            assert parts["cross_entropy"] == mutual[peer]["cross_entropy"]
            assert parts["kl"] == 0 < mutual[peer]["kl"]
    assert first_step("mutual", 3) != first_step("mutual", 4)


def test_a_second_time_nothing_is_trained(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(compare, "run_one", lambda *_, **__: pytest.fail("trained again"))
    assert compared(folder, *COHORT, "--seeds", "3", "--seed", "3") == 0
    assert (folder / "results.csv").read_text() == (finished / "results.csv").read_text()


def test_more_seeds_are_added_to_what_is_there(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(finished, folder)
    before = (folder / "mutual" / "seed-3" / "metrics.jsonl").read_text()
    assert compared(folder, *COHORT, "--seeds", "4", "--seed", "3") == 0
    assert record(folder)["seeds"] == [3, 4, 5, 6]
    assert summary(record(folder), "mutual", "ensemble")["top1"]["n"] == 4
    assert (folder / "mutual" / "seed-3" / "metrics.jsonl").read_text() == before


def test_killed_twice_at_random_it_ends_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    folder, chance = tmp_path / "killed", random.Random(0)
    words = [sys.executable, "-m", "dml_accel", "compare", *TINY, *COHORT]
    words += ["--seeds", "3", "--seed", "3", "--output-dir", str(folder)]
    same_threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for runs_begun in (1, 4):
        with launched(*words, **same_threads) as process:
            # Bound to this round's number, whatever ``runs_begun`` is later.
            wait_until(
                lambda begun=runs_begun: len(list(folder.glob("*/seed-*/metrics.jsonl"))) >= begun,
                process,
            )
            time.sleep(chance.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
    done = run_program(*words, **same_threads)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "results.csv").read_text() == (finished / "results.csv").read_text()
    ours, theirs = record(folder), record(finished)
    for cohort, other in zip(ours["cohorts"], theirs["cohorts"], strict=True):
        assert cohort["summaries"] == other["summaries"]
    assert ours["missing"] == []


def test_two_processes_share_every_run(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    words = [*TINY, *COHORT, "--seeds", "1", "--seed", "3", "--output-dir", folder]
    words += ["--methods", "independent", "mutual", "ensemble-distill"]
    done = run_program(
        BIN / "torchrun", "--nproc_per_node", "2", "-m", "dml_accel", "compare", *words
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("tables and plot:") == 1  # rank 0 prints
    found = record(folder)
    assert [one["world_size"] for one in found["runs"]] == [2, 2, 2]
    for method in ("independent", "mutual"):
        lines = [events(root / method / "seed-3")[1] for root in (finished, folder)]
        one, two = (line["peers"]["test_efficientnet-0"]["loss"] for line in lines)
        assert one == pytest.approx(two, rel=1e-4)  # law 2 on the first step, single precision


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("metric", ["top1", "nll", "ece"])
@pytest.mark.parametrize(
    ("name", "peers"),
    [
        ("resnet8_cifar", {"resnet8-0", "resnet8-1"}),
        ("test_efficientnet", {"test_efficientnet-0"}),
        ("resnet8-1", {"resnet8-1"}),
        ("cohort mean", {"resnet8-0", "resnet8-1", "test_efficientnet-0"}),
    ],
)
def test_summaries_equal_scipys_on_the_raw_numbers(
    finished: Path, metric: str, name: str, peers: set[str]
) -> None:
    alone, mutual = (per_seed(finished, m, peers, metric) for m in ("independent", "mutual"))
    found = summary(record(finished), "mutual", name)
    assert found[metric]["n"] == 3  # seeds; equal peers of a run are not replicates
    assert found[metric]["mean"] == pytest.approx(sum(mutual) / 3, rel=1e-9)
    theirs = stats.ttest_rel(mutual, alone)
    interval = theirs.confidence_interval(0.95)
    difference = found["difference"][metric]
    assert difference["p"] == pytest.approx(theirs.pvalue, rel=1e-6)
    assert (difference["low"], difference["high"]) == pytest.approx(tuple(interval), rel=1e-6)
    assert summary(record(finished), "independent", name)["difference"] is None


def test_the_ensemble_is_compared_too(finished: Path) -> None:
    found = record(finished)
    values = {
        method: [r["ensemble"]["nll"] for r in found["runs"] if r["method"] == method]
        for method in ("independent", "mutual")
    }
    p = stats.ttest_rel(values["mutual"], values["independent"]).pvalue
    assert summary(found, "mutual", "ensemble")["difference"]["nll"]["p"] == pytest.approx(p)


def test_the_table_of_raw_numbers(finished: Path) -> None:
    header = (finished / "results.csv").read_text().splitlines()[0]
    assert header == "method,seed,peer,arch,top1,top5,nll,ece,macro_f1"
    table = rows(finished)
    assert len(table) == 2 * 3 * 3
    for row in table:
        folder = finished / row["method"] / f"seed-{row['seed']}"
        peers = record(folder)["peers"]
        (peer,) = (peer for peer in peers if peer["name"] == row["peer"])
        assert row["arch"] == peer["arch"]
        for metric in ("top1", "top5", "nll", "ece", "macro_f1"):
            assert float(row[metric]) == peer["test"][metric]


def test_every_number_can_be_traced_to_its_run(finished: Path) -> None:
    found = record(finished)
    assert [r["folder"] for r in found["runs"]] == [
        f"{method}/seed-{seed}" for seed in SEEDS for method in ("independent", "mutual")
    ]
    for one in found["runs"]:
        config = load(finished / one["folder"] / "config.json")
        assert one["commit"] == config["commit"] and one["versions"] == config["versions"]
        assert one["seconds"] > 0 and one["images_per_second"] > 0


def test_the_document_has_a_row_for_each_method(finished: Path) -> None:
    text = (finished / "results.md").read_text()
    title = text.splitlines()[0]
    # Only what is smaller than the paper's CIFAR-100 is scaled down.
    assert title == "# Independent against mutual: resnet8 + resnet8 + test_efficientnet on digits"
    cells = " ".join(text.split())
    assert "| method | n | resnet8 | test_efficientnet | ensemble | minus independent |" in cells
    assert "| ensemble | mutual | 3 |" in cells and "each alone | --kl-weight 0 |" in cells
    assert "Published results" not in text  # those are of another data set
    assert "`mutual/seed-5`" in text


def test_the_plot_shows_the_differences(finished: Path) -> None:
    found = record(finished)
    assert (finished / "differences.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = plots.differences(found, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mutual"]
    for bar, name in zip(axes.containers, ("cohort mean", "ensemble"), strict=True):
        difference = summary(found, "mutual", name)["difference"]["top1"]
        ((low, _), (high, _)) = bar.lines[2][0].get_segments()[0]
        ends = (100 * difference["low"], 100 * difference["high"])
        assert (low, high) == pytest.approx(ends, rel=1e-9)


def test_a_single_seed_is_reported_without_an_interval(tmp_path: Path) -> None:
    assert compared(tmp_path / "one", "--cohort", "resnet8", "--seeds", "1") == 0
    text = (tmp_path / "one" / "results.md").read_text()
    assert "no interval" in text
    found = summary(record(tmp_path / "one"), "mutual", "resnet8-0")
    # One network alone has no peer: both methods are the same training, bit for bit.
    assert found["difference"]["nll"]["mean"] == 0 and found["difference"]["nll"]["p"] is None


# ---------------------------------------------------------------- presets, published values


def test_a_preset_of_several_cohorts_has_a_folder_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts = (("resnet8", "resnet8"), ("timm:test_efficientnet", "resnet8"))
    changes = {"max_steps": 99, "batch_size": 16}
    monkeypatch.setitem(PRESETS, "paper-table2", Preset("two pairs", cohorts, changes))
    folder = tmp_path / "preset"
    assert compared(folder, "--preset", "paper-table2", "--seeds", "1", "--max-steps", "2") == 0
    names = {str(path.parent.relative_to(folder)) for path in folder.rglob("metrics.jsonl")}
    assert names == {
        f"{cohort}/{method}/seed-0"
        for cohort in ("resnet8x2", "test_efficientnet-resnet8")
        for method in ("independent", "mutual")
    }
    table = rows(folder)
    assert [*table[0]][:3] == ["cohort", "method", "seed"]
    assert {row["cohort"] for row in table} == {"resnet8x2", "test_efficientnet-resnet8"}
    config = load(folder / "resnet8x2/mutual/seed-0/config.json")["config"]
    # Flags that are given override the preset.
    assert (config["max_steps"], config["batch_size"]) == (2, 8)


def test_published_values_are_beside_ours_on_cifar100(
    real_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sources.read(Config(dataset=str(real_images)).data)
    few = dataclasses.replace(whole, test=whole.test.select(torch.arange(50)))
    monkeypatch.setattr(compare.sources, "read", lambda *_, **__: few)
    words = ["--dataset", str(real_images), "--cohort", "resnet32*2", "--max-steps", "1"]
    words += ["--optimizer", "adamw"]
    folder = tmp_path / "cifar"
    done = cli.main(["compare", *words, "--seeds", "1", "--cpu", "--output-dir", str(folder)])
    assert done == 0
    text = (folder / "results.md").read_text()
    assert "(scaled down: 10,000 of 50,000 training images, 1 optimizer steps)" in text
    cells = " ".join(text.split())
    assert "| paper | independent | resnet32 | 68.99 | |" in cells
    assert "| paper | mutual | 2 x resnet32 | 71.19 / 70.75 | |" in cells
    assert "second-hand" in text  # what differs
    assert "not comparable" in text and "pilsHan/DML_for-personal-study" in text
    assert "Ours follow another recipe (optimizer, lr)." in text


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kl-weight", "0"], "--kl-weight 0 makes every method independent"),
        (
            ["--teach-with", "ema", "--ema", "0.9", "--methods", "mutual", "sequential"],
            "--methods sequential: --teach-with ema needs --update simultaneous: with sequential",
        ),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--preset", "paper"], "invalid choice: 'paper'"),
        (["--cohort", "resnet33"], "unknown net 'resnet33'"),
        (["--train-limit", "5000"], "--train-limit 5000 is more than the 1437 training images"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert compared(tmp_path / "refused", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_runs_of_another_configuration_are_not_mixed_in(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_text()
    assert compared(finished, *COHORT, "--seeds", "3", "--seed", "3", "--momentum", "0.5") == 2
    error = capsys.readouterr().err
    assert "independent/seed-3 was started with --momentum 0.9, but this command says" in error
    assert "--momentum 0.5: use the same flags or a new --output-dir" in error
    assert error.count("\n") == 1
    assert (finished / "results.json").read_text() == before


def test_the_folder_of_a_single_run_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "single"
    assert train(folder, *TINY, "--cohort", "resnet8") == 0
    assert compared(folder, "--cohort", "resnet8") == 2
    assert "holds a single run (config.json); name another folder" in capsys.readouterr().err


def test_a_comparison_is_not_overwritten_by_a_smaller_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(finished, folder)
    assert compared(folder, *COHORT, "--seeds", "2", "--seed", "3") == 2
    assert "holds a comparison with independent/seed-5, mutual/seed-5, which these flags leave" in (
        capsys.readouterr().err
    )
    (folder / "results.json").write_text('{"mine": 1}')
    assert compared(folder, *COHORT, "--seeds", "3", "--seed", "3") == 2
    assert "results.json, results.csv, results.md, differences.png of something else" in (
        capsys.readouterr().err
    )


def test_a_run_with_results_is_kept_whatever_its_status_says(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(finished, folder)
    (folder / "mutual" / "seed-3" / "status.json").unlink()
    monkeypatch.setattr(compare, "run_one", lambda *_, **__: pytest.fail("trained again"))
    assert compared(folder, *COHORT, "--seeds", "3", "--seed", "3") == 0


def test_nothing_around_the_runs_ends_a_comparison(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(compare, "run_one", lambda *_, **__: pytest.fail("trained again"))

    def fail(*_: object) -> None:
        raise RuntimeError("no\nfont")

    for owner, name in ((plots, "differences"), (comparison, "comparison_markdown")):
        monkeypatch.setattr(owner, name, fail)
    (folder / "results.csv").unlink()
    (folder / "mutual/seed-3/status.json").write_text('{"status": "running", "step": 4}')
    shutil.rmtree(folder / "mutual/seed-4/peers/resnet8-1")
    results = load(folder / "mutual/seed-5/results.json") | {"world_size": 2, "threads": 77}
    (folder / "mutual/seed-5/results.json").write_text(json.dumps(results))
    assert compared(folder, *COHORT, "--seeds", "3", "--seed", "3") == 0
    said = capsys.readouterr().err
    for words in (
        f"warning: {folder}/results.md is not written (RuntimeError: no font)\n",
        f"warning: {folder}/differences.png is not written (RuntimeError: no font)\n",
        f"warning: {folder}/mutual/seed-4 lacks the networks of resnet8-1: its results count",
        "processes 1 in independent/seed-3, mutual/seed-3 and 3 more, 2 in mutual/seed-5; ",
        f"--threads {torch.get_num_threads()} in independent/seed-3, mutual/seed-3 and 3 more, 77",
    ):
        assert words in said
    assert status_of(folder / "mutual/seed-3") == {"status": "done", "reason": None, "step": 4}
    assert (folder / "results.csv").read_text() == (finished / "results.csv").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", '{"mixed_precision": "no"}', "mutual/seed-3 is damaged (KeyError: '"),
        ("results.json", "{", "results.json is not valid JSON"),
        ("results.json", {"placement": "x"}, "mutual/seed-3 is damaged (AttributeError: "),
        ("results.json", {"versions": ["torch"]}, "mutual/seed-3 is damaged (TypeError: "),
        ("metrics.jsonl", "torn", "metrics.jsonl is not valid JSON"),
        ("metrics.jsonl", "[3]", "metrics.jsonl does not hold a JSON object"),
        ("config.json", '{"config": 3, "versions": {}}', "config.json does not describe a run"),
    ],
)
def test_a_damaged_run_is_refused_before_the_others_are_trained(
    finished: Path, tmp_path: Path, name: str, content: str | dict[str, Any], message: str
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(finished, folder)
    file = folder / "mutual/seed-3" / name
    file.write_text(content if isinstance(content, str) else json.dumps(load(file) | content))
    plan = compare.plan_runs(Config(**record(finished)["config"]), *PLANNED)
    with pytest.raises(UsageError) as refused:
        compare.ComparisonFolder(str(folder), plan)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    plan = compare.plan_runs(Config(dataset=str(tmp_path / "set")), *PLANNED)
    (tmp_path / "set/train/cat").mkdir(parents=True)
    for where, text in {
        tmp_path: "holds set but none of the runs that these flags ask for; name another folder",
        tmp_path / "set/compared": "where images are read from",
    }.items():
        with pytest.raises(UsageError, match=text):
            compare.ComparisonFolder(str(where), plan)


def test_an_unfinished_run_of_another_configuration_is_not_cleared_away(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(finished, folder)
    (folder / "mutual" / "seed-3" / "results.json").unlink()
    assert compared(folder, *COHORT, "--seeds", "3", "--seed", "3", "--batch-size", "9") == 2
    error = capsys.readouterr().err
    assert "started with --batch-size 8, but this command says --batch-size 9" in error
    assert (folder / "mutual" / "seed-3" / "peers" / "resnet8-0").exists()


def test_runs_of_another_precision_are_not_mixed_in(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*COHORT, "--seeds", "3", "--seed", "3", "--mixed-precision", "bf16"]
    assert compared(finished, *words) == 2
    error = capsys.readouterr().err
    assert "--mixed-precision no, but this command says --mixed-precision bf16" in error


@pytest.mark.parametrize("patience", ["2", "99"])  # noticed on the way, or at the end
def test_a_run_that_diverges_does_not_prevent_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patience: str
) -> None:
    words = ["--cohort", "resnet8*2", "--seeds", "1", "--lr", "1e30", "--max-nonfinite", patience]
    assert compared(tmp_path / "wild", *words) == 1
    assert "independent/seed-0 failed: the " in capsys.readouterr().err
    found = record(tmp_path / "wild")
    assert sorted(found["failed"]) == ["independent/seed-0", "mutual/seed-0"]
    assert found["missing"] == []
    assert "- Failed: mutual/seed-0" in (tmp_path / "wild" / "results.md").read_text()


def test_a_missing_run_is_named() -> None:
    record = {"methods": ["mutual"], "cohorts": [], "dataset": "digits", "split": "test"}
    record["scaled_down"] = []
    assert comparison_title(record) == "Mutual: no finished run on digits"


# ---------------------------------------------------------------- methods that are refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--methods", "independent", "distill"],
            "--methods distill: it needs --frozen-peers, its",
        ),
        (["--frozen-peers", "x"], "--frozen-peers are the teachers of the method"),
        (["--methods", "semi"], "--methods semi: it needs --labelled-fraction below 1"),
        (
            ["--methods", "sequential", "--placement", "split"],
            "--methods sequential: --update sequential updates peers in turn, which leaves",
        ),
        (["--update", "official"], "compare has no --update: use --methods"),
        (["--resume", "auto"], "the same command with the same --output-dir resumes by itself"),
        (["--kl-weight", "0", "--methods", "semi"], "makes every method independent"),
    ],
    ids=str,
)
def test_methods_that_contradict_the_configuration_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert compared(tmp_path / "x", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_unfinished_runs_have_the_layout_of_those_of_their_cohort(tmp_path: Path) -> None:
    # One cohort was begun by a version with another default.
    words = ["--seeds", "2", "--methods", "independent"]
    assert compared(tmp_path, "--cohort", "resnet8*2", *words, "--memory-format=contiguous") == 0
    path = tmp_path / "independent/seed-0/config.json"
    found = load(path)
    found["config"]["memory_format"] = None
    path.write_text(json.dumps(found))
    shutil.rmtree(tmp_path / "independent/seed-1")
    assert compared(tmp_path, "--cohort", "resnet8*2", *words) == 0
    resolved = [load(one)["resolved"] for one in tmp_path.glob("independent/*/config.json")]
    assert [one["memory_format"] for one in resolved] == ["contiguous", "contiguous"]
