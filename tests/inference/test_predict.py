"""Predictions for image files are those that are evaluated; bad files are named and skipped."""

import io
import json
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.inference.load import Networks, read_trained_peers
from dml_accel.inference.predict import find_images, read_image
from dml_accel.models.peer_folder import load_network
from tests.data.test_decode import forged
from tests.helpers import load
from tests.inference.conftest import CPU, PEERS, SIZE, SQUARE

Captured = pytest.CaptureFixture[str]


def predict(capsys: Captured, *words: str) -> tuple[int, list[dict], str]:
    """The exit code, the predictions and what is printed on stderr."""
    capsys.readouterr()
    code = cli.main(["predict", *words, "--cpu"])
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_predictions_are_those_that_are_evaluated(
    run: Path, few: Path, tmp_path: Path, capsys: Captured
) -> None:
    test = few / "set/test"
    for source, peer in ((run, []), (run, ["--peer", "resnet8-1"])):
        of = run / "peers" / peer[1] if peer else source
        words = ["--dataset", str(few / "set"), "--to", str(tmp_path / of.name), "--cpu"]
        assert cli.main(["evaluate", str(of), *words]) == 0
        code, rows, _ = predict(capsys, str(source), str(test), *peer)
        assert code == 0 and len(rows) == len(list(test.iterdir()))
        classes = [Path(one["image"]).parent.name for one in rows]
        ranked = [[p["class"] for p in one["predictions"]] for one in rows]
        metrics = load(tmp_path / of.name / "evaluation.json")["ensemble"]
        top1 = [row[0] == name for row, name in zip(ranked, classes, strict=True)]
        top5 = [name in row for row, name in zip(ranked, classes, strict=True)]
        assert (np.mean(top1), np.mean(top5)) == (metrics["top1"], metrics["top5"])


def test_photographs_are_prepared_as_timm_prepares_them(
    cut: Path, photos: Path, capsys: Captured
) -> None:
    files = sorted(map(str, photos.glob("test/*/*.jpg")))[:4]  # two of them lie on their side
    code, rows, _ = predict(capsys, str(cut / PEERS[0]), *files)
    folder = read_trained_peers(cut).folders[PEERS[0]]
    cfg = load(folder.path / "config.json")["pretrained_cfg"]
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=cfg))
    upright = [ImageOps.exif_transpose(Image.open(file)) for file in files]
    with torch.no_grad():
        x = torch.stack([transform(image) for image in upright])
        expected = load_network(folder)(x).softmax(-1)
    assert code == 0
    for row, posterior in zip(rows, expected, strict=True):
        for one in row["predictions"]:
            assert one["probability"] == pytest.approx(posterior[one["index"]].item(), abs=1e-5)


def test_the_ensemble_is_the_mean_posterior(run: Path, few: Path, capsys: Captured) -> None:
    file = sorted(map(str, (few / "set/test").glob("*/0.png")))[3]
    images = torch.from_numpy(np.asarray(Image.open(file))[None].copy())
    logits = Networks(read_trained_peers(run), CPU).logits(images)
    posterior = logits.double().softmax(-1).mean(0)[0]
    _, (row,), _ = predict(capsys, str(run), file)
    values, indices = posterior.sort(descending=True)
    assert [one["index"] for one in row["predictions"]] == indices[:5].tolist()
    assert [one["probability"] for one in row["predictions"]] == pytest.approx(
        values[:5].tolist(), abs=1e-6
    )


def test_files_folders_globs_and_stdin(
    run: Path, few: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = few / "set/test"
    files = sorted(map(str, test.glob("*/0.png")))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{files[1]}\n\n{files[0]}\n"))
    words = [files[2], f"{test}/*/0.png", "-", str(Path(files[3]).parent)]
    _, rows, _ = predict(capsys, str(run), *words)
    expected = [files[2], *files, files[1], files[0], files[3]]
    assert [one["image"] for one in rows] == expected


def test_a_list_from_windows_names_the_same_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png\r", "caf\udce9.png"):
        (tmp_path / name).touch()
    a, b, cafe = (f"{tmp_path}/{name}" for name in ("a.png", "b.png", "caf\udce9.png"))
    missing: list[str] = []

    def found(text: str) -> list[str]:
        return list(find_images(["-"], io.StringIO(text), lambda name, _: missing.append(name)))

    assert found(f"{a}\r\n\r\n{a}\n{b}\r\n{cafe}\r\n") == [a, a, f"{b}\r", cafe]
    assert found(f"\ufeff{a}\r\n{a}") == [a, a]
    assert not missing and found(f"\ufeff{tmp_path}/x\r\n") == [] and missing == [f"{tmp_path}/x"]


@pytest.mark.parametrize(
    "content",
    [
        "a.png\n".encode("utf-16"),
        "\u732b".encode("utf-16"),
        "a\n".encode("utf-16-be"),
        b"a.png\0b.png\0",
    ],
)
def test_a_list_that_is_no_list_is_refused_in_one_line(content: bytes) -> None:
    lines = io.TextIOWrapper(io.BytesIO(content), errors="surrogateescape")
    with pytest.raises(UsageError, match="UTF-16 or separated by zero bytes; write one name per"):
        list(find_images(["-"], lines, pytest.fail))


def test_formats(run: Path, few: Path, capsys: Captured) -> None:
    file = sorted(map(str, (few / "set/test").glob("*/0.png")))[0]
    _, (row,), _ = predict(capsys, str(run), file)
    best = row["predictions"][0]
    assert cli.main(["predict", str(run), file, "--format", "csv", "--cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image,rank,class,index,probability" and len(lines) == 6
    assert lines[1].split(",")[:4] == [file, "1", best["class"], str(best["index"])]
    assert cli.main(["predict", str(run), file, "--format", "table", "--cpu"]) == 0
    out = capsys.readouterr().out
    assert f"{best['class']} {100 * best['probability']:.1f}%" in out and file in out


# ---------------------------------------------------------------- bad and unusual images


def test_bad_images_are_named_and_skipped(
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
    code, rows, errors = predict(capsys, str(run), str(tmp_path), str(tmp_path / "none.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert code == 1
    assert [Path(one["image"]).name for one in rows] == ["good.png"]
    lines = sorted(line.removeprefix(f"{tmp_path}/") for line in errors.splitlines())
    assert [line.split(":")[0] for line in lines] == sorted([*bad, "none.png"])
    assert "400000000 pixels" in next(line for line in lines if "bomb" in line)
    assert "mode F is unknown" in next(line for line in lines if "float" in line)
    assert "truncated" in next(line for line in lines if line.startswith("truncated"))


def test_no_image_at_all_is_a_usage_error(run: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    for word in (str(tmp_path), str(tmp_path / "*.png"), str(tmp_path / "none.png")):
        code, rows, errors = predict(capsys, str(run), word)
        assert (code, rows) == (2, [])
        assert f"error: there is no image in {word}" in errors
    assert predict(capsys, str(run), "x.png", "--peer", "resnet9-0")[0] == 2
    assert predict(capsys, str(run))[0] == 2


def test_unusual_images_are_read_as_in_training(tmp_path: Path) -> None:
    colour = Image.new("CMYK", (9, 5), (10, 200, 30, 40))
    colour.save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    expected = np.asarray(Image.open(tmp_path / "cmyk.jpg").convert("RGB").resize((SIZE, SIZE)))
    levels, has_more_frames = read_image(str(tmp_path / "cmyk.jpg"), SQUARE)
    assert np.abs(levels.astype(int) - expected).max() <= 1 and not has_more_frames
    Image.fromarray(np.full((6, 6), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(str(tmp_path / "deep.png"), SQUARE)[0] == 100).all()
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert (read_image(str(tmp_path / "dot.png"), SQUARE)[0] == [1, 2, 3]).all()
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (250, 5, 90)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    levels, has_more_frames = read_image(str(tmp_path / "moving.gif"), SQUARE)
    assert (levels == 250).all() and has_more_frames
