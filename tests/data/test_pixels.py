"""Pixels: orientation, levels of 16-bit greys, transparency; worked out by hand."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_accel.core.errors import UsageError
from dml_accel.data import pixels
from dml_accel.inference.predict import read_image
from tests.data.folders import SIZE, read

# A letter F, 8 x 8: white on black. What a camera that was held otherwise stores, and the tag by
# which a viewer turns it upright again.
F = np.zeros((8, 8, 3), np.uint8)
F[1:7, 2] = F[1, 2:6] = F[3, 2:5] = 255
STORED = {
    1: F,
    2: F[:, ::-1],
    3: F[::-1, ::-1],
    4: F[::-1],
    5: F.transpose(1, 0, 2),
    6: F.transpose(1, 0, 2)[::-1],
    7: F.transpose(1, 0, 2)[::-1, ::-1],
    8: F.transpose(1, 0, 2)[:, ::-1],
}


def stored(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(content: bytes, size: int = 8, bits: int | None = None) -> np.ndarray:
    with pixels.bounded_pixels(), pixels.opened(io.BytesIO(content)) as image:
        return pixels.to_rgb(image, pixels.Geometry(size, size, "squash"), bits)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_its_orientation_says(orientation: int, form: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    assert np.array_equal(decoded(stored(image, form, exif=tags, **options)), F)


@pytest.mark.parametrize("tags", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_tags_that_cannot_be_read_turn_nothing(tags: bytes) -> None:
    assert np.array_equal(decoded(stored(Image.fromarray(F), exif=tags)), F)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_ramp_of_grey_keeps_its_levels(bits: int, form: str) -> None:
    most = 2**bits - 1
    ramp = np.linspace(0, most, 16).astype(np.uint16)
    found = decoded(stored(Image.fromarray(np.tile(ramp, (16, 1))), form), 16)
    assert found[0, :, 0].tolist() == [int(level) * 255 // most for level in ramp]
    assert found[0, 0, 0] == 0 and found[0, -1, 0] == 255


def test_all_images_of_a_set_have_one_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = {"train/a": [100, 4000], "train/b": [500], "test/a": [1000], "test/b": [5000]}
    for place, values in levels.items():
        (tmp_path / place).mkdir(parents=True)
        for value in values:
            grey = np.full((SIZE, SIZE), value, np.uint16)
            Image.fromarray(grey).save(tmp_path / place / f"{value}.png")
    for _ in range(2):  # decoded, and from the cache
        found = read(str(tmp_path))
        assert found.grey_bits == 12  # 4000 needs them, and the others have the same scale
        train = {int(level) for level in found.train.images[:, 0, 0, 0]}
        assert train == {value * 255 // 4095 for value in (100, 500, 4000)}
        assert found.test.images[:, 0, 0, 0].tolist() == [1000 * 255 // 4095, 255]
    assert "1 grey images of split 'test' have levels above the 4,095" in capsys.readouterr().err
    alone, _ = read_image(str(tmp_path / "test/a/1000.png"), pixels.Geometry(SIZE, SIZE), 12)
    assert alone[0, 0, 0] == 1000 * 255 // 4095


def test_low_bits_of_wide_colour_are_refused() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    def wide(level: int) -> bytes:
        rows = (b"\0" + struct.pack(">H", level) * 3 * 8) * 8
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(rows))
        return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")

    assert decoded(wide(200 * 257))[0, 0].tolist() == [200] * 3
    with pytest.raises(ValueError, match="low bits of 16-bit colour, of which 8 are kept; store 8"):
        decoded(wide(1023))


def drawing(mode: str) -> Image.Image:
    """Black on transparent, and half transparent red in one corner."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    image.paste((255, 0, 0, 128), (0, 0, 1, 1))
    return image if mode == "RGBA" else image.convert("LA")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_painted_over_white(mode: str) -> None:
    found = decoded(stored(drawing(mode)))
    assert found[3, 3].tolist() == [0, 0, 0]
    assert found[7, 7].tolist() == [255, 255, 255]
    if mode == "RGBA":  # (255, 0, 0) by half over white
        assert found[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_colour_that_means_transparent_is_painted_over_white(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((90, 90, 90), (2, 2, 6, 6))
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    none = {"P": image.getpixel((0, 0)), "L": 0, "RGB": (0, 0, 0)}[mode]
    found = decoded(stored(image, transparency=none))
    assert found[0, 0].tolist() == [255] * 3
    assert found[3, 3].tolist() == [90] * 3


def test_opaque_alpha_changes_nothing() -> None:
    image = Image.fromarray(F)
    image.putalpha(255)
    assert np.array_equal(decoded(stored(image)), F)


# ---------------------------------------------------------------- damage


def test_every_damaged_image_of_both_splits_is_named(tmp_path: Path) -> None:
    for number, place in enumerate(["train/a", "train/b", "test/a", "test/b"]):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(F).save(tmp_path / place / "good.png")
        (tmp_path / place / f"bad-{number}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(UsageError, match="4 images cannot be read: .*bad-0.jpg") as refusal:
        read(str(tmp_path))
    assert "\n" not in str(refusal.value)
    listed = Path(str(refusal.value).rpartition("all are listed in ")[2])
    lines = listed.read_text(encoding="utf-8").splitlines()
    listed.unlink()
    assert [line.partition(":")[0][-9:] for line in lines] == [f"bad-{i}.jpg" for i in range(4)]
    for place in ("train/a", "test/b"):
        (next((tmp_path / place).glob("bad*"))).unlink()
    with pytest.raises(UsageError, match=r"bad-1.jpg .*; .*bad-2.jpg .*; repair or remove them"):
        read(str(tmp_path))
