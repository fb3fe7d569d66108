"""The folder of a trained peer: what is written is read back, by us and by timm."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry, to_rgb
from dml_accel.models.model_card import model_card
from dml_accel.models.peer_folder import CARD, load_network, read_peer, write_peer
from dml_accel.models.spec import PeerSpec
from tests.helpers import load

ODD = os.fsdecode(b"K\xe4fer")  # a folder's name in Latin-1, which is not UTF-8
SQUARE = Geometry(16, 16)
CLASSES = (ODD, "Ameise", "蜂", 'a "b"\n')


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return timm.create_model("resnet8_cifar", num_classes=len(CLASSES)).eval()


def write(
    folder: Path,
    module: torch.nn.Module,
    arch: str = "resnet8_cifar",
    geometry: Geometry = SQUARE,
    **more: int,
) -> Path:
    write_peer(
        folder,
        module,
        PeerSpec("a-0", arch),
        {"top1": 0.5, "n": 1},
        classes=CLASSES,
        normalisation=Normalisation.identity(),
        geometry=geometry,
        dataset=str(folder.parent / ODD),
        steps=1,
        teachers=[],
        **more,
    )
    return folder


def test_a_folder_is_read_back(module: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / ODD).mkdir()
    for bits in (None, 12):
        folder = write(tmp_path / f"peer-{bits}", module, **({"grey_bits": bits} if bits else {}))
        peer = read_peer(folder)
        assert (peer.classes, peer.grey_bits) == (CLASSES, bits)
        assert ("dml_accel" in load(folder / "config.json")) == (bits is not None)
        x = torch.randn(2, 3, 16, 16)
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        for net in (load_network(peer), theirs):
            torch.testing.assert_close(net(x), module(x), rtol=0, atol=0)
        assert r"`K\udce4fer`" in (folder / CARD).read_text(encoding="utf-8")


def test_a_folder_whose_name_is_not_utf_8_is_read_back(
    module: torch.nn.Module, tmp_path: Path
) -> None:
    folder = write(tmp_path / ODD, module)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load_network(read_peer(folder))(x), module(x), rtol=0, atol=0)


def test_levels_of_grey_that_no_image_has_are_refused(
    module: torch.nn.Module, tmp_path: Path
) -> None:
    folder = write(tmp_path / "peer", module, grey_bits=16)
    file = folder / "config.json"
    content = load(file)
    for entry in (7, 17, 12.0, True, "12", [12]):
        file.write_text(json.dumps(content | {"dml_accel": {"grey_bits": entry}}))
        with pytest.raises(UsageError, match="dml_accel.grey_bits is .* from 8 to 16"):
            read_peer(folder)
    for other, found in ((None, None), ({}, None), ({"grey_bits": None}, None)):
        file.write_text(json.dumps(content | {"dml_accel": other}))
        assert read_peer(folder).grey_bits is found


# ---------------------------------------------------------------- how images become inputs

SIZES = [(90, 60), (61, 90), (33, 47), (16, 16), (16, 40), (24, 20), (200, 18), (7, 5)]
GEOMETRIES = [
    SQUARE,
    Geometry(16, 18),
    Geometry(15, 17),
    Geometry(16, 16, "squash"),
    Geometry(16, 19, "squash"),
    Geometry(16, 18, "center", "bicubic"),
]


def photograph(size: tuple[int, int]) -> Image.Image:
    rows = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(rows.astype(np.uint8))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_timm_makes_the_same_pixels_of_photographs_of_any_size(
    module: torch.nn.Module, tmp_path: Path, geometry: Geometry
) -> None:
    folder = write(tmp_path / "peer", module, geometry=geometry)
    assert read_peer(folder).geometry == geometry
    cfg = load(folder / "config.json")["pretrained_cfg"]
    config = resolve_data_config({}, pretrained_cfg=cfg)
    levels = create_transform(**config, normalize=False)
    card = (folder / CARD).read_text(encoding="utf-8")
    onnx = str(
        model_card(
            "x", "x", metrics=None, dataset=None, steps=None, geometry=geometry, usage="onnx"
        )
    )
    prepare = onnx.split("```python")[1].split("config = ")[0]
    known = {}
    exec(prepare.replace("import onnxruntime", ""), known)
    for size in SIZES:
        image = photograph(size)
        ours = to_rgb(image, geometry)
        assert (levels(image).permute(1, 2, 0).numpy() == ours).all(), size
        image.save(tmp_path / "photo.png")
        assert (known["prepare"](tmp_path / "photo.png").transpose(1, 2, 0) == ours).all(), size
    for text in (card, onnx):
        resized = f"{geometry.resize} x {geometry.resize} pixels ({geometry.interpolation})"
        resized = f"squashed or stretched to {resized}"
        if geometry.mode == "center":
            resized = f"its shorter side is resized to {geometry.resize} pixels"
        assert resized in text
        is_cut = geometry.mode == "center" or geometry.resize > geometry.size
        assert (f"the {geometry.size} x {geometry.size} pixels in its centre are" in text) == is_cut


def test_folders_of_earlier_versions_squash_and_those_of_timm_have_its_defaults(
    module: torch.nn.Module, tmp_path: Path
) -> None:
    folder = write(tmp_path / "peer", module)
    file = folder / "config.json"
    content = load(file)

    def read(changed: dict, *without: str) -> Geometry:
        cfg = {k: v for k, v in content["pretrained_cfg"].items() if k not in without} | changed
        file.write_text(json.dumps(content | {"pretrained_cfg": cfg}))
        return read_peer(folder).geometry

    before = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    assert read(before) == Geometry(16, 16, "squash")
    assert read({}, *before) == Geometry(16, 18, "center", "bicubic")
    assert read({"input_size": [3, 224, 224], "crop_pct": 0.95}) == Geometry(224, 235)
    for changed, text in (
        ({"crop_mode": "border"}, "crop_mode 'border' must be one of center, squash"),
        ({"interpolation": "random"}, "interpolation 'random' must be one of nearest,"),
        ({"crop_pct": 1.5}, "crop_pct 1.5 must be above 0 and at most 1"),
        ({"crop_pct": 1e-9}, "at most 8,192 pixels"),
        ({"crop_pct": "all"}, "does not describe a network"),
        ({"crop_mode": ["center"]}, "crop_mode .* must be one of"),
        ({"input_size": [3, 16, 24]}, "three channels of a square"),
        ({"input_size": [1, 16, 16]}, "three channels of a square"),
        ({"input_size": 16}, "does not describe a network"),
    ):
        with pytest.raises(UsageError, match=text):
            read(changed)
