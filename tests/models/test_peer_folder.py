"""The folder of a trained peer: what is written is read back, by us and by timm."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch

from dml_accel.core.errors import UsageError
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.models.peer_folder import CARD, load_network, read_peer, write_peer
from dml_accel.models.spec import PeerSpec
from tests.helpers import load

ODD = os.fsdecode(b"K\xe4fer")  # a folder's name in Latin-1, which is not UTF-8
CLASSES = (ODD, "Ameise", "蜂", 'a "b"\n')


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return timm.create_model("resnet8_cifar", num_classes=len(CLASSES)).eval()


def write(folder: Path, module: torch.nn.Module, arch: str = "resnet8_cifar", **more: int) -> Path:
    write_peer(
        folder,
        module,
        PeerSpec("a-0", arch),
        {"top1": 0.5, "n": 1},
        classes=CLASSES,
        normalisation=Normalisation.identity(),
        geometry=Geometry(16, 16),
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
