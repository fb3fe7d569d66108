"""A trained run that all tests of inference share, and some test images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from dml_accel.data import sources
from dml_accel.data.pixels import Geometry
from dml_accel.inference.load import Networks, read_trained_peers
from tests.helpers import load, real_dataset, tiny_config, train

SIZE, FEW = 16, 300
SQUARE, CUT = Geometry(SIZE, SIZE), Geometry(SIZE, SIZE + 3)
PEERS = ["resnet8-0", "resnet8-1", "test_resnet-0"]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps: a pair of ours, and one network that timm has itself."""
    folder = tmp_path_factory.mktemp("inference") / "run"
    words = ["--dataset", real_dataset(), "--image-size", str(SIZE), "--max-steps", "8", "--cpu"]
    words += ["--train-limit", "400", "--val-fraction", "0.1", "--batch-size", "16", "--lr", "0.05"]
    assert train(folder, *words, "--cohort", "resnet8*2", "timm:test_resnet") == 0
    return folder


@pytest.fixture(scope="session")
def photos(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of each class, of several sizes; every third is stored on its side."""
    folder = tmp_path_factory.mktemp("photos")
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    for number, file in enumerate(sorted((few / "set/test").glob("*/0.png"))):
        to = folder / "set/test" / file.parent.name
        to.mkdir(parents=True)
        for copy in (0, 1):
            image = Image.open(file).resize((60 + number, 90 - 40 * copy))
            more = {"exif": sideways} if number % 3 == 0 else {}
            image.save(to / f"{copy}.jpg", **more)
    return folder / "set"


@pytest.fixture(scope="session")
def cut(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peers of the run, as if their images had been cut out of somewhat larger ones."""
    copy = shutil.copytree(run / "peers", tmp_path_factory.mktemp("cut") / "peers")
    for file in copy.glob("*/config.json"):
        config = load(file)
        config["pretrained_cfg"]["crop_pct"] = CUT.crop_pct
        file.write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="session")
def few(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some test images, as levels and labels, and one of each class as a file in its folder."""
    folder = tmp_path_factory.mktemp("few")
    split, classes, _ = sources.read_test(tiny_config(dataset=real_dataset()).data, SQUARE)
    np.savez(folder / "few.npz", images=split.held[:FEW].numpy(), labels=split.labels[:FEW])
    for label, name in enumerate(classes):
        place = int((split.labels == label).nonzero()[0])
        (folder / "set/test" / name).mkdir(parents=True)
        Image.fromarray(split.held[place].numpy()).save(folder / "set/test" / name / "0.png")
    return folder


def logits_of(folder: Path, few: Path) -> torch.Tensor:
    """The logits of a peer, or of all peers of a run, as our code computes them, [K, N, C]."""
    networks = Networks(read_trained_peers(folder), CPU)
    return networks.logits(torch.from_numpy(np.load(few / "few.npz")["images"]))
