"""An evaluation has the numbers of the run; classes are matched by name."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.data import sources
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference.evaluate import confusion_figure, match_labels
from dml_accel.inference.load import Networks, read_trained_peers
from tests.helpers import load, tiny_config, train
from tests.inference.conftest import CPU, PEERS, SQUARE

Captured = pytest.CaptureFixture[str]


def assert_same_numbers(run: Path, folder: Path, within: float = 1e-6) -> None:
    results, record = load(run / "results.json"), load(folder / "evaluation.json")
    names = sorted(peer["name"] for peer in results["peers"])
    assert [peer["name"] for peer in record["peers"]] == names
    for peer in results["peers"]:
        (mine,) = (one for one in record["peers"] if one["name"] == peer["name"])
        assert mine["test"] == pytest.approx(peer["test"], rel=0, abs=within)
        assert mine["params"] == peer["params"]
    assert record["ensemble"] == pytest.approx(results["ensemble"], rel=0, abs=within)
    assert record["agreement"] == pytest.approx(results["agreement"], rel=0, abs=within)


def test_on_its_test_split_a_run_has_the_numbers_of_results_json(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert cli.main(["evaluate", str(run), "--to", str(tmp_path / "x"), "--cpu"]) == 0
    assert_same_numbers(run, tmp_path / "x")
    out = capsys.readouterr().out
    assert all(name in out for name in [*PEERS, "ensemble", "networks agree on"])
    assert (tmp_path / "x/confusion.png").read_bytes().startswith(b"\x89PNG")
    record = load(tmp_path / "x/evaluation.json")
    for row, name in enumerate([*PEERS, "ensemble"]):  # counts by class add up to the total
        right = sum(one["n"] * (one["top1"][name] or 0) for one in record["classes"])
        metrics = [*(peer["test"] for peer in record["peers"]), record["ensemble"]][row]
        assert right == pytest.approx(metrics["top1"] * metrics["n"])
    rows = [line.split(",") for line in (tmp_path / "x/confusion.csv").read_text().splitlines()]
    counts = np.array([[int(n) for n in row[1:]] for row in rows[1:]])
    assert np.trace(counts) / counts.sum() == pytest.approx(record["ensemble"]["top1"])
    assert counts.sum(1).tolist() == [one["n"] for one in record["classes"]]
    most, names = record["most_confused"][0], rows[0][1:]
    np.fill_diagonal(counts, 0)
    assert counts[names.index(most["class"]), names.index(most["taken_for"])] == counts.max()
    assert most["n"] == counts.max()


@pytest.mark.parametrize(
    ("precision", "within"), [("--float64", 1e-12), ("--mixed-precision=bf16", 1e-6)]
)
def test_the_precision_is_that_of_the_run(precision: str, within: float, tmp_path: Path) -> None:
    words = "--dataset digits --image-size 8 --batch-size 8 --cohort resnet8*2 --cpu".split()
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has only one precision
    assert train(tmp_path / "run", *words, "--max-steps", "2", precision) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu"]) == 0
    assert_same_numbers(tmp_path / "run", tmp_path / "run/evaluations/digits-test", within)


# ---------------------------------------------------------------- images that are not in memory


def measure(*words: str) -> dict:
    """The record of an evaluation, and its figures, without what differs between two of them."""
    assert cli.main(["evaluate", *words, "--cpu"]) == 0
    folder = Path(words[words.index("--to") + 1])
    record = load(folder / "evaluation.json")
    record["images"].pop("pixels")
    return record | {"command": "", "confusion": (folder / "confusion.csv").read_text()}


def test_images_that_are_read_when_needed_have_the_same_numbers(
    cut: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 12)
    monkeypatch.setattr("dml_accel.data.workers._LARGEST_PIECE", 4)
    words = [str(cut), "--dataset", str(photos), "--to"]
    held = measure(*words, str(tmp_path / "memory"), "--feed", "memory")
    for workers in ("0", "2"):
        to = str(tmp_path / workers)
        read = measure(*words, to, "--feed", "loader", "--workers", workers)
        assert read == held and held["ensemble"]["n"] == sum(1 for _ in photos.glob("*/*/*"))
    assert cli.main(["evaluate", *words, str(tmp_path / "2"), "--cpu"]) == 0  # the same images
    capsys.readouterr()
    assert cli.main(["evaluate", *words, str(tmp_path / "2"), "--cpu", "--workers", "999"]) == 2
    assert "--workers is 999" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_refused_or_not_counted(
    cut: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 12)
    monkeypatch.setattr("dml_accel.data.workers._LARGEST_PIECE", 4)
    copy = shutil.copytree(photos, tmp_path / "set")
    bad = sorted(copy.glob("*/*/0.jpg"))[9]  # in the second piece of a batch
    bad.write_bytes(bad.read_bytes()[:400])
    peer, count = str(cut / PEERS[0]), sum(1 for _ in photos.glob("*/*/*"))
    found = []
    for feed in ("memory", "loader"):
        words = ["--dataset", str(copy), "--to", str(tmp_path / feed), "--feed", feed]
        assert cli.main(["evaluate", peer, *words, "--cpu"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(bad.relative_to(copy)) in error and "repair or remove it" in error
        assert not (tmp_path / feed).exists()
        found.append(measure(peer, *words, "--bad-images", "skip"))
        out, error = capsys.readouterr()
        assert f"cannot be read, and not counted: 1 image: {bad}" in error
        assert f"{count - 1} of {count} images of" in out
    assert found[0] == found[1] and found[0]["unread"] == 1
    assert found[0]["ensemble"]["n"] == sum(one["n"] for one in found[0]["classes"]) == count - 1


def test_a_record_of_an_earlier_version_is_of_the_same_images(
    cut: Path, photos: Path, tmp_path: Path, capsys: Captured
) -> None:
    words = [str(cut / PEERS[0]), "--dataset", str(photos), "--to", str(tmp_path), "--cpu"]
    assert cli.main(["evaluate", *words]) == 0
    file = tmp_path / "evaluation.json"
    record = load(file)
    del record["images"]["files"]
    file.write_text(json.dumps(record))
    assert cli.main(["evaluate", *words]) == 0
    for changed in ({"pixels": "0" * 64, "files": None}, {"shape": 1}):
        file.write_text(json.dumps(record | {"images": record["images"] | changed}))
        assert cli.main(["evaluate", *words]) == 2
        assert "holds the evaluation on other images" in capsys.readouterr().err


# ---------------------------------------------------------------- classes


def test_classes_in_another_order_are_matched_by_name(
    run: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(run / "peers/resnet8-0", tmp_path / "peer")
    config = load(tmp_path / "peer/config.json")
    config["label_names"].reverse()
    (tmp_path / "peer/config.json").write_text(json.dumps(config))
    words = ["--dataset", str(few / "set"), "--to", str(tmp_path / "x"), "--cpu"]
    assert cli.main(["evaluate", str(tmp_path / "peer"), *words]) == 0
    assert "classes are matched by name: their order differs" in capsys.readouterr().err
    split, classes, _ = sources.read_test(tiny_config(dataset=str(few / "set")).data, SQUARE)
    networks = Networks(read_trained_peers(run / "peers/resnet8-0"), CPU)
    right = networks.logits(split.held)[0].argmax(1) == len(classes) - 1 - split.labels
    record = load(tmp_path / "x/evaluation.json")
    assert record["peers"][0]["test"]["top1"] == right.double().mean().item()


def test_labels_are_matched_by_name_by_hand() -> None:
    labels = torch.tensor([0, 2, 1, 0])
    matched = match_labels(labels, ["c", "a", "b"], ["a", "b", "c"], "x")
    assert matched.tolist() == [2, 1, 0, 2]
    some = match_labels(torch.tensor([1, 0]), ["c", "a"], ["a", "b", "c"], "x")
    assert some.tolist() == [0, 2]
    refused: Sequence[tuple[list[str], list[str], str]] = (
        (["0", "1"], ["0", "1", "2"], "x has 3 classes, but the data set has 2"),
        (["a", "b", "c", "d"], ["a", "b", "c"], "x has 3 classes, but the data set has 4"),
        (["a", "d"], ["a", "b", "c"], "have 'd' of the data set, which does not have 'b', 'c'"),
        (["a", "b", "d"], ["a", "b", "c"], "have 'd' of the data set, which does not have 'c'"),
        (["a", "a", "b"], ["b", "a", "c"], "several are called 'a'"),
        (["a", "b", "c"], ["b", "b", "c"], "several are called 'b'"),
    )
    for theirs, ours, text in refused:
        with pytest.raises(UsageError, match=text):
            match_labels(labels, theirs, ours, "x")


def test_a_split_that_lacks_a_class_is_evaluated(
    run: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(few / "set", tmp_path / "set")
    first, *others = sorted(path.name for path in (tmp_path / "set/test").iterdir())
    shutil.rmtree(tmp_path / "set/test" / first)
    peer = shutil.copytree(run / "peers/resnet8-0", tmp_path / "peer")
    config = load(peer / "config.json")
    config["label_names"] = [f"class {name}" for name in config["label_names"]]
    (peer / "config.json").write_text(json.dumps(config))
    for name in others:
        (tmp_path / "set/test" / name).rename(tmp_path / "set/test" / f"class {name}")
    words = ["--dataset", str(tmp_path / "set"), "--to", str(tmp_path / "x"), "--cpu"]
    assert cli.main(["evaluate", str(peer), *words]) == 0
    assert "matched by name: the data set lacks 1 of them" in capsys.readouterr().err
    classes = {one["name"]: one for one in load(tmp_path / "x/evaluation.json")["classes"]}
    assert classes[f"class {first}"] == {
        "name": f"class {first}",
        "n": 0,
        "top1": {"peer": None, "ensemble": None},
    }
    assert all(classes[f"class {name}"]["n"] == 1 for name in others)


# ---------------------------------------------------------------- files


def test_files_of_something_else_are_not_replaced(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "confusion.csv").write_text("mine")
    assert cli.main(["evaluate", str(run), "--to", str(tmp_path), "--cpu"]) == 2
    assert "holds confusion.csv of something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.csv"]


def test_what_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    for words, text in (
        ([str(run / "peers/resnet8-0")], "--dataset is needed"),
        ([str(run), "--to", str(tmp_path / "file/x")], "name a folder with --to"),
        ([str(run), "--test-split", "nothing", "--dataset", str(run)], "cannot be read"),
    ):
        assert cli.main(["evaluate", *words, "--cpu"]) == 2
        assert text in capsys.readouterr().err


def test_the_figure_has_shares_names_and_counts() -> None:
    figure = confusion_figure([[3, 1], [0, 2]], ["a $ b", "c"])
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"a \$ b", "c"]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "3"]
