"""Photographs: the size that is chosen for them, and a run from training to export."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from dml_accel import cli
from dml_accel.data import sources
from dml_accel.training.setup import list_and_size
from tests.data.test_loader import picture
from tests.helpers import load, real_dataset, tiny_config, train

FEW = "--cohort resnet8 --batch-size 4 --lr 0.05 --cpu --threads 1 --workers 0".split()
CLASSES, SIZE = 3, 128


def larger(root: Path, sides: tuple[int, int]) -> Path:
    """Two classes of pictures of one size."""
    for side in ("train", "test"):
        for label in "ab":
            (root / side / label).mkdir(parents=True)
            for number in range(4):
                image = picture(number + 10 * (label == "b")).resize(sides)
                image.save(root / side / label / f"{number}.jpg")
    return root


SIZES = {
    "small": ((64, 48), ["resnet8"], 32),
    "small, of pretrained networks": ((64, 48), ["timm:test_resnet[pretrained]"], 32),
    "photographs": ((65, 100), ["resnet8"], 224),
    "photographs, of pretrained networks": ((65, 100), ["timm:test_vit[pretrained]"], 160),
    "photographs, of trained and others": (
        (65, 100),
        ["resnet8", "timm:test_vit[pretrained]", "timm:resnet18[pretrained]"],
        224,
    ),
    "photographs, of networks that are not": ((65, 100), ["timm:test_vit"], 224),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_size_follows_from_the_images_and_the_networks(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sides, cohort, size = SIZES[case]
    photos = larger(tmp_path / "photos", sides)
    config = tiny_config(cohort=tuple(cohort), dataset=str(photos), image_size=None)
    assert list_and_size(config, [cohort], quiet=False)[0].data.image_size == size
    assert (f"--image-size {size}, as " in capsys.readouterr().err) == (size > 32)
    given = config.changed(image_size=40)
    assert list_and_size(given, [cohort], quiet=False)[0] == given


@pytest.mark.parametrize("sides", [(40, 30), (100, 80)])
def test_the_size_is_recorded_and_a_run_resumes_without_naming_it(
    tmp_path: Path, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PHOTOGRAPH_SIZE", 24)
    run, photos = tmp_path / "run", larger(tmp_path / "photos", sides)
    words = [*FEW, "--dataset", str(photos), "--feed", "loader", "--resume", "auto"]
    size = 32 if sides == (40, 30) else 24
    for steps, more in (("1", []), ("2", []), ("3", ["--image-size", str(size)])):
        assert train(run, *words, "--max-steps", steps, *more) == 0
        assert load(run / "config.json")["config"]["image_size"] == size
    assert load(run / "results.json")["steps"] == 3
    assert train(run, *words, "--max-steps", "4", "--image-size", "16") == 2


# ---------------------------------------------------------------- from training to export


def real_images() -> tuple[Callable[[int], Image.Image], torch.Tensor]:
    """Real images by row, and their labels; none is decoded before it is wanted."""
    data = tiny_config(dataset=real_dataset()).data
    listed = sources.list_images(data, quiet=True)
    if listed is None:
        split = sources.read(data).test
        return lambda row: Image.fromarray(split.held[row].numpy()), split.labels
    listing = listed.splits["test"]
    return lambda row: Image.open(io.BytesIO(listing.content(row))), listing.labels


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images as JPEGs of 100 to 260 pixels: three classes in class folders."""
    root, draw = tmp_path_factory.mktemp("real"), random.Random(1)
    images, labels = real_images()
    for label in range(CLASSES):
        rows = (labels == label).nonzero()[:12, 0].tolist()
        for number, row in enumerate(rows):
            folder = root / ("test" if number < 3 else "train") / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            sides = (draw.randint(100, 260), draw.randint(100, 260))
            image = images(row).resize(sides, Image.Resampling.BICUBIC)
            image.save(folder / f"{number:02}.jpg")
    return root


def test_photographs_are_trained_on_evaluated_predicted_and_exported(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = "--cohort timm:test_resnet timm:test_efficientnet --image-size 128 --max-steps 6 --cpu"
    words += " --batch-size 8 --lr 0.05 --feed loader --workers 1 --threads 1"
    words += " --augment random-resized-crop flip --dataset"
    assert train(run, *words.split(), str(real)) == 0
    results = load(run / "results.json")
    assert results["ensemble"]["n"] == 3 * CLASSES and results["steps"] == 6
    # In memory the same images have the same metrics.
    assert cli.main(["evaluate", str(run), "--cpu", "--to", str(tmp_path / "evaluated")]) == 0
    metrics = load(tmp_path / "evaluated/evaluation.json")
    assert metrics["ensemble"]["n"] == 3 * CLASSES
    assert metrics["ensemble"]["top1"] == results["ensemble"]["top1"]
    assert metrics["ensemble"]["nll"] == pytest.approx(results["ensemble"]["nll"], rel=1e-4)
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(real / "test"), "--cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [row["predictions"][0]["class"] == Path(row["image"]).parent.name for row in rows]
    assert sum(right) / len(right) == metrics["ensemble"]["top1"]
    # timm alone prepares the files and predicts as we do.
    to = tmp_path / "exported"
    words = f"export {run} --peer test_resnet-0 --to {to}"
    assert cli.main([*words.split()]) == 0
    net = timm.create_model(f"local-dir:{to}", pretrained=True).eval()
    assert net.pretrained_cfg["input_size"] == [3, SIZE, SIZE]
    assert net.pretrained_cfg["crop_pct"] == pytest.approx(0.875, abs=0.005)
    transform = create_transform(**resolve_data_config({}, model=net))
    capsys.readouterr()
    files = sorted(map(str, (real / "test").glob("*/*.jpg")))[:4]
    assert cli.main(["predict", str(to), *files, "--cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with torch.no_grad():
        expected = net(torch.stack([transform(Image.open(file)) for file in files])).softmax(-1)
    for row, posterior in zip(rows, expected, strict=True):
        for one in row["predictions"]:
            assert one["probability"] == pytest.approx(posterior[one["index"]].item(), abs=1e-5)
