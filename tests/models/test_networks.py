"""Networks: parameter counts against the literature, shapes, use through timm, what is refused."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

import dml_accel  # noqa: F401  (registers the networks)
from dml_accel.core.errors import UsageError
from dml_accel.data.batches import Normalisation
from dml_accel.data.pixels import Geometry
from dml_accel.data.sources import Source
from dml_accel.data.splits import Split
from dml_accel.distributed import compile
from dml_accel.models.build import build, parameter_count
from dml_accel.models.peer_folder import load_network, read_peer, write_network
from dml_accel.models.pretrained import build_pretrained, read_weights
from dml_accel.models.spec import SHORT_NAMES, parse_cohort
from dml_accel.training.setup import image_format
from tests import viewing  # noqa: F401  (registers it)
from tests.helpers import ROOT, Training, assert_same_state, build_peer, tiny_config

# name: parameters with 100 classes. ResNets: He et al. 2016 (0.27M, 0.46M, 0.85M, 1.7M with 10
# classes; a head of 100 adds 5,850). MobileNet 3.3M and WRN-28-10 36.5M: the paper's table 1.
# Zagoruyko and Komodakis give 0.2M, 0.7M, 17.1M, 0.6M and 2.2M for the other wide ResNets. The
# ResNets x4 and resnet18 with a stem for CIFAR: the code of CRD, and of pytorch-cifar.
LITERATURE = {
    "resnet20": 269_722 + 5_850,
    "resnet32": 464_154 + 5_850,
    "resnet56": 853_018 + 5_850,
    "resnet110": 1_727_962 + 5_850,
    "mobilenet": 3_309_476,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_16_10": 17_174_324,
    "wrn_28_10": 36_536_884,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
}


def meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **({"num_classes": 100} | arguments))


@pytest.mark.parametrize("name", LITERATURE)
def test_parameter_counts_equal_the_literature(name: str) -> None:
    assert parameter_count(meta(f"{name}_cifar")) == LITERATURE[name]


def test_resnet8_count_by_hand() -> None:
    def convolution(width_in: int, width: int) -> int:
        return 9 * width_in * width + 2 * width  # with its batch norm

    stem = convolution(3, 16)
    blocks = convolution(16, 16) * 2
    blocks += convolution(16, 32) + convolution(32, 32)
    blocks += convolution(32, 64) + convolution(64, 64)
    assert parameter_count(meta("resnet8_cifar")) == stem + blocks + 64 * 100 + 100


def test_resnet8x4_by_hand() -> None:
    def convolution(width_in: int, width: int, kernel: int = 3) -> int:
        return kernel * kernel * width_in * width + 2 * width  # with its batch norm

    count = convolution(3, 32)
    for width_in, width in ((32, 64), (64, 128), (128, 256)):
        count += convolution(width_in, width) + convolution(width, width)
        count += convolution(width_in, width, 1)  # the shortcut
    assert parameter_count(meta("resnet8x4_cifar")) == count + 256 * 100 + 100
    strides = [m.stride for m in meta("resnet8x4_cifar").modules() if isinstance(m, nn.Conv2d)]
    first, *rest = [stride[0] for stride in strides]
    assert first == 1 and rest == [1, 1, 1, 2, 1, 2, 2, 1, 2]


def test_inception_count_by_hand() -> None:
    # Szegedy et al., table 1: input, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
    table = [
        (192, 64, 96, 128, 16, 32, 32),
        (256, 128, 128, 192, 32, 96, 64),
        (480, 192, 96, 208, 16, 48, 64),
        (512, 160, 112, 224, 24, 64, 64),
        (512, 128, 128, 256, 24, 64, 64),
        (512, 112, 144, 288, 32, 64, 64),
        (528, 256, 160, 320, 32, 128, 128),
        (832, 256, 160, 320, 32, 128, 128),
        (832, 384, 192, 384, 48, 128, 128),
    ]

    def convolution(width_in: int, width: int, kernel: int) -> int:
        return kernel * kernel * width_in * width + 2 * width

    count = convolution(3, 64, 3) + convolution(64, 64, 1) + convolution(64, 192, 3)
    for width, w1, r3, w3, r5, w5, pool in table:
        count += convolution(width, w1, 1)
        count += convolution(width, r3, 1) + convolution(r3, w3, 3)
        count += convolution(width, r5, 1) + convolution(r5, w5, 5)
        count += convolution(width, pool, 1)
    count += 1024 * 100 + 100
    assert parameter_count(meta("inception_cifar")) == count == 6_075_652


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_networks_keep_resolution_at_32_pixels(name: str) -> None:
    net = meta(f"{name}_cifar", num_classes=7)
    images = torch.zeros(2, 3, 32, 32, device="meta")
    height = net.forward_features(images).shape[-1]
    assert height == (4 if name == "mobilenet" else 8)
    assert net(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet8_cifar", "inception_cifar", "wrn_16_2_cifar"])
def test_networks_work_as_timm_uses_its_own(name: str) -> None:
    net = timm.create_model(name, num_classes=5, drop_rate=0.1)
    assert net.get_classifier().weight.shape[0] == 5
    net.reset_classifier(9)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 9)
    assert timm.data.resolve_model_data_config(net)["input_size"] == (3, 32, 32)
    assert timm.is_model(name)


@register_model
def without_a_cfg(pretrained: bool = False, num_classes: int = 10, **_: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def test_a_network_without_a_pretrained_cfg_is_refused() -> None:
    (spec,) = parse_cohort(["timm:without_a_cfg"])
    with pytest.raises(UsageError, match=r"no pretrained_cfg, .*build_model_with_cfg\(\.\.\.\)"):
        build_peer(spec, tiny_config(), 10)


def test_building_does_not_move_running_statistics() -> None:
    # A constructor that tries its network on dummy images would move the running statistics.
    specs = parse_cohort(["resnet8", "timm:resnet10t"])
    for spec in specs:
        net = build_peer(spec, tiny_config(image_size=32, float64=False), 10)
        assert net.training
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.num_batches_tracked == 0
                assert module.running_mean.abs().sum() == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (["3"], ["resnet32-0", "resnet32-1", "resnet32-2"]),
        (["resnet8*2", "wrn_28_10"], ["resnet8-0", "resnet8-1", "wrn_28_10-0"]),
        (["resnet8", "resnet20", "resnet8"], ["resnet8-0", "resnet20-0", "resnet8-1"]),
        (
            ["timm:vit_tiny_patch16_224[img_size=32,patch_size=4]*2", "timm:vit_tiny_patch16_224"],
            [f"vit_tiny_patch16_224-{index}" for index in range(3)],
        ),
    ],
)
def test_peers_are_named_after_their_net(text: list[str], expected: list[str]) -> None:
    assert [spec.name for spec in parse_cohort(text)] == expected


def test_a_stem_for_small_images_replaces_that_of_a_resnet(tmp_path: Path) -> None:
    (spec,) = parse_cohort(["timm:resnet18[stem=cifar]"])
    assert (spec.name, spec.arguments) == ("resnet18-0", {})
    net, usual = meta(spec.arch), meta("resnet18")
    assert parameter_count(net) == 11_220_132 == parameter_count(usual) - 3 * 64 * (7 * 7 - 3 * 3)
    maps = net.forward_features(torch.zeros(2, 3, 32, 32, device="meta"))
    assert maps.shape[-1] == 4 and net.feature_info[-1]["reduction"] == 8
    # A trained one loads again, through timm and through ours.
    trained = build_peer(spec, tiny_config(float64=False), 3)
    norm = Normalisation((0.5,) * 3, (0.25,) * 3)
    write_network(
        tmp_path,
        trained,
        spec,
        classes=("a", "b", "c"),
        normalisation=norm,
        geometry=Geometry(16, 16),
    )
    ours = load_network(read_peer(tmp_path))
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    started = build_pretrained(spec.arch, {}, 5, read_weights(spec.arch, str(tmp_path)))
    for other in (ours, timms):
        assert_same_state(trained.state_dict(), other.state_dict())
    assert torch.equal(started.conv1.weight, trained.conv1.weight)
    assert started.fc.out_features == 5


@pytest.mark.parametrize(
    "word", ["resnet8[stem=cifar]", "timm:resnet18d[stem=cifar]", "timm:resnet18[stem=wide]"]
)
def test_a_stem_that_a_network_cannot_have_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="stem=cifar, the only one, is for ResNets of timm that"):
        parse_cohort([word])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["0"], "asks for 0 peers; at least 1"),
        (["-2"], "asks for -2 peers; at least 1"),
        (["resnet8*0"], "asks for 0 peers; at least 1"),
        (["resnet23"], r"unknown net 'resnet23'; nearest: resnet\d+"),
        (["timm:resnet5"], "unknown net 'timm:resnet5'; nearest: timm:resnet50"),
        (["efficientnet_b0"], "unknown net 'efficientnet_b0'; nearest: timm:efficientnet_b0"),
        (["resnet8", "2"], "unknown net '2'"),
        (["resnet8[depth]"], r"write arguments as \[key=value"),
        (["resnet8 [a=1"], "cannot be parsed"),
    ],
)
def test_an_impossible_cohort_is_refused(text: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_cohort(text)


def test_a_net_that_cannot_take_the_image_size_is_refused_with_arguments_that_help() -> None:
    spec = parse_cohort(["timm:vit_tiny_patch16_224"])[0]
    message = r"cannot take 32 x 32 .*\[img_size=32,patch_size=4\]' or --image-size 224"
    with pytest.raises(UsageError, match=message):
        build_peer(spec, tiny_config(image_size=32), 10)
    spec = parse_cohort(["timm:vit_tiny_patch16_224[img_size=32,patch_size=4,depth=1]"])[0]
    assert build_peer(spec, tiny_config(image_size=32), 10).num_classes == 10


def test_an_unknown_argument_of_a_net_is_refused() -> None:
    spec = parse_cohort(["resnet8[depth=3]"])[0]
    with pytest.raises(UsageError, match=r"cannot be built: .*depth"):
        build_peer(spec, tiny_config(), 10)


def test_arguments_of_our_own_nets_are_tried_as_well() -> None:
    spec = parse_cohort(["resnet8[in_chans=1]"])[0]
    with pytest.raises(UsageError, match="resnet8-0 cannot take 8 x 8 images"):
        build_peer(spec, tiny_config(), 10)


def test_a_net_that_cannot_learn_from_one_image_is_refused() -> None:
    spec = parse_cohort(["timm:resnet18"])[0]
    with pytest.raises(UsageError, match="cannot learn from a single image at a time"):
        build_peer(spec, tiny_config(image_size=32, batch_size=4, grad_accum=4), 10)
    assert build_peer(spec, tiny_config(image_size=32, batch_size=4, grad_accum=2), 10).training


def test_a_vision_transformer_learns_with_a_resnet() -> None:
    net = "timm:vit_tiny_patch16_224[img_size=32,patch_size=4]"
    config = tiny_config(cohort=(net, "resnet8"), image_size=32, float64=False)
    images = torch.arange(16 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(16, 32, 32, 3)
    split = Split(images, torch.arange(16) % 2)
    training = Training(config, Source(split, split, ("even", "odd")))
    before = training.states()
    (parts,) = training.take(1)
    assert parts.shape == (2, 3) and parts.isfinite().all()
    assert (parts[:, 2] > 0).all()  # they teach each other
    after = training.states()["vit_tiny_patch16_224-0"]
    moved = [n for n in after if not torch.equal(after[n], before["vit_tiny_patch16_224-0"][n])]
    assert {"patch_embed.proj.weight", "pos_embed", "head.weight"} <= set(moved)
    # 192 wide: 48 x 192 + 192 of the patches, 64 places and a token each with its place, 12 blocks,
    # the last norm, and the head of two classes.
    block = 4 * 192 * 192 + 4 * 192 + 2 * 4 * 192 * 192 + 5 * 192 + 4 * 192
    (vit,) = [peer.module for peer in training.peers if peer.name.startswith("vit")]
    assert parameter_count(vit) == 49 * 192 + 66 * 192 + 12 * block + 2 * 192 + 193 * 2


def test_the_documentation_lists_the_parameter_counts() -> None:
    page = (ROOT / "docs/training.md").read_text()
    for name in SHORT_NAMES:
        count = f"{parameter_count(meta(f'{name}_cifar')):,}"
        assert any(name in line and count in line for line in page.splitlines()), name


# ---------------------------------------------------------------- memory format


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cpu", {"float64": False}, torch.channels_last),
        ("cpu", {"float64": False, "memory_format": "contiguous"}, torch.contiguous_format),
        ("cpu", {}, torch.contiguous_format),  # double precision
        ("cuda", {"float64": False}, torch.contiguous_format),
        ("cpu", {"float64": False, "mixed_precision": "bf16"}, torch.channels_last),
        ("cuda", {"float64": False, "mixed_precision": "bf16"}, torch.contiguous_format),
        ("cuda", {"float64": False, "memory_format": "channels_last"}, torch.channels_last),
        ("cpu", {"float64": False, "memory_format": "channels_last"}, torch.channels_last),
    ],
)
def test_the_memory_format_follows_device_and_precision(
    device: str, changes: dict, expected: torch.memory_format
) -> None:
    assert image_format(tiny_config(**changes), torch.device(device)).layout == expected


@pytest.mark.parametrize(
    ("release", "changes", "expected"),
    [
        ((2, 13), {"compile": "on"}, torch.contiguous_format),
        ((2, 14), {"compile": "on"}, torch.channels_last),
        ((2, 13), {"compile": "on", "memory_format": "channels_last"}, torch.channels_last),
        ((2, 13), {"compile": "on", "mixed_precision": "bf16"}, torch.channels_last),
        ((2, 13), {"compile": "off"}, torch.channels_last),
        ((2, 13), {"compile": "auto"}, torch.channels_last),  # which compiles nothing there
    ],
)
def test_layers_that_would_not_be_compiled_exactly_are_compiled_in_the_usual_layout(
    release: tuple[int, int],
    changes: dict,
    expected: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile, "torch_release", lambda: release)
    config = tiny_config(float64=False, **changes)
    assert image_format(config, torch.device("cpu")).layout == expected


def test_a_network_that_cannot_take_channels_last_is_refused_with_the_remedy() -> None:
    (spec,) = parse_cohort(["timm:viewing"])
    size = {"classes": 10, "image_size": 8, "seed": 0}
    build(spec, **size)
    with pytest.raises(UsageError, match="viewing-0 cannot be trained in channels_last: .*view si"):
        build(spec, **size, layout=torch.channels_last)


def test_networks_of_somebodys_own_keep_the_usual_layout() -> None:
    config = tiny_config(cohort=("resnet8", "timm:viewing"), float64=False)
    assert image_format(config, torch.device("cpu")).layout == torch.contiguous_format
