"""Starting from trained weights: where they come from, what is recorded, what is refused."""

import hashlib
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dml_accel import cli
from dml_accel.core.errors import UsageError
from dml_accel.data.sources import Source
from dml_accel.models.build import refuse_twins
from dml_accel.models.pretrained import read_weights
from dml_accel.models.spec import parse_cohort
from dml_accel.training.setup import Checked, refuse_other_files
from tests.helpers import DIGITS, build_peer, load, run_program, tiny_config
from tests.helpers import train as train_command
from tests.hub import serve_hub


def train(folder: Path, *words: str, steps: int = 2) -> int:
    return train_command(folder, *DIGITS, "--max-steps", str(steps), *words)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a resnet8."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(folder, "--cohort", "resnet8") == 0
    return folder


@pytest.fixture
def peer(run: Path, tmp_path: Path) -> Path:
    """A copy of its trained peer's folder."""
    return shutil.copytree(run / "peers" / "resnet8-0", tmp_path / "peer")


def built(text: str, classes: int = 10) -> torch.nn.Module:
    (spec,) = parse_cohort([text])
    assert spec.start is not None
    weights = read_weights(spec.arch, spec.start)
    return build_peer(spec, tiny_config(float64=False), classes, weights=weights)


# ---------------------------------------------------------------- where they come from


def test_a_peers_folder_and_its_weights_file_give_the_same_network(peer: Path) -> None:
    for place in (peer, peer / "model.safetensors"):
        found = built(f"resnet8[pretrained={place}]").state_dict()
        expected = weights_of(peer)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_starts_from_the_weights(peer: Path, tmp_path: Path) -> None:
    # With a learning rate of 0 a run ends with the parameters that it began with.
    words = ("--cohort", f"resnet8[pretrained={peer}]", "--lr", "0")
    assert train(tmp_path / "run", *words) == 0
    found, expected = weights_of(tmp_path / "run/peers/resnet8-0"), weights_of(peer)
    assert all(torch.equal(found[n], t) for n, t in expected.items() if n.endswith("weight"))


def test_a_folder_that_timm_saved_gives_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = timm.create_model("test_vit", num_classes=7, img_size=32, patch_size=8)
    timm.models.save_for_hf(net, tmp_path / "saved", safe_serialization=True)
    text = f"timm:test_vit[img_size=16,patch_size=4,pretrained={tmp_path / 'saved'}]"
    found, original = built(text).state_dict(), net.state_dict()
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(found[name], original[name])
    assert found["patch_embed.proj.weight"].shape[-1] == 4  # resampled
    assert found["head.weight"].shape[0] == 10


def test_each_peer_gets_a_new_classifier_for_other_classes(
    peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cohort", f"resnet8[pretrained={peer}]*2", "--dataset")
    other = tmp_path / "set"
    for split in ("train", "test"):
        for label in "abc":
            (other / split / label).mkdir(parents=True)
            for value in range(4):
                _picture(other / split / label / f"{value}.png", 60 * value)
    assert train(tmp_path / "run", *words, str(other), "--lr", "0", steps=1) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " starts from " in line]
    assert [line.partition(" ")[0] for line in lines] == ["resnet8-0", "resnet8-1"]
    assert all(line.endswith("with a new classifier: 3 classes, not 10") for line in lines)
    one, two = (weights_of(tmp_path / f"run/peers/resnet8-{i}") for i in (0, 1))
    assert torch.equal(one["conv1.weight"], weights_of(peer)["conv1.weight"])
    assert torch.equal(one["conv1.weight"], two["conv1.weight"])
    assert one["fc.weight"].shape == (3, 64)
    assert not torch.equal(one["fc.weight"], two["fc.weight"])


def _picture(path: Path, value: int) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), (value, 9, 7)).save(path)


def test_weights_from_the_hub_are_downloaded_and_then_cached(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub" / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    # A fresh process, because the hub's address is read at import; the second time it is offline.
    script = (
        "from dml_accel.models.pretrained import HUB, read_weights\n"
        "import huggingface_hub.constants\n"
        "for _ in range(2):\n"
        "    found = read_weights('test_resnet', HUB)\n"
        "    print(found.source, found.classes, found.sha256)\n"
        "    huggingface_hub.constants.HF_HUB_OFFLINE = True\n"
    )
    name = "timm/test_resnet.r160_in1k"
    with serve_hub(name, tmp_path / "hub") as address:
        variables = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        command = (sys.executable, "-W", "error", "-c", script)
        done = run_program(*command, HF_ENDPOINT=address, **variables)
    assert done.returncode == 0, done.stderr
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert done.stdout.splitlines() == [f"{name}/{file.name} 1000 {sha256}"] * 2


# ---------------------------------------------------------------- what is recorded


def test_a_peers_folder_does_not_depend_on_the_weights_that_it_started_from(
    peer: Path, tmp_path: Path
) -> None:
    words = ("--cohort", f"resnet8[drop_rate=0.1,pretrained={peer}]")
    assert train(tmp_path / "run", *words) == 0
    folder = tmp_path / "run/peers/resnet8-0"
    assert load(folder / "config.json")["model_args"] == {"drop_rate": 0.1}
    assert str(peer) not in (folder / "config.json").read_text()
    assert "starting from trained weights" in (folder / "README.md").read_text()
    shutil.rmtree(peer)
    timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_resuming_does_not_need_the_original_weights(peer: Path, tmp_path: Path) -> None:
    words = ("--cohort", f"resnet8[pretrained={peer}]", "--save-every", "2")
    assert train(tmp_path / "whole", *words, steps=4) == 0
    assert train(tmp_path / "parts", *words, "--resume", "auto", steps=2) == 0
    before = load(tmp_path / "parts/config.json")["peers"]
    shutil.rmtree(peer)
    assert train(tmp_path / "parts", *words, "--resume", "auto", steps=4) == 0
    assert load(tmp_path / "parts/config.json")["peers"] == before
    assert len(before[0]["start"]["sha256"]) == 64
    parts, whole = (weights_of(tmp_path / one / "peers/resnet8-0") for one in ("parts", "whole"))
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert train(tmp_path / "anew", *words, "--resume", "auto") == 2
    assert not (tmp_path / "anew").exists()


def test_a_comparison_resumes_without_the_original_weights_and_refuses_others(
    peer: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compared(steps: int, seeds: int) -> int:
        words = ["--cohort", f"resnet8[pretrained={peer}]", "resnet8", "--seeds", str(seeds)]
        words += ["--max-steps", str(steps), "--output-dir", str(tmp_path / "all")]
        return cli.main(["compare", *DIGITS, *words])

    assert compared(2, 1) == 0
    kept = peer.rename(tmp_path / "kept")
    assert compared(2, 1) == 0
    kept.rename(peer)
    weights = weights_of(peer)
    weights["fc.bias"] += 1
    save_file(weights, peer / "model.safetensors")
    capsys.readouterr()
    assert compared(2, 2) == 2
    said = capsys.readouterr().err
    assert "resnet8-0 of " in said and "started from other weights than" in said


class _Other:
    """The second of two processes, as ``refuse_other_files`` sees it."""

    rank = 1

    def __init__(self, *first: object) -> None:
        self._first = [json.dumps(one) for one in first]

    def broadcast_text(self, _: str) -> str:
        return self._first.pop(0)

    def failed_rank(self, failed: bool) -> int | None:
        return self.rank if failed else None


def test_processes_must_read_the_same_files(digits: Source) -> None:
    def checked(sha256: str) -> Checked:
        start = {"resnet8-0": {"source": "somewhere", "sha256": sha256}}
        return Checked([], digits, {}, {}, None, start)

    images = digits.fingerprint.record()
    same = [{"resnet8-0": "a"}, {"frozen": {}, "links": None}]
    refuse_other_files(checked("a"), _Other("memory", images, same, {}))
    with pytest.raises(UsageError, match="rank 1 has another source of the registered"):
        refuse_other_files(checked("a"), _Other("memory", images, same, {"target": "b"}))
    with pytest.raises(UsageError, match="rank 1 reads other files than rank 0"):
        refuse_other_files(checked("b"), _Other("memory", images, same))
    with pytest.raises(UsageError, match="--feed auto chooses another feed on rank 1 than on"):
        refuse_other_files(checked("a"), _Other("loader"))
    images["classes"][0] = "zero"
    with pytest.raises(UsageError, match="rank 1 reads other images, labels or class names than"):
        refuse_other_files(checked("a"), _Other("memory", images))


# ---------------------------------------------------------------- what is refused


def _pickled(peer: Path) -> str:
    (peer / "model.safetensors").unlink()
    (peer / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return f"resnet8[pretrained={peer}]"


def _checkpoint(peer: Path) -> str:
    (peer / "net.pth").write_bytes(pickle.dumps({}))
    return f"resnet8[pretrained={peer / 'net.pth'}]"


def _damaged(peer: Path) -> str:
    (peer / "model.safetensors").write_bytes(pickle.dumps({}))
    return f"resnet8[pretrained={peer}]"


def _not_finite(peer: Path) -> str:
    tensors = weights_of(peer)
    tensors["fc.bias"][3] = float("nan")
    save_file(tensors, peer / "model.safetensors")
    return f"resnet8[pretrained={peer}]"


def _empty(peer: Path) -> str:
    save_file({}, peer / "model.safetensors")
    return f"resnet8[pretrained={peer}]"


def _incomplete(peer: Path) -> str:
    tensors = weights_of(peer)
    tensors["other"] = tensors.pop("bn1.weight")
    save_file(tensors, peer / "model.safetensors")
    return f"resnet8[pretrained={peer}]"


def _alone(peer: Path) -> str:
    """Without config.json, only the names and shapes can tell."""
    return f"wrn_16_2[pretrained={(peer / 'model.safetensors').rename(peer / 'x.safetensors')}]"


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "a folder of pickles": (_pickled, "pytorch_model.bin is pickled and could execute code"),
    "a pickle": (_checkpoint, "net.pth is pickled .* safetensors.torch.save_file"),
    "damage": (_damaged, "model.safetensors cannot be read"),
    "no tensors": (_empty, "holds no weights"),
    "numbers": (_not_finite, "fc.bias has values that are not finite"),
    "other names": (_incomplete, r"does not fit resnet8_cifar: .*bn1\.weight"),
    "another network": (
        lambda peer: f"resnet20[pretrained={peer}]",
        "holds the weights of resnet8_cifar, not of resnet20_cifar",
    ),
    "another network's file": (_alone, "x.safetensors does not fit wrn_16_2_cifar: "),
    "nothing": (lambda peer: f"resnet8[pretrained={peer}/x]", "this file or folder does not exist"),
    "nobody": (
        lambda _: "resnet8[pretrained=~no_such_user/x]",
        "pretrained=~no_such_user/x cannot be read: ",
    ),
    "an empty folder": (
        lambda peer: f"resnet8[pretrained={peer.parent}]",
        "is neither a .safetensors file",
    ),
    "ours on the hub": (
        lambda _: "resnet8[pretrained]",
        "there are no weights of resnet8_cifar on the hub",
    ),
    "an unknown tag": (
        lambda _: "timm:test_resnet.best[pretrained]",
        r"no weights of test_resnet.best on the hub \(there are: test_resnet.r160_in1k\)",
    ),
    "the hub is away": (
        lambda _: "timm:test_resnet[pretrained]",
        r"timm/test_resnet.r160_in1k/model.safetensors\) are not cached here, and the hub cannot",
    ),
    "twins": (
        lambda peer: f"resnet8[pretrained={peer}]*2",
        "resnet8-0 and resnet8-1 start with the same weights, .* leave one untrained",
    ),
    "a way around": (
        lambda peer: f"resnet8[checkpoint_path={peer}]",
        "checkpoint_path is not an argument of the network; .* pretrained=FOLDER_OR_FILE",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(
    peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, message = REFUSED[case]
    assert train(tmp_path / "run", "--cohort", make(peer)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_a_weight_that_does_not_fit_is_refused_even_with_a_new_classifier(peer: Path) -> None:
    text = _incomplete(peer)
    with pytest.raises(UsageError, match=r"does not fit resnet8_cifar: .*bn1\.weight"):
        built(text, classes=3)


def test_a_run_folder_in_place_of_a_peer_is_refused_with_its_peers(run: Path) -> None:
    with pytest.raises(UsageError, match=r"it is a run: name one of its peers, .*/resnet8-0$"):
        read_weights("resnet8_cifar", str(run))


def test_forgotten_arguments_are_named(tmp_path: Path) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "depth": 2}
    net = timm.create_model("test_vit", num_classes=10, **arguments)
    folder = tmp_path / "saved"
    timm.models.save_for_hf(net, folder, safe_serialization=True, model_args=arguments)
    text = f"timm:test_vit[img_size=16,patch_size=4,pretrained={tmp_path / 'saved'}]"
    with pytest.raises(UsageError, match=r"it was built with \[.*depth=2.*\]: Error"):
        built(text)


def test_peers_with_the_same_weights_are_refused_but_random_peers_always_differ() -> None:
    specs = parse_cohort(["resnet8*2"])
    refuse_twins({spec.name: build_peer(spec, tiny_config(), 10) for spec in specs})
    net = build_peer(specs[0], tiny_config(), 10)
    with pytest.raises(UsageError, match="a and c start with the same weights"):
        refuse_twins({"a": net, "b": build_peer(specs[1], tiny_config(), 10), "c": net})
