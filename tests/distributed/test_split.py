"""Split runs as users start them: what is written, what is printed, how they end."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers import accelerate_launch, in_turn, load, train

SMALL = "--dataset digits --image-size 8 --batch-size 9 --lr 0.001".split()
WRITTEN = [*SMALL, "--cohort", "wrn_16_2", "resnet8*2", "--float64", "--max-steps", "4"]
WRITTEN += ["--placement", "split", "--val-fraction", "0.1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two processes that run one command after another: the folder, and how they went."""
    folder = tmp_path_factory.mktemp("split")
    lost = "--cohort resnet8 wrn_16_2 --placement split --lr 1e30 --max-nonfinite 3".split()
    done, found = in_turn(
        accelerate_launch(2),
        folder,
        {
            "two ": WRITTEN,  # a name that ends in a space is another folder
            "auto": [*SMALL, "--cohort", "resnet8*2", "--max-steps", "1"],
            "lost": [*SMALL, *lost],  # last: after it the processes have to end
        },
    )
    assert done.returncode != 0 and len(found) == 2
    for rank in found:
        assert (rank["two "]["code"], rank["auto"]["code"]) == (0, 0), done.stderr[-2000:]
    return folder, found


def said(folder: Path, name: str, start: str) -> list[str]:
    """The lines of all processes in a run that begin so."""
    files = (folder / f"{name}.{rank}.err" for rank in (0, 1))
    lines = (line for file in files for line in file.read_text().splitlines())
    return [line for line in lines if line.startswith(start)]


def test_a_split_run_writes_what_one_process_writes(
    runs: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folders = {"one": tmp_path / "one", "two": runs[0] / "two "}
    assert train(folders["one"], *WRITTEN) == 0
    one, two = (load(folder / "results.json") for folder in folders.values())
    assert one["placement"]["kind"] == "replicate"
    ranks = {"wrn_16_2-0": [0], "resnet8-0": [1], "resnet8-1": [1]}
    assert two["placement"] == {"kind": "split", "ranks": ranks}
    assert load(folders["two"] / "config.json")["config"]["placement"] == "split"
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders.values()
    ]
    assert files[0] == files[1]
    for peer, other in zip(one["peers"], two["peers"], strict=True):
        for part in ("test", "val"):
            assert peer[part]["top1"] == other[part]["top1"]
            assert peer[part]["nll"] == pytest.approx(other[part]["nll"], rel=1e-9)
        assert (peer["name"], peer["params"]) == (other["name"], other["params"])
        weights, others = (
            load_file(folder / "peers" / peer["name"] / "model.safetensors")
            for folder in folders.values()
        )
        for key, value in weights.items():
            assert (value.double() - others[key].double()).abs().max() < 1e-9, key
    assert one["ensemble"]["nll"] == pytest.approx(two["ensemble"]["nll"], rel=1e-9)


def test_auto_prints_its_choice_and_the_reason(runs: tuple[Path, list[Any]]) -> None:
    folder, _ = runs
    found = load(folder / "auto/results.json")["placement"]
    (line,) = said(folder, "auto", "placement: ")
    assert line.startswith(f"placement: {found['kind']}, ") and "per step predicted" in line
    assert f"Placement {found['kind']}: " in (folder / "auto/results.md").read_text()


def test_a_peer_that_stays_not_finite_ends_every_process_with_its_name(
    runs: tuple[Path, list[Any]],
) -> None:
    folder, found = runs
    assert not any("lost" in rank for rank in found)  # no process has outlived it
    (line,) = said(folder, "lost", "error: ")
    reason = "was not finite, or its cross-entropy above 230, for 3 steps in a row"  # 100 ln 10
    assert re.match(rf"error: the loss of (resnet8|wrn_16_2)-0 {reason}", line)
    assert "--max-nonfinite 3" in line
    assert '"skipped"' in (folder / "lost" / "metrics.jsonl").read_text()
