"""A trained cohort in use: measured, asked about images, and handed on in two formats."""

import fcntl
import importlib.util
import io
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image

from dml_accel import cli
from dml_accel.core.config import UsageError
from dml_accel.data import sources
from dml_accel.inference import evaluate as evaluation
from dml_accel.inference import export as exporting
from dml_accel.inference import load as trained
from dml_accel.inference import onnx as onnx_model
from dml_accel.inference import predict as predicting
from dml_accel.inference.load import Networks
from tests.conftest import real_dataset, tiny_config
from tests.test_sources import forged

SIZE, FEW = 16, 300
PEERS = ["resnet8-0", "resnet8-1", "test_resnet-0"]
CPU = torch.device("cpu")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps: a pair of ours, and one network that timm has itself."""
    folder = tmp_path_factory.mktemp("use") / "run"
    words = ["--dataset", real_dataset(), "--image-size", str(SIZE), "--max-steps", "8", "--cpu"]
    words += ["--train-limit", "400", "--val-fraction", "0.1", "--batch-size", "16", "--lr", "0.05"]
    cohort = ["--cohort", "resnet8*2", "timm:test_resnet"]
    assert cli.main(["train", *words, *cohort, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def few(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some test images, as levels and labels, and one of each class as a file in its folder."""
    folder = tmp_path_factory.mktemp("few")
    config = tiny_config(dataset=real_dataset(), image_size=SIZE)
    split, classes = sources.read_test(config)
    np.savez(folder / "few.npz", images=split.images[:FEW].numpy(), labels=split.labels[:FEW])
    for label, name in enumerate(classes):
        place = int((split.labels == label).nonzero()[0])
        (folder / "set/test" / name).mkdir(parents=True)
        Image.fromarray(split.images[place].numpy()).save(folder / "set/test" / name / "0.png")
    return folder


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def answers(folder: Path, few: Path) -> torch.Tensor:
    """Logits of a peer, or of all peers of a run, by our own way to use them, [K, N, C]."""
    networks = Networks(trained.find(folder), CPU)
    return networks.logits(torch.from_numpy(np.load(few / "few.npz")["images"]))


# ---------------------------------------------------------------- evaluate


def same_numbers(run: Path, folder: Path, within: float = 1e-6) -> None:
    results, found = load(run / "results.json"), load(folder / "evaluation.json")
    assert [peer["name"] for peer in found["peers"]] == sorted(p["name"] for p in results["peers"])
    for peer in results["peers"]:
        (mine,) = (one for one in found["peers"] if one["name"] == peer["name"])
        assert mine["test"] == pytest.approx(peer["test"], rel=0, abs=within)
        assert mine["params"] == peer["params"]
    assert found["ensemble"] == pytest.approx(results["ensemble"], rel=0, abs=within)
    assert found["agreement"] == pytest.approx(results["agreement"], rel=0, abs=within)


def test_a_run_has_on_its_test_split_what_results_json_says(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert cli.main(["evaluate", str(run), "--to", str(tmp_path / "x"), "--cpu"]) == 0
    same_numbers(run, tmp_path / "x")
    out = capsys.readouterr().out
    assert all(name in out for name in [*PEERS, "ensemble", "networks agree on"])
    assert (tmp_path / "x/confusion.png").read_bytes().startswith(b"\x89PNG")
    record = load(tmp_path / "x/evaluation.json")
    for row, name in enumerate([*PEERS, "ensemble"]):  # by class and in all is the same count
        right = sum(one["n"] * (one["top1"][name] or 0) for one in record["classes"])
        metrics = [*(peer["test"] for peer in record["peers"]), record["ensemble"]][row]
        assert right == pytest.approx(metrics["top1"] * metrics["n"])
    rows = [line.split(",") for line in (tmp_path / "x/confusion.csv").read_text().splitlines()]
    counts = np.array([[int(n) for n in row[1:]] for row in rows[1:]])
    assert np.trace(counts) / counts.sum() == pytest.approx(record["ensemble"]["top1"])
    assert counts.sum(1).tolist() == [one["n"] for one in record["classes"]]
    most = record["most_confused"][0]
    names = rows[0][1:]
    np.fill_diagonal(counts, 0)
    assert counts[names.index(most["class"]), names.index(most["taken_for"])] == counts.max()
    assert most["n"] == counts.max()


@pytest.mark.parametrize(
    ("precision", "within"), [("--float64", 1e-12), ("--mixed-precision=bf16", 1e-6)]
)
def test_other_precisions_are_those_of_the_run(
    precision: str, within: float, tmp_path: Path
) -> None:
    words = "--dataset digits --image-size 8 --batch-size 8 --cohort resnet8*2 --cpu".split()
    words += ["--max-steps", "2", "--output-dir", str(tmp_path / "run"), precision]
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process is its rule
    assert cli.main(["train", *words]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu"]) == 0
    same_numbers(tmp_path / "run", tmp_path / "run/evaluations/digits-test", within)


def test_classes_in_another_order_are_matched_by_name(
    run: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(run / "peers/resnet8-0", tmp_path / "peer")
    config = load(tmp_path / "peer/config.json")
    config["label_names"].reverse()
    (tmp_path / "peer/config.json").write_text(json.dumps(config))
    words = ["--dataset", str(few / "set"), "--to", str(tmp_path / "x"), "--cpu"]
    assert cli.main(["evaluate", str(tmp_path / "peer"), *words]) == 0
    assert "matched by name" in capsys.readouterr().err
    (split, classes) = sources.read_test(tiny_config(dataset=str(few / "set"), image_size=SIZE))
    networks = Networks(trained.find(run / "peers/resnet8-0"), CPU)
    right = networks.logits(split.images)[0].argmax(1) == len(classes) - 1 - split.labels
    found = load(tmp_path / "x/evaluation.json")
    assert found["peers"][0]["test"]["top1"] == right.double().mean().item()


def test_other_peoples_files_are_not_replaced(run: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "confusion.csv").write_text("mine")
    assert cli.main(["evaluate", str(run), "--to", str(tmp_path), "--cpu"]) == 2
    assert "holds confusion.csv of something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.csv"]


def test_peers_of_several_runs_with_one_name_are_all_there(run: Path, tmp_path: Path) -> None:
    peer = sorted((run / "peers").iterdir())[0]
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(peer.resolve())
    assert list(trained.find(tmp_path).folders) == ["a", "b"]


def test_labels_by_name_by_hand() -> None:
    labels = torch.tensor([0, 2, 1, 0])
    assert evaluation.by_name(labels, ["c", "a", "b"], ["a", "b", "c"], "x").tolist() == [
        2,
        1,
        0,
        2,
    ]
    some = evaluation.by_name(torch.tensor([1, 0]), ["c", "a"], ["a", "b", "c"], "x")
    assert some.tolist() == [0, 2]
    refused: Sequence[tuple[list[str], list[str], str]] = (
        (["0", "1"], ["0", "1", "2"], "tells 3 classes apart; the data set has 2"),
        (["a", "b", "c", "d"], ["a", "b", "c"], "tells 3 classes apart; the data set has 4"),
        (["a", "d"], ["a", "b", "c"], "knows no 'd' of the data set, which has no 'b', 'c'"),
        (["a", "b", "d"], ["a", "b", "c"], "knows no 'd' of the data set, which has no 'c'"),
        (["a", "a", "b"], ["b", "a", "c"], "several are called 'a'"),
        (["a", "b", "c"], ["b", "b", "c"], "several are called 'b'"),
    )
    for theirs, ours, text in refused:
        with pytest.raises(UsageError, match=text):
            evaluation.by_name(labels, theirs, ours, "x")


def test_what_cannot_be_measured_is_refused(run: Path, tmp_path: Path, capsys: Captured) -> None:
    peer = str(run / "peers/resnet8-0")
    (tmp_path / "file").write_text("")
    for words, text in (
        ([peer], "--dataset is needed"),
        ([str(tmp_path / "none")], "is no folder; name a run"),
        ([str(tmp_path)], "holds no trained peer"),
        ([str(run), "--to", str(tmp_path / "file/x")], "name a folder with --to"),
        ([str(run), "--test-split", "nothing", "--dataset", str(run)], "cannot be read"),
    ):
        assert cli.main(["evaluate", *words, "--cpu"]) == 2
        assert text in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/peers/resnet8-1")
    assert cli.main(["predict", str(tmp_path / "run"), "x.png"]) == 2
    assert "differ: resnet8-1" in capsys.readouterr().err
    (tmp_path / "run/results.json").unlink()  # as while a run is made longer
    assert cli.main(["evaluate", str(tmp_path / "run"), "--cpu"]) == 2
    assert "run is not finished (done at step 8): let it end with --res" in capsys.readouterr().err
    (tmp_path / "run/status.json").write_text('{"status": "running", "step": 5}')
    shutil.rmtree(tmp_path / "run/peers/resnet8-0")  # as when it was killed before its end
    assert cli.main(["predict", str(tmp_path / "run"), "x.png"]) == 2
    assert "run is not finished (interrupted at step 5)" in capsys.readouterr().err
    with open(tmp_path / "run/run.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.main(["predict", str(tmp_path / "run"), "x.png"]) == 2
    assert "run is not finished (running at step 5)" in capsys.readouterr().err
    shutil.copytree(run / "peers/resnet8-0", tmp_path / "run/peers/resnet8-0")
    (tmp_path / "run/peers/resnet8-0/config.json").write_text('{"num_classes": NaN}')
    assert cli.main(["export", str(tmp_path / "run/peers/resnet8-0"), "--to", "x"]) == 2
    assert "resnet8-0/config.json is no JSON" in capsys.readouterr().err


def test_a_split_that_lacks_a_class_is_measured(
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
    assert "by name: 1 known classes are not in the data set" in capsys.readouterr().err
    found = {one["name"]: one for one in load(tmp_path / "x/evaluation.json")["classes"]}
    assert found[f"class {first}"] == {
        "name": f"class {first}",
        "n": 0,
        "top1": {"peer": None, "ensemble": None},
    }
    assert all(found[f"class {name}"]["n"] == 1 for name in others)


# ---------------------------------------------------------------- predict


def predicted(capsys: Captured, *words: str) -> tuple[int, list[dict], str]:
    capsys.readouterr()
    code = cli.main(["predict", *words, "--cpu"])
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


def test_predictions_are_those_that_are_evaluated(
    run: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    test = few / "set/test"
    for source, peer in ((run, []), (run, ["--peer", "resnet8-1"])):
        of = run / "peers" / peer[1] if peer else source
        words = ["--dataset", str(few / "set"), "--to", str(tmp_path / of.name), "--cpu"]
        assert cli.main(["evaluate", str(of), *words]) == 0
        code, found, _ = predicted(capsys, str(source), str(test), *peer)
        assert code == 0 and len(found) == len(list(test.iterdir()))
        classes = [Path(one["image"]).parent.name for one in found]
        ranked = [[p["class"] for p in one["predictions"]] for one in found]
        metrics = load(tmp_path / of.name / "evaluation.json")["ensemble"]
        top1 = [row[0] == name for row, name in zip(ranked, classes, strict=True)]
        top5 = [name in row for row, name in zip(ranked, classes, strict=True)]
        assert (np.mean(top1), np.mean(top5)) == (metrics["top1"], metrics["top5"])


def test_the_ensemble_is_the_mean_posterior(run: Path, few: Path, capsys: Captured) -> None:
    file = sorted(map(str, (few / "set/test").glob("*/0.png")))[3]
    images = torch.from_numpy(np.asarray(Image.open(file))[None].copy())
    posterior = Networks(trained.find(run), CPU).logits(images).double().softmax(-1).mean(0)[0]
    _, (found,), _ = predicted(capsys, str(run), file)
    values, places = posterior.sort(descending=True)
    assert [one["index"] for one in found["predictions"]] == places[:5].tolist()
    assert [one["probability"] for one in found["predictions"]] == pytest.approx(
        values[:5].tolist(), abs=1e-6
    )


def test_files_folders_globs_and_stdin(
    run: Path, few: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = few / "set/test"
    files = sorted(map(str, test.glob("*/0.png")))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{files[1]}\n\n{files[0]}\n"))
    words = [files[2], f"{test}/*/0.png", "-", str(Path(files[3]).parent)]
    _, found, _ = predicted(capsys, str(run), *words)
    expected = [files[2], *files, files[1], files[0], files[3]]
    assert [one["image"] for one in found] == expected


def test_formats(run: Path, few: Path, capsys: Captured) -> None:
    file = sorted(map(str, (few / "set/test").glob("*/0.png")))[0]
    _, (found,), _ = predicted(capsys, str(run), file)
    best = found["predictions"][0]
    assert cli.main(["predict", str(run), file, "--format", "csv", "--cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image,rank,class,index,probability" and len(lines) == 6
    assert lines[1].split(",")[:4] == [file, "1", best["class"], str(best["index"])]
    assert cli.main(["predict", str(run), file, "--format", "table", "--cpu"]) == 0
    out = capsys.readouterr().out
    assert f"{best['class']} {100 * best['probability']:.1f}%" in out and file in out


def test_bad_images_are_named_and_left_out(
    run: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    good = sorted((few / "set/test").glob("*/0.png"))[0]
    content = good.read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[:200])
    (tmp_path / "corrupt.png").write_bytes(content[:60] + bytes(20) + content[80:])
    (tmp_path / "text.png").write_text("a picture of a cat")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "post\x1bscript.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )
    (tmp_path / "bomb.png").write_bytes(forged(20_000, 20_000))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    bad = sorted(path.name.replace("\x1b", "\ufffd") for path in tmp_path.iterdir())
    shutil.copy(good, tmp_path / "good.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, found, said = predicted(capsys, str(run), str(tmp_path), str(tmp_path / "none.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert code == 1
    assert [Path(one["image"]).name for one in found] == ["good.png"]
    lines = sorted(line.removeprefix(f"{tmp_path}/") for line in said.splitlines())
    assert [line.split(":")[0] for line in lines] == sorted([*bad, "none.png"])
    assert "400000000 pixels" in next(line for line in lines if "bomb" in line)
    assert "no known range" in next(line for line in lines if "float" in line)
    assert "truncated" in next(line for line in lines if line.startswith("truncated"))


def test_no_image_at_all_is_wrong_usage(run: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for word in (str(tmp_path), str(tmp_path / "*.png"), str(tmp_path / "none.png")):
        code, found, said = predicted(capsys, str(run), word)
        assert (code, found) == (2, [])
        assert f"error: there is no image in {word}" in said
    assert predicted(capsys, str(run), "x.png", "--peer", "resnet9-0")[0] == 2
    assert predicted(capsys, str(run))[0] == 2


def test_unusual_images_are_read_as_in_training(tmp_path: Path, capsys: Captured) -> None:
    colour = Image.new("CMYK", (9, 5), (10, 200, 30, 40))
    colour.save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    expected = np.asarray(Image.open(tmp_path / "cmyk.jpg").convert("RGB").resize((SIZE, SIZE)))
    levels, animated = predicting.read(str(tmp_path / "cmyk.jpg"), SIZE)
    assert np.abs(levels.astype(int) - expected).max() <= 1 and not animated
    Image.fromarray(np.full((6, 6), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (predicting.read(str(tmp_path / "deep.png"), SIZE)[0] == 100).all()
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert (predicting.read(str(tmp_path / "dot.png"), SIZE)[0] == [1, 2, 3]).all()
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (250, 5, 90)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    levels, animated = predicting.read(str(tmp_path / "moving.gif"), SIZE)
    assert (levels == 250).all() and animated


# ---------------------------------------------------------------- export


def outside(code: str, *words: str) -> None:
    """Run code in another process that does not find this package unless it is installed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


def agree(found: torch.Tensor, expected: torch.Tensor, few: Path) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    labels = torch.from_numpy(np.load(few / "few.npz")["labels"])
    assert (found.argmax(1) == labels).sum() == (expected.argmax(1) == labels).sum()


_TIMM = """
import json, sys, numpy as np, timm, torch
folder, few, to = sys.argv[1:]
known = json.load(open(f"{folder}/config.json"))["pretrained_cfg"]
mean, std = (torch.tensor(known[name]).view(3, 1, 1) for name in ("mean", "std"))
images = torch.from_numpy(np.load(few)["images"]).permute(0, 3, 1, 2) / 255
net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    np.save(to, net((images - mean) / std).numpy())
assert "dml_accel" not in sys.modules
"""


def test_safetensors_are_what_timm_loads_alone(run: Path, few: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep/er/net"
    words = ["--peer", "test_resnet-0", "--to", str(target)]
    assert cli.main(["export", str(run), *words]) == 0
    outside(_TIMM, str(target), str(few / "few.npz"), str(tmp_path / "found.npy"))
    expected = answers(run / "peers/test_resnet-0", few)[0]
    agree(torch.from_numpy(np.load(tmp_path / "found.npy")), expected, few)
    assert load(target / "config.json") == load(run / "peers/test_resnet-0/config.json")
    assert [path.name for path in target.parent.iterdir()] == ["net"]  # nothing temporary is left


def test_an_ensemble_is_a_folder_for_each_peer(run: Path, few: Path, tmp_path: Path) -> None:
    target = tmp_path / "all"
    target.mkdir()
    assert cli.main(["export", str(run), "--peer", "ensemble", "--to", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["README.md", *PEERS]
    net = timm.create_model(f"local-dir:{target / 'resnet8-1'}", pretrained=True)
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, Networks(trained.find(run), CPU).modules[1].state_dict()[name])
    assert torch.equal(answers(target, few), answers(run, few))  # it answers as the run does
    card = ModelCard.load(target / "README.md").data
    top1 = load(run / "results.json")["ensemble"]["top1"]
    assert (card.library_name, card.pipeline_tag) == ("timm", "image-classification")
    assert card.eval_results[0].metric_value == top1


_ONNX = """
import json, os, sys, numpy as np
folder, few, to = sys.argv[1:]
os.chdir(folder)
images = np.load(few)["images"].transpose(0, 3, 1, 2).astype(np.float32)
card = open("README.md").read()
exec(card.split("```python")[1].split("```")[0])  # the card's own words
np.save(to, answers)
(one,) = session.run(None, {"input": ((images[:1] / 255 - mean) / std)})
assert one.shape == answers[:1].shape and abs(one - answers[:1]).max() < 1e-4
assert not {"torch", "timm", "dml_accel"} & set(sys.modules)
"""


@pytest.mark.parametrize("peer", ["resnet8-0", "ensemble"])
def test_onnx_answers_alone_as_torch_does(
    run: Path, few: Path, tmp_path: Path, peer: str, capsys: Captured
) -> None:
    target = tmp_path / "net"
    words = ["--peer", peer, "--format", "onnx", "--to", str(target)]
    assert cli.main(["export", str(run), *words]) == 0
    assert "largest difference to torch" in capsys.readouterr().out
    assert sorted(p.name for p in target.iterdir()) == ["README.md", "config.json", "model.onnx"]
    outside(_ONNX, str(target), str(few / "few.npz"), str(tmp_path / "found.npy"))
    expected = answers(run, few)[0]
    if peer == "ensemble":
        expected = answers(run, few).double().softmax(-1).mean(0).log()
    agree(torch.from_numpy(np.load(tmp_path / "found.npy")), expected, few)
    known = load(target / "config.json")
    theirs = load(run / "peers/resnet8-0/config.json")
    assert known["label_names"] == theirs["label_names"]
    assert known["onnx"]["output"]["name"] == ("log_mean_posterior", "logits")[peer != "ensemble"]
    assert ModelCard.load(target / "README.md").data.library_name == "onnx"


def test_the_best_is_that_of_the_validation_split(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(run, tmp_path / "run")
    results = load(tmp_path / "run/results.json")
    for peer in results["peers"]:
        peer["val"]["top1"] = 0.5 if peer["name"] == "resnet8-1" else 0.4
        peer["test"]["top1"] = 0.1 if peer["name"] == "resnet8-1" else 0.9
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    found = trained.find(tmp_path / "run")
    assert exporting.choose(found, "best")[1] == "resnet8-1"
    for peer, nll in zip(results["peers"], (0.7, 0.6, 0.8), strict=True):  # of equal ones
        peer["val"] |= {"top1": 0.5, "nll": nll}
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    best = results["peers"][1]["name"]
    assert exporting.choose(trained.find(tmp_path / "run"), "best")[1] == best
    said = capsys.readouterr().err
    assert f"best is {best}: " in said and f"{best} 50.00% (NLL 0.6000)" in said
    results["peers"][0]["val"] = None
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    with pytest.raises(
        UsageError, match="none .the test split is for reporting.: train with --val"
    ):
        exporting.choose(trained.find(tmp_path / "run"), "best")


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "mine").write_text("")
    for words, text in (
        (["--to", str(full), "--peer", "resnet8-0"], "is not empty; name a new folder"),
        (["--to", str(full / "mine"), "--peer", "resnet8-0"], "is no folder; name a new one"),
        (["--to", str(full / "mine/x"), "--peer", "resnet8-0"], "cannot be made or written"),
        (["--to", str(new)], "has 3 peers: choose with --peer ensemble, best or one of resnet8-0"),
        (["--to", str(new), "--peer", "x"], "has no such peer; it has resnet8-0, resnet8-1"),
    ):
        assert cli.main(["export", str(run), *words]) == 2
        assert text in capsys.readouterr().err
    onnx = ["export", str(run), "--peer", "resnet8-0", "--format", "onnx", "--to", str(new)]
    with monkeypatch.context() as patch:
        patch.setattr(onnx_model, "MOST_DIFFERENCE", 0.0)
        assert cli.main(onnx) == 2
        assert "differs from torch by" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert cli.main(onnx) == 2
        assert "pip install 'dml-accel[onnx]'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_help_teaches(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"dml-accel {command} runs/pair" in capsys.readouterr().out
