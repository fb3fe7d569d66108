"""Trained networks are pushed to a stand-in for the hub, and used from there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from dml_accel import cli
from dml_accel.models.hub import TAG
from tests.helpers import DIGITS, load, train
from tests.hub import TOKEN, Hub, Repository, contents_of, serve, use
from tests.marks import needs_onnx_exporter

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair after a few steps, whose best peer is known."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    words = (*DIGITS, "--cohort", "resnet8*2", "--max-steps", "4", "--val-fraction", "0.1")
    assert train(folder, *words) == 0
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Iterator[Hub]:
    """A stand-in for the hub that this process asks, with a token that may write."""
    with serve(Hub()) as hub:
        use(hub, tmp_path / "hf", monkeypatch)
        yield hub


def push(run: Path, *words: str) -> int:
    return cli.main(["export", str(run), "--push-to", "me/net", *words])


def assert_no_token(hub: Hub, said: str, *folders: Path) -> None:
    """The token is in a header of requests, and nowhere else."""
    files = [one.read_bytes() for folder in folders for one in folder.rglob("*") if one.is_file()]
    bodies = [part for _, path, body in hub.requests for part in (path.encode(), body)]
    assert hub.with_token
    assert not any(TOKEN.encode() in one for one in (*files, *bodies, *hub.objects.values()))
    assert TOKEN not in said


def test_a_peer_is_pushed_and_then_evaluated_predicted_taught_by_and_started_from(
    hub: Hub, run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert push(run, "--peer", "resnet8-0", "--private") == 0
    said = capsys.readouterr().out
    repository = hub.repositories["me/net"]
    sha = repository.find("main")
    assert said.splitlines()[1:] == [
        f"{hub.address}/me/net",
        "a new private repository",
        "the card names no licence: add one (license: ... at the top of README.md)",
    ]
    assert repository.private
    assert len(repository.commits) == 2  # of the hub itself, and one with all files
    assert sorted(repository.files) == [".gitattributes", *FILES]
    folder = run / "peers/resnet8-0"
    assert repository.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not any(path.startswith("/objects/") for _, path in hub.with_token)  # as on storage
    _assert_card(repository, load(run / "results.json"))

    # Evaluated: as the run has been.
    capsys.readouterr()
    words = ["--dataset", "digits", "--cpu", "--to", str(tmp_path / "evaluation")]
    assert cli.main(["evaluate", "hf-hub:me/net", *words]) == 0
    found = load(tmp_path / "evaluation/evaluation.json")
    expected = load(run / "results.json")["peers"][0]["test"]
    assert found["of"] == f"hf-hub:me/net@{sha}"
    assert found["peers"][0]["test"]["top1"] == expected["top1"]
    assert cli.main(["evaluate", "hf-hub:me/net", "--dataset", "digits"]) == 2
    assert "evaluate hf-hub:me/net needs --to" in capsys.readouterr().err

    # Predicted, and exported from there.
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "image.png")
    predicted = []
    for source in (f"hf-hub:me/net@{sha}", str(folder)):
        assert cli.main(["predict", source, str(tmp_path / "image.png"), "--cpu"]) == 0
        predicted.append(json.loads(capsys.readouterr().out))
    assert predicted[0] == predicted[1]
    assert cli.main(["export", "hf-hub:me/net", "--to", str(tmp_path / "copy")]) == 0

    # A teacher, and weights to start from; resumed when the branch has moved to other weights.
    words = [*DIGITS, "--cohort", "resnet8[pretrained=hf-hub:me/net]", "--save-every", "1"]
    words += ["--frozen-peers", "hf-hub:me/net", "--resume", "auto", "--max-steps"]
    assert train(tmp_path / "taught", *words, "1") == 0
    description = load(tmp_path / "taught/config.json")
    sha256 = description["teachers"]["frozen"]["frozen-0"]["sha256"]
    assert description["teachers_on_the_hub"] == {"frozen-0": f"hf-hub:me/net@{sha}"}
    assert description["config"]["frozen_peers"] == ["hf-hub:me/net"]
    assert description["peers"][0]["start"] == {
        "source": f"hf-hub:me/net@{sha}/model.safetensors",
        "sha256": sha256,
        "classes": 10,
    }
    repository.commit(repository.files | {"README.md": b"a new card"})
    assert train(tmp_path / "taught", *words, "2") == 0
    other = (run / "peers/resnet8-1/model.safetensors").read_bytes()
    repository.commit(repository.files | {"model.safetensors": other})
    capsys.readouterr()
    assert train(tmp_path / "taught", *words, "3") == 2
    refused = capsys.readouterr().err
    assert re.search("started with teachers .*use the same flags or a new --output-dir", refused), (
        refused
    )
    assert_no_token(hub, said + refused, tmp_path, run)


def _assert_card(repository: Repository, results: dict) -> None:
    text = repository.files["README.md"].decode()
    card = ModelCard(text).data
    expected = results["peers"][0]["test"]
    found = {one.metric_name: one.metric_value for one in card.eval_results or ()}
    assert found == {
        "Top-1 accuracy": expected["top1"],
        "Top-5 accuracy": expected["top5"],
        "Negative log-likelihood in nats": expected["nll"],
        "Expected calibration error": expected["ece"],
    }
    assert TAG in card.tags
    assert not [key for key in card.to_dict() if key.startswith("license")]
    for part in (
        "together with resnet8-1 by Deep Mutual Learning",
        "trained on `digits`",
        "--max-steps 4",
        "## Intended use and limits",
        'timm.create_model("hf-hub:me/net", pretrained=True)',
    ):
        assert part in text, part
    assert "/tmp" not in text


def test_later_pushes_replace_the_files_of_earlier_ones_and_keep_a_licence(
    hub: Hub, run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert push(run, "--peer", "best") == 0
    repository = hub.repositories["me/net"]
    assert not repository.private
    # The owner adds a licence and a picture; then the ensemble takes the place of the peer.
    licensed = repository.files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    repository.commit(repository.files | {"README.md": licensed, "plots/a.png": b"picture"})
    capsys.readouterr()
    assert push(run, "--peer", "ensemble", "--to", str(tmp_path / "all")) == 0
    said = capsys.readouterr().out
    peers = [f"resnet8-{index}/{name}" for index in (0, 1) for name in FILES]
    assert sorted(repository.files) == [".gitattributes", "README.md", "plots/a.png", *peers]
    assert "model.safetensors" in [*repository.commits.values()][-2]  # the history keeps it
    assert said.startswith(f"{tmp_path / 'all'}: 2 networks")
    assert "config.json, model.safetensors of an earlier export is removed" in said
    assert "the card keeps its licence (license: mit)" in said
    assert ModelCard(repository.files["README.md"].decode()).data.license == "mit"
    words = ["--cohort", "resnet8", "--frozen-peers", "hf-hub:me/net", "--max-steps", "1"]
    assert train(tmp_path / "taught", *DIGITS, *words) == 0
    sha = repository.find("main")
    assert load(tmp_path / "taught/config.json")["teachers_on_the_hub"] == {
        f"frozen-{index}": f"hf-hub:me/net@{sha}/resnet8-{index}" for index in (0, 1)
    }
    assert_no_token(hub, said, tmp_path)


@needs_onnx_exporter
def test_an_onnx_file_takes_the_place_of_a_network(hub: Hub, run: Path, capsys: Captured) -> None:
    assert push(run, "--peer", "resnet8-0") == 0
    assert push(run, "--peer", "resnet8-0", "--format", "onnx") == 0
    files = hub.repositories["me/net"].files
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.onnx"]
    capsys.readouterr()
    assert cli.main(["predict", "hf-hub:me/net", "--cpu", "x.png"]) == 2
    assert "model.onnx is an exported ONNX file" in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused


def _foreign(hub: Hub, run: Path) -> None:
    repository = Repository()
    repository.commit({"README.md": b"x", "pytorch_model.bin": b"x"})
    hub.repositories["me/net"] = repository


def _public(hub: Hub, run: Path) -> None:
    hub.add("me/net", run / "peers/resnet8-0")


def _fails(status: int, part: str):
    def arrange(hub: Hub, run: Path) -> None:
        hub.fails = lambda _, path: status if part in path else None

    return arrange


# By case: what the hub holds or does, further words, the exit code and the message.
REFUSED = {
    "neither": (None, ["--to", ""], 2, "say where to: --to names a folder, --push-to a repository"),
    "name": (None, ["--push-to", "net"], 2, "--push-to net: write owner/name"),
    "foreign": (_foreign, [], 2, "it holds pytorch_model.bin, and its card has no tag dml_accel"),
    "public": (_public, ["--private"], 2, "it is public, and --private does not change that"),
    "unreachable": (_fails(0, "/"), [], 1, r"the hub \(http.*\) cannot be reached"),
    "401": (_fails(401, "/api/models"), [], 2, "the hub does not accept the token: set HF_TOKEN"),
    "403": (_fails(403, "create"), [], 1, "the token may not do that: it needs write access to me"),
    "404": (_fails(404, "/commit/"), [], 1, "the repository is not there any more"),
    "409": (_fails(409, "create"), [], 1, "the repository exists and cannot be read, or is being"),
    "412": (_fails(412, "/commit/"), [], 1, "the repository has been changed meanwhile"),
    "413": (_fails(413, "/objects/batch"), [], 1, "the files are too large for the hub"),
    "429": (_fails(429, "/commit/"), [], 1, "the hub asks to wait, because there were too many"),
    "500": (_fails(500, "/commit/"), [], 1, "the hub fails: try again .*answers 500"),
    "502": (_fails(502, "/api/models"), [], 1, "the hub fails: try again"),
    "dropped": (_fails(0, "/objects/"), [], 1, "the hub fails: try again"),
    "no token": (lambda *_: None, [], 2, "needs a token of the hub that may write: set HF_TOKEN"),
    "folder": (None, ["--to", "full"], 2, "--to full is not empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_the_local_folder_is_kept(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Captured, case: str
) -> None:
    arrange, words, code, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full/of").mkdir(parents=True)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's library tries several times
    if arrange:
        arrange(hub, run)
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    before = {name: one.files for name, one in hub.repositories.items()}
    command = ["export", str(run), "--peer", "resnet8-0"]
    if "--to" not in words:
        words = ["--to", "kept", *words]
    if case == "neither":
        words = []
    elif "--push-to" not in words:
        words = ["--push-to", "me/net", *words]
    assert cli.main([*command, *words]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert re.search(message, said), said
    # Refused before anything is written, or by the hub while it is written to.
    is_written = (tmp_path / "kept").is_dir()
    assert is_written == (code == 1 and case not in ("unreachable", "502"))
    assert is_written == said.endswith("; the files are in kept")
    if is_written:
        assert sorted(contents_of(tmp_path / "kept")) == FILES
    for name, files in before.items():
        assert hub.repositories[name].files == files
    assert TOKEN not in said


def test_what_a_gitignore_of_the_repository_leaves_out_is_named(
    hub: Hub, run: Path, capsys: Captured
) -> None:
    repository = hub.repositories["me/net"] = Repository(ignored={"model.safetensors"})
    repository.commit({".gitignore": b"*.safetensors"})
    assert push(run, "--peer", "resnet8-0") == 1
    assert "the hub has left out model.safetensors; is there" in capsys.readouterr().err


def test_private_alone_is_refused(run: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ["--peer", "resnet8-0", "--to", str(tmp_path / "x"), "--private"]
    assert cli.main(["export", str(run), *words]) == 2
    assert "--private has no effect without --push-to" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
