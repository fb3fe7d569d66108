"""Models of the hub where a folder is named: what is downloaded, cached and refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm

from dml_accel.core.errors import UsageError
from dml_accel.models.hub import is_repository, local_folder, name_of
from dml_accel.models.peer_folder import find_peers, load_network, read_peer
from dml_accel.models.pretrained import read_weights
from tests.hub import TOKEN, Hub, contents_of, serve, use

Patch = pytest.MonkeyPatch
FILES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Iterator[Hub]:
    """A stand-in for the hub that this process asks, without a token."""
    with serve(Hub()) as hub:
        use(hub, tmp_path / "hf", monkeypatch, token=None)
        yield hub


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """What a repository of timm holds: our files, and some that nobody needs."""
    folder = tmp_path / "peer"
    net = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(net, folder, safe_serialization=True)
    for name in ("README.md", ".gitattributes", "pytorch_model.bin", "big/data.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"---\n---\n")
    return folder


@pytest.fixture
def ensemble(peer: Path, tmp_path: Path) -> Path:
    """Two peers and their card."""
    folder = tmp_path / "ensemble"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for file in sorted(FILES):
            (folder / name / file).write_bytes((peer / file).read_bytes())
    (folder / "README.md").write_text("both")
    return folder


def test_paths_stay_paths(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("~/run") == tmp_path / "run"
    assert local_folder("runs/pair") == Path("runs/pair")
    with pytest.raises(UsageError, match="there is no such home directory"):
        local_folder("~no_such_user/run")
    assert name_of(Path("runs/models--a--b/snapshots")) == "runs/models--a--b/snapshots"


def test_a_peer_of_timm_is_downloaded_without_other_files(hub: Hub, peer: Path) -> None:
    sha = hub.add("timm/some.net_in1k", peer).find("main")
    folder = local_folder("hf-hub:timm/some.net_in1k")
    assert set(contents_of(folder)) == FILES
    assert name_of(folder / "a") == f"hf-hub:timm/some.net_in1k@{sha}/a"
    found = read_peer(folder)
    assert (found.arch, found.number_of_classes) == ("test_resnet", 3)
    load_network(found)
    weights = read_weights("test_resnet", "hf-hub:timm/some.net_in1k")
    assert weights.record() == {
        "source": f"hf-hub:timm/some.net_in1k@{sha}/model.safetensors",
        "sha256": found.sha256,
        "classes": 3,
    }


def test_branches_tags_and_commits(hub: Hub, peer: Path) -> None:
    repository = hub.add("me/net", peer)
    first = repository.find("main")
    later = repository.commit(repository.files | {"README.md": b"later"})
    repository.tags["v1"] = first
    cards = {one: local_folder(f"hf-hub:me/net{one}") for one in ("", "@v1", f"@{first}", "@main")}
    names = [name_of(folder).partition("@")[2] for folder in cards.values()]
    assert names == [later, first, first, later]
    assert (cards["@main"] / "README.md").read_text() == "later"
    # What a commit holds does not change: the hub is not asked again.
    hub.requests.clear()
    assert local_folder(f"hf-hub:me/net@{first}") == cards["@v1"]
    assert not hub.requests


def test_a_peer_of_an_ensemble_starts_a_network_by_its_folder(hub: Hub, ensemble: Path) -> None:
    hub.add("me/both", ensemble)
    folder = local_folder("hf-hub:me/both")
    assert [one.name for one in find_peers(folder)] == ["a", "b"]
    with pytest.raises(UsageError, match="it is an ensemble: name one, .*/a$") as error:
        read_weights("test_resnet", "hf-hub:me/both")
    one = str(error.value).rpartition(" ")[2]
    assert read_weights("test_resnet", one).source.endswith("/a/model.safetensors")


# ---------------------------------------------------------------- without the hub


def test_a_cached_copy_is_used_without_the_hub_and_it_is_said(
    hub: Hub, peer: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("me/net", peer)
    folder = local_folder("hf-hub:me/net")
    assert capsys.readouterr().err == ""
    for fails, why in (
        (lambda *_: 0, "the hub cannot be reached"),
        (lambda _, path: 503 if path != "/" else None, r"the hub fails \(.*\)"),
        (lambda _, path: 429 if path != "/" else None, r"the hub fails \(.*\)"),
    ):
        hub.fails = fails
        assert local_folder("hf-hub:me/net") == folder
        said = capsys.readouterr().err
        assert re.fullmatch(f"{why}: using the cached copy {name_of(folder)}\n", said), said
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert local_folder("hf-hub:me/net") == folder
    with pytest.raises(UsageError, match="hf-hub:me/other is not cached here, and HF_HUB_OFFLINE"):
        local_folder("hf-hub:me/other")
    assert not hub.requests
    assert capsys.readouterr().err == ""


def test_a_download_that_was_interrupted_is_no_copy(hub: Hub, ensemble: Path) -> None:
    """Of an ensemble, some networks would otherwise pass for all of them."""
    repository = hub.add("me/both", ensemble)
    hub.fails = lambda _, path: 404 if path.endswith("b/model.safetensors") else None
    with pytest.raises(UsageError):
        local_folder("hf-hub:me/both")
    hub.fails = lambda *_: 0
    for revision in ("", f"@{repository.find('main')}"):
        with pytest.raises(UsageError, match="not cached here, and the hub cannot be reached"):
            local_folder(f"hf-hub:me/both{revision}")
    hub.fails = lambda *_: None
    assert len(find_peers(local_folder("hf-hub:me/both"))) == 2


# ---------------------------------------------------------------- what is refused


def test_names_of_repositories() -> None:
    assert all(map(is_repository, ("a/b", "Some-One/a.b_c", "timm/resnet18.a1_in1k")))
    wrong = (
        "",
        "a",
        "a/b/c",
        "a/",
        "/b",
        "../b",
        "a/..",
        "-a/b",
        "a/b.",
        "a--b/c",
        "a/b.git",
        "a/ä",
    )
    assert not any(map(is_repository, wrong))


REFUSED = {
    "name": ("hf-hub:net", "write hf-hub:owner/name, or hf-hub:owner/name@revision"),
    "path": ("hf-hub:me/net/../x", "write hf-hub:owner/name"),
    "revision": ("hf-hub:me/net@../../x", "the revision after @ must be a branch, a tag or a"),
    "no revision": ("hf-hub:me/net@v7", "it has no revision v7: name a branch, a tag or a commit"),
    "missing": (
        "hf-hub:me/nets",
        r"no such model that can be read; check the name \(it may be private: set HF_TOKEN to a "
        r"token, or run: hf auth login\)",
    ),
    "private": ("hf-hub:me/private", "no such model that can be read; .*it may be private"),
    "pickled": ("hf-hub:me/pickled", "pytorch_model.bin is pickled and could execute code"),
    "onnx": ("hf-hub:me/onnx", "model.onnx is an exported ONNX file, which onnxruntime runs"),
    "large": ("hf-hub:me/large", "config.json has 16,777,217 bytes, more than the allowed 16,"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(hub: Hub, peer: Path, tmp_path: Path, case: str) -> None:
    hub.add("me/net", peer)
    hub.add("me/private", peer, private=True)
    (tmp_path / "empty").mkdir()
    for name, content in (
        ("pickled", {"pytorch_model.bin": b"", "config.json": b"{}"}),
        ("onnx", {"model.onnx": b"", "config.json": b"{}"}),
        ("large", {"model.safetensors": b"", "config.json": bytes(2**24 + 1)}),
    ):
        hub.add(f"me/{name}", tmp_path / "empty").commit(content)
    text, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as error:
        local_folder(text)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)
    assert not any("resolve" in path for _, path, _ in hub.requests)


def test_a_token_reads_what_is_private_and_is_written_nowhere(
    hub: Hub, peer: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    hub.add("me/private", peer, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read_peer(local_folder("hf-hub:me/private")).arch == "test_resnet"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UsageError, match="the token that is set may not read it") as error:
        local_folder("hf-hub:me/private")
    assert "hf_wrong" not in str(error.value)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in one for one in written)


def test_untrusted_content_is_read_as_that_of_a_folder(hub: Hub, peer: Path) -> None:
    config = json.loads((peer / "config.json").read_text())
    config["model_args"] = {"checkpoint_path": "/etc/passwd"}
    hub.add("me/net", peer).commit(contents_of(peer) | {"config.json": json.dumps(config).encode()})
    with pytest.raises(UsageError, match="'checkpoint_path' would make timm open other files"):
        read_peer(local_folder("hf-hub:me/net"))
