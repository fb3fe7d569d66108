"""Trained networks in Python: loading, predicting any kind of image, evaluating, exporting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dml_accel
from dml_accel import cli
from dml_accel.core.errors import UsageError

SIZE = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dml_accel.Run:
    """A finished run that has one checkpoint more."""
    return dml_accel.train(
        cohort="resnet8*2",
        dataset="digits",
        image_size=SIZE,
        batch_size=16,
        lr=0.05,
        max_steps=4,
        save_every=2,
        val_fraction=0.1,
        cpu=True,
        output_dir=tmp_path_factory.mktemp("trained") / "run",
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs that are not squares."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return paths


def test_predictions_are_those_of_the_command(
    run: dml_accel.Run, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", str(run.path), *map(str, pictures), "--cpu"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = dml_accel.predict(run, pictures, cpu=True)
    assert capsys.readouterr().out == ""
    for row, one in zip(printed, found, strict=True):
        ranked = [(p["class"], p["index"], p["probability"]) for p in row["predictions"]]
        assert [*zip(one.classes, one.indices, one.probabilities, strict=True)] == ranked
        assert (one.image, one.best) == (row["image"], ranked[0][0])


def test_every_kind_of_image_gives_the_same_numbers(
    run: dml_accel.Run, pictures: list[Path]
) -> None:
    networks = run.networks(device="cpu")
    assert networks.names == ("resnet8-0", "resnet8-1") and networks.image_size == SIZE
    assert networks.classes == tuple("0123456789")
    arrays = [np.array(Image.open(path)) for path in pictures]
    expected = networks.predict(pictures)

    def same(images: Any, among: list[Any] = expected) -> None:
        found = networks.predict(images)
        assert len(found) == len(among)
        for one, other in zip(found, among, strict=True):
            # A batch of another size may differ in the last bits.
            assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)

    same(str(pictures[0]), expected[:1])
    same(str(pictures[0].parent))
    same(f"{pictures[0].parent}/*.png")
    same(Image.open(path) for path in pictures)
    same(arrays)
    same(np.stack(arrays))
    same(torch.from_numpy(np.stack(arrays)))
    same(torch.from_numpy(arrays[0]), expected[:1])
    same([pictures[0], arrays[1], Image.open(pictures[2])])
    same([], [])
    logits = networks.logits(arrays)
    assert logits.shape == (2, 3, 10) and networks.logits([]).shape == (2, 0, 10)
    ensemble = logits.double().softmax(-1).mean(0).max(-1)
    assert [one.probabilities[0] for one in expected] == pytest.approx(ensemble.values.tolist())
    alone = networks.predict(arrays, peer="resnet8-1")
    single = logits[1].double().softmax(-1).max(-1)
    assert [one.indices[0] for one in alone] == single.indices.tolist()
    assert [one.probabilities[0] for one in alone] == pytest.approx(single.values.tolist())


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((8, 8, 3)), "values from 0 to 1 become levels by (255 * x).round().clip(0, 255)"),
        (torch.zeros(8, 8, 3), ".to(torch.uint8), normalised ones are not taken"),
        (np.zeros((8, 8, 3), np.int64), "become uint8 by x.astype('uint8')"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "use x.permute(1, 2, 0)"),
        (np.zeros((8, 8), np.uint8), "grey levels become RGB by numpy.stack([x] * 3, -1)"),
        ({"image": 1}, "a dict is not an image: give paths, PIL images, or RGB levels"),
        ("none.png", "none.png: this file or folder does not exist"),
        (["none.png"], "none.png: this file or folder does not exist"),
        ([1], "images[0]: a int is not an image"),
    ],
)
def test_what_is_not_an_image_is_one_error(run: dml_accel.Run, image: Any, said: str) -> None:
    networks = dml_accel.load(run, device="cpu")
    with pytest.raises(UsageError) as refusal:
        networks.predict(image)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    errors: list[str] = []
    assert networks.predict(image, on_error=lambda name, why: errors.append(why)) == []
    assert len(errors) == 1


def test_what_is_loaded(run: dml_accel.Run, pictures: list[Path]) -> None:
    last = dml_accel.load(run, checkpoint="latest", device="cpu")
    assert torch.equal(last.logits(pictures), run.networks(device="cpu").logits(pictures))
    early = run.networks(checkpoint=2, device="cpu")
    assert not torch.equal(early.logits(pictures), last.logits(pictures))
    peer = dml_accel.load(run.path / "peers/resnet8-1", device="cpu")
    assert torch.equal(peer.logits(pictures)[0], last.logits(pictures)[1])
    assert not any(module.training for module in last.modules.values())
    for arguments, said in (
        ({"source": "none"}, "none is not a folder; name a run"),
        ({"source": 3}, "a int names no networks"),
        ({"source": run, "weights": "ema"}, "has no averaged weights"),
        ({"source": run, "weights": "x"}, "--weights is x; it must be one of last, ema, best"),
        ({"source": run, "device": "gpu"}, "device='gpu' is not one of torch"),
    ):
        with pytest.raises(UsageError) as refusal:
            dml_accel.load(**arguments)
        assert said in str(refusal.value)
    with pytest.raises(UsageError, match="peer='x': .* has no such peer; it has resnet8-0"):
        last.predict([], peer="x")


def test_an_evaluation(
    run: dml_accel.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dml_accel.evaluate(run, to=tmp_path / "e", cpu=True)
    assert capsys.readouterr().out == ""
    results = run.results
    assert found.results["ensemble"] == pytest.approx(results["ensemble"])
    assert found.title == "360 images of digits, split test" and found.unread == ()
    assert found.confusion is not None and found.confusion.shape == (10, 10)
    right = np.diag(found.confusion).sum() / found.confusion.to_numpy().sum()
    assert right == pytest.approx(results["ensemble"]["top1"])
    assert {one.name for one in found.path.iterdir()} == {
        *("evaluation.json", "confusion.csv", "confusion.png")
    }
    assert found.results["command"].startswith("dml_accel.evaluate(source=")
    with pytest.raises(UsageError, match="--bad-images is x; it must be one of"):
        dml_accel.evaluate(run, bad_images="x", cpu=True)


def test_an_export(run: dml_accel.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = dml_accel.export(run, peer="best", to=tmp_path / "best")
    assert capsys.readouterr().out == "" and made.folder == tmp_path / "best"
    assert dml_accel.load(made.folder, device="cpu").classes == tuple("0123456789")
    with pytest.raises(UsageError, match="has 2 peers: choose with --peer ensemble, best or"):
        dml_accel.export(run, to=tmp_path / "which")
    with pytest.raises(UsageError, match="--format is x; it must be one of safetensors, onnx"):
        dml_accel.export(run, peer="best", to=tmp_path / "which", format="x")
