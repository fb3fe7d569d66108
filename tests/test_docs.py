"""The documentation: commands are parsed or run, Python blocks run, paths and links exist."""

import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dml_accel import cli
from dml_accel.cli import parser
from dml_accel.core.config import Config, flag_types
from dml_accel.models.spec import parse_cohort
from tests.marks import needs_onnx_exporter

ROOT = Path(__file__).parent.parent
PACKAGES = "core data models distributed mutual training inference analysis api cli".split()
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md"),
    "benchmarks/compare/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
EXAMPLE = "### Worked example"  # of CONTRIBUTING.md: adds a flag and a file, which it then names


def section(page: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one of its level."""
    _, found, rest = TEXTS[page].partition(f"\n{heading}")
    assert found, f"{page} has no {heading}"
    level = heading.partition(" ")[0]
    return rest.partition(f"\n{level} ")[0]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.S | re.M)


def block(page: str, word: str) -> str:
    """Return the one block of Python of a page that holds a word."""
    (found,) = [one for one in python_blocks(page) if word in one]
    return found


def lines_of_code(text: str) -> list[str]:
    """Return the lines of shell in a text: fenced, indented by four or more, or inline."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    indented = re.findall(r"^ {4,}(\S.*)$", prose, re.M)
    inline = [code for code in re.findall(r"(?<!`)`([^`\n]+)`", prose) if " --" in code]
    return [line for one in fenced for line in one.splitlines() if line] + indented + inline


def arguments(line: str) -> list[str] | None:
    """Return the arguments that our command line receives; None if the line starts none of it."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # not a command: an apostrophe in a listing
        return None
    words = words[len(words) - words[::-1].index("|") :] if "|" in words else words
    if not words or "..." in words:
        return None
    if words[0] == "dml-accel":
        return words[1:]
    if words[0] == "train.py" and any(word.startswith("--") for word in words):
        return ["train", *words[1:]]
    if words[:2] == ["sbatch", "launch/slurm.sh"]:
        return ["train", *words[3:]]
    if words[0] in ("python", "accelerate", "torchrun"):
        if "train.py" in words:
            return ["train", *words[words.index("train.py") + 1 :]]
        if "dml_accel" in words:
            return words[words.index("dml_accel") + 1 :]
    return None


def commands(page: str) -> list[list[str]]:
    """Return the arguments of all commands of ours on a page."""
    text = TEXTS[page].partition(EXAMPLE)[0]
    return [found for line in lines_of_code(text) if (found := arguments(line))]


def train_briefly(words: list[str]) -> None:
    assert words[0] == "train"
    assert cli.main([*words, "--max-steps", "2", "--cpu"]) == 0


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page: str) -> None:
    for words in commands(page):
        if "--help" in words:
            with pytest.raises(SystemExit, match="0"):
                parser.parse(words)
            continue
        values = parser.parse(words)
        if words[0] in ("train", "compare", "plan"):
            config = Config(**{n: v for n, v in values.items() if n in flag_types()})
            assert parse_cohort(config.cohort), words


def test_commands_are_found_in_every_form() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 70
    for line, words in (
        ("accelerate launch --num_processes 2 -m dml_accel train --cohort 2", "train --cohort 2"),
        ("find x | dml-accel predict runs/x -   # stdin", "predict runs/x -"),
        ("torchrun --nproc_per_node 2 train.py --cohort 4", "train --cohort 4"),
        ("sbatch launch/slurm.sh FOLDER --cohort 4", "train --cohort 4"),
        ("python -m benchmarks.speed --write", None),
    ):
        assert arguments(line) == (words and words.split())
    assert lines_of_code("a `x --y` b\n\n    z 1\n\n```bash\nc # d\n```\n") == [
        "c # d",
        "z 1",
        "x --y",
    ]


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    plans = [words for words in commands("docs/distributed.md") if words[0] == "plan"]
    assert len(plans) == 2
    for words in plans:
        assert cli.main(words) == 0
        assert "--placement auto: " in capsys.readouterr().out


@needs_onnx_exporter
def test_photographs_are_used_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"photos/train/{one}/{n}.jpg" for one in ("cat", "dog") for n in range(36)]
    names += ["photos/test/cat/1.jpg", "photos/test/dog/2.jpg", "new/a.jpg", "more/deep/b.jpg"]
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (3 * number, 100, 0)).save(name)
    shown = lines_of_code(section("README.md", "## Your own photographs"))
    check, train, *others = [arguments(line) or [] for line in shown][:6]
    assert check[0] == "check-data" and cli.main(check) == 0
    train_briefly(train)
    assert [words[0] for words in others] == ["evaluate", "predict", "export", "export"]
    for words in others:
        assert cli.main(words) == 0, words
    said = capsys.readouterr().out
    assert "new/a.jpg" in said and "more/deep/b.jpg" in said
    assert Path("exported/best/model.safetensors").exists()
    assert Path("exported/ensemble/model.onnx").exists()


@needs_onnx_exporter
def test_trained_networks_are_used_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (train,) = [words for words in commands("docs/inference.md") if words[0] == "train"]
    train_briefly(train)
    for name in ("photo.png", "folder/a.png", "more/deep/b.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "green").save(name)
    shown = lines_of_code(section("docs/inference.md", "## Commands"))
    used = [line for line in shown if "dml-accel " in line]
    assert len(used) == 6
    for line in used:
        if " | " in line:
            monkeypatch.setattr("sys.stdin", io.StringIO("folder/a.png\n"))
        assert cli.main(arguments(line)) == 0, line
    said = capsys.readouterr().out
    assert all(name in said for name in ("photo.png", "folder/a.png", "more/deep/b.jpg"))
    assert Path("measured/confusion.png").exists()
    assert Path("exported/best/model.safetensors").exists()
    assert Path("exported/ensemble/model.onnx").exists()


# ---------------------------------------------------------------- Python


def test_every_python_block_is_run() -> None:
    # Here, but for that of Fashion-MNIST, which tests/data/test_sources.py runs.
    counts = {page: len(python_blocks(page)) for page in PAGES}
    assert {page: n for page, n in counts.items() if n} == {
        "README.md": 1,
        "docs/inference.md": 1,
        "docs/python.md": 5,
        "docs/training.md": 2,
    }


def test_a_trained_peer_is_loaded_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--cohort resnet8 --dataset digits --image-size 16 --batch-size 8 --max-steps 1 --cpu"
    assert cli.main(["train", *words.split(), "--output-dir", "runs/x"]) == 0
    names: dict = {}
    exec(block("docs/inference.md", "local-dir:"), names)
    assert not names["net"].training and names["net"].num_classes == 10


def test_your_own_network_is_trained_and_loaded_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(block("docs/training.md", "register_model"))
    mine = importlib.import_module("mine")
    words = "--cohort timm:pebble resnet8 --dataset digits --image-size 16 --batch-size 16 --cpu"
    words = ["train", *words.split(), "--max-steps", "2", "--output-dir", "runs/mine"]
    assert mine.dml_accel.cli.main(words) == 0
    folder = tmp_path / "runs/mine/peers/pebble-0"
    net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert mine.dml_accel.cli.main(["evaluate", "runs/mine", "--cpu"]) == 0


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_modules_are_trained_as_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block(page, "dml_accel.learn("), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    # Two small networks recognise most digits after five epochs.
    assert names["record"].test["ensemble"]["top1"] > 0.85
    assert list(tmp_path.iterdir()) == []


def test_the_commands_are_called_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block("docs/python.md", "dml_accel.train("), names)
    assert "('resnet8-0', 'resnet8-1')" in capsys.readouterr().out
    assert names["run"].results["ensemble"]["top1"] > 0.5
    assert {"run", "evaluated", "exported"} == {path.name for path in tmp_path.iterdir()}


def test_config_and_loss_are_used_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("docs/python.md", "assert config.optim.lr"), {})
    names: dict = {}
    exec(block("docs/python.md", "mutual_loss("), names)
    assert all(net.weight.grad.abs().sum() > 0 for net in names["nets"])
    assert capsys.readouterr().out.count("tensor(") == 2


@pytest.mark.usefixtures("registry")
def test_methods_of_your_own_are_compared_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Another name than above, as imports are kept.
    (tmp_path / "methods_of_mine.py").write_text(block("docs/python.md", "register_divergence("))
    mine = importlib.import_module("methods_of_mine")
    words = "compare --methods hellinger brier largest mine --cohort resnet8*2 --dataset digits"
    words += " --image-size 8 --batch-size 8 --max-steps 1 --seeds 1 --cpu --output-dir runs"
    assert mine.cli.main(words.split()) == 0
    assert "Hellinger at 2" in Path("runs/results.md").read_text()


def test_the_worked_example_works(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dml_accel", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    example = section("CONTRIBUTING.md", EXAMPLE)
    diffs = re.findall(r"^```diff\n(.*?)^```", example, re.S | re.M)
    assert len(diffs) == 4
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    run: dict = {"cwd": tmp_path, "text": True, "capture_output": True, "env": environment}
    done = subprocess.run("git apply -".split(), input="".join(diffs), **run)
    assert done.returncode == 0, done.stderr
    words = [sys.executable, *"-m pytest -q --noconftest tests/mutual/test_hellinger.py".split()]
    done = subprocess.run(words, **run)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]
    divergences = tmp_path / "dml_accel/mutual/divergences.py"
    right = divergences.read_text()
    divergences.write_text(right.replace("log_q.div(2).exp()", "log_q.exp()"))
    done = subprocess.run(words, **run)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]
    divergences.write_text(right)
    (line,) = [line for line in lines_of_code(example) if line.startswith("python train.py")]
    command = [sys.executable, "-m", "dml_accel", *(arguments(line) or []), "--cpu"]
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------- paths, links, sizes


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_and_modules_exist(page: str) -> None:
    text = TEXTS[page].partition(EXAMPLE)[0]
    ours = rf"(?:dml_accel|tests|benchmarks|docs|launch|{'|'.join(PACKAGES)})/"
    endings = r"(?:py|sh|md|yaml|svg|png|json)"
    for name in re.findall(rf"(?<![\w/.-]){ours}[\w/.-]*\.{endings}\b", text):
        found = ROOT / "dml_accel" / name if name.split("/")[0] in PACKAGES else ROOT / name
        assert found.exists(), name
    for name in re.findall(r"-m ((?:tests|benchmarks)[\w.]*)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_the_file_tree_is_that_of_the_package() -> None:
    shown, package = [], ""
    for line in section("docs/architecture.md", "## Files").splitlines():
        if head := re.match(r" {4}(\w+)/( |$)", line):
            package = head[1]
        elif one := re.match(r" {6}([\w/.]+\.\w+) {2,}\S", line):
            shown.append(f"{package}/{one[1]}")
    files = [
        path for path in (ROOT / "dml_accel").glob("*/**/*") if path.suffix not in ("", ".pyc")
    ]
    there = {str(path.relative_to(ROOT / "dml_accel")) for path in files}
    assert set(shown) == {name for name in there if not name.endswith("__init__.py")}
    for package in {name.split("/")[0] for name in shown}:
        text = (ROOT / "dml_accel" / package / "__init__.py").read_text()
        order = [f"{package}/{name}.py" for name in re.findall(r"^ {4}(\w+) {2,}\S", text, re.M)]
        assert order == [name for name in shown if re.match(rf"{package}/\w+\.py$", name)]
