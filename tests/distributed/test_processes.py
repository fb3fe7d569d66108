"""Law 2: several real processes take the steps of one, whether a launcher starts them or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dml_accel.analysis.methods import METHODS
from dml_accel.core.config import Config
from tests import worker
from tests.data.test_loader import DAMAGED, damage, photographs
from tests.helpers import accelerate_launch, forked, load, real_dataset, run_program

LAUNCH = {
    2: accelerate_launch(2),
    3: forked(3),
}


STEPS = 7  # of more than two epochs
# Methods of simultaneous updates that are neither the default nor need more than a cohort.
BY_LESSON = [
    name
    for name, one in METHODS.items()
    if one.changes.keys() & {"target", "divergence", "gate", "standardize"}
    and one.changes.get("links") != "frozen"
]
PHOTOS = "PHOTOS"  # stands for a folder of photographs, some of which cannot be read


def cases() -> dict[str, dict[str, Any]]:
    """What every number of processes runs; slices are uneven where gradients are accumulated.

    47 images in 5 parts are 9 or 10 per part: 4 and 5 for 2 processes, 3, 3 and 4 for 3. One
    process ignores the placement, so cases that differ in nothing else are one run there.
    """
    shared = {
        "cohort": ["resnet8", "resnet20"],
        "dataset": real_dataset(),
        "image_size": 8,
        "batch_size": 48,
        "lr": 0.001,
        "max_steps": STEPS,
        "eval_every": "100ep",  # at the end only
        "cpu": True,
        "float64": True,
    }
    uneven = {"batch_size": 47}
    single = {"max_steps": 1, "float64": False}
    # Smooth activations: where rounding moves the input of a ReLU across 0, on one CPU and not on
    # another, the first gradients differ by 1e-3, whatever their sums.
    nets = ["timm:test_efficientnet", "timm:test_resnet[act_layer=silu,zero_init_last=False]"]
    smooth = {"cohort": nets} | single
    three = {"cohort": ["resnet20", "resnet8*2"]}
    modern = {
        "optimizer": "adamw",
        "lr_schedule": "cosine",
        "epochs": 4,
        "warmup": 0.5,
        "augment": ["crop-flip", "randaugment", "erasing"],
        "mixup": 0.4,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "ema": 0.9,
        "max_steps": 5,
    }

    # 11 images: 5 and 6 for 2 processes, 3, 4 and 4 for 3. All steps are of more than an epoch.
    loader = {
        "dataset": PHOTOS,
        "feed": "loader",
        "workers": 1,
        "bad_images": "skip",
        "batch_size": 11,
        "epochs": 3,
        "augment": ["random-resized-crop", "flip", "randaugment"],
        "mixup": 0.4,
        "cutmix": 1.0,
        "max_steps": 3,
    }

    # Those that no other case has; what can be exchanged as sums is exchanged so, too.
    flags = {name: METHODS[name].flags(epochs=200) for name in BY_LESSON}
    flags |= {
        "dkd of mean logits": {"target": "mean-logit", "divergence": "dkd", "temperature": 2.0},
        "renyi, gated": {"divergence": "renyi", "gate": "correct", "links": "ring"},
        "jeffreys, standardized": {"divergence": "jeffreys", "standardize": True, "links": "ring"},
    }
    sums = {
        f"{name}, sums": {**one, "exchange": "sum"}
        for name, one in flags.items()
        if not (Config(**one).method.needs_pairs or "links" in one)
    }

    def case(broken: str | None = None, **changes: object) -> dict[str, Any]:
        return {"config": shared | changes, "break": broken}

    def split(broken: str | None = None, **changes: object) -> dict[str, Any]:
        return case(broken, **{"placement": "split"} | uneven | changes)

    return {
        "plain": case(**uneven),
        "accumulated and clipped": case(**uneven, grad_accum=5, clip_norm=0.5, max_steps=4),
        "fused activations": case(cohort=["wrn_16_2", "resnet8"], max_steps=2),
        "modern": case(**modern),
        "loader": case(**loader),
        "rates": case(cohort=["resnet8"], epochs=3, lr_step=1, max_steps=None),
        "fp32": case(**single),
        "fp32, smooth": case(**smooth),
        "fp32, smooth, reversed": case("reversed batch", **smooth),
        "bf16": case(**single, mixed_precision="bf16"),
        "bf16, reversed": case("reversed batch", **single, mixed_precision="bf16"),
        "sequential": case(update="sequential", max_steps=3),
        "official": case(update="official", grad_accum=5, clip_norm=0.5, max_steps=2),
        "switch": case("apart", update="switch", grad_accum=2, max_steps=3, **uneven),
        "methods": case(batch_size=11, **three) | {"methods": flags},
        "local batch norm": case(**uneven, max_steps=1, batch_norm="local"),
        "broken detach": case("detach", **uneven, max_steps=1),
        "broken gradient mean": case("gradient mean", **uneven, max_steps=1),
        # 47 images: 23 and 24 for two processes of one peer.
        "split": split(),
        "split, equal peers": split(cohort=["resnet8*2"], max_steps=4),
        "split, four peers": split(cohort=["resnet20", "resnet8*2", "wrn_16_2"], max_steps=3),
        "split, accumulated and clipped": split(grad_accum=5, clip_norm=0.5, max_steps=4),
        "split, permuted": split(cohort=["resnet20", "resnet8"], max_steps=2),
        "split, sums": split(exchange="sum", max_steps=3),
        "split, rounded": split(exchange_dtype="bf16", max_steps=2),
        "split, ring": split(**three, links="ring", max_steps=2),
        "split, mean logits": split(exchange="sum", target="mean-logit", max_steps=2),
        "split, modern": split(**modern, teach_with="ema", grad_accum=2),
        "split, stale": split(**three, exchange_every=2, grad_accum=2, max_steps=4),
        "split, switch": split("apart", update="switch", grad_accum=2, max_steps=3),
        "split, methods": split(batch_size=11, **three) | {"methods": flags | sums},
        "split, loader": split(**loader),
        "split, few labels": split(
            labelled_fraction=0.3, class_weights="balanced", grad_accum=5, max_steps=3
        ),
        "split, spoiled": split("spoiled", **three, max_steps=4),
        "split, sums, spoiled": split("spoiled", exchange="sum", max_steps=4),
        "split, fp32, smooth": split(**smooth),
        "split, fp32, smooth, reversed": split("reversed batch", **smooth),
        "split, local batch norm": split(max_steps=1, batch_norm="local"),
        "split, broken gradient mean": split("gradient mean", max_steps=1),
    }


# How many steps of each case, every peer in every process, are compared.
WHOLE = {
    "plain": STEPS,
    "accumulated and clipped": 4,
    "fused activations": 2,
    "sequential": 3,
    "official": 2,
    "modern": 5,
    "loader": 3,
    "switch": 3,
}
SPLIT = [
    "split",
    "split, equal peers",
    "split, four peers",
    "split, accumulated and clipped",
    "split, permuted",
    "split, sums",
    "split, rounded",
    "split, ring",
    "split, mean logits",
    "split, modern",
    "split, stale",
    "split, switch",
    "split, loader",
    "split, few labels",
    "split, spoiled",
    "split, sums, spoiled",
]
# Costs are 1 for resnet8, 2 for wrn_16_2 and 3 for resnet20; processes are given in name order.
RANKS = {
    ("split", 2): {"resnet20-0": [0], "resnet8-0": [1]},
    ("split", 3): {"resnet20-0": [0, 1], "resnet8-0": [2]},
    ("split, equal peers", 2): {"resnet8-0": [0], "resnet8-1": [1]},
    ("split, equal peers", 3): {"resnet8-0": [0, 1], "resnet8-1": [2]},
    ("split, four peers", 2): {
        **{"resnet20-0": [0], "resnet8-1": [0]},
        **{"resnet8-0": [1], "wrn_16_2-0": [1]},
    },
    ("split, four peers", 3): {
        **{"resnet20-0": [0], "wrn_16_2-0": [1]},
        **{"resnet8-0": [2], "resnet8-1": [2]},
    },
}


# Two processes run what differs most; all of it is run by three, whose shares are uneven.
OF_TWO = {
    "plain",
    "accumulated and clipped",
    "modern",
    "loader",
    "bf16",
    "broken gradient mean",
    "split",
    "split, equal peers",
    "split, four peers",
    "split, accumulated and clipped",
    "split, sums",
    "split, modern",
    "split, stale",
    "split, loader",
    "split, sums, spoiled",
    "methods",
    "split, methods",
    "switch",
    "split, switch",
}


Found = dict[str, list[tuple[dict[str, Any], dict[str, torch.Tensor]]]]


def to_run(processes: int) -> dict[str, str]:
    """What is run for each case: itself, or for one process the first case that is the same."""
    if processes > 1:
        names = OF_TWO if processes == 2 else cases()
        return {name: name for name in names if "reversed" not in name}
    first: dict[str, str] = {}
    same = {}
    for name, case in cases().items():
        if case["break"] in (None, "reversed batch", "spoiled", "apart") and "local" not in name:
            alone = {key: value for key, value in case["config"].items() if key != "placement"}
            same[name] = first.setdefault(
                json.dumps([alone, case["break"], case.get("methods")], sort_keys=True), name
            )
    return same


def outcomes(folder: Path, names: dict[str, str]) -> Found:
    """What each process has written of the cases, by name."""
    return {
        name: [
            (load(folder / ran / f"{rank}.json"), load_file(tensors))
            for rank, tensors in enumerate(sorted((folder / ran).glob("*.tensors")))
        ]
        for name, ran in names.items()
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """Run all cases on 1, 2 or 3 processes, once each; one entry per case and rank."""
    folder = tmp_path_factory.mktemp("parity")
    done: dict[int, Found] = {}
    tried: set[int] = set()
    photos = photographs(folder / "photos")
    damage(photos, *DAMAGED)

    def run(processes: int) -> Found:
        if processes not in done:
            assert processes not in tried, "failed before"
            tried.add(processes)
            output, work = folder / str(processes), folder / f"{processes}.json"
            names = to_run(processes)
            chosen = {name: case for name, case in cases().items() if name in names.values()}
            work.write_text(json.dumps(chosen).replace(PHOTOS, str(photos)))
            if processes == 1:
                threads = torch.get_num_threads()
                worker.main(str(work), str(output))
                torch.set_num_threads(threads)
            else:
                words = [*LAUNCH[processes], "tests/worker.py", work, output]
                ended = run_program(*words)
                assert ended.returncode == 0, ended.stderr[-3000:]
            done[processes] = outcomes(output, names)
        return done[processes]

    return run


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], part: str) -> float:
    """Return the largest relative error in norm of any tensor of a part."""
    names = [name for name in b if name.startswith(part)]
    assert names
    errors = []
    for name in names:
        size = b[name].double().norm().item()
        errors.append((a[name].double() - b[name].double()).norm().item() / (size or 1))
    return max(errors)


def gradient(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    names = sorted(name for name in tensors if name.startswith("gradient/"))
    return torch.cat([tensors[name].double().flatten() for name in names])


three = pytest.param(3, marks=pytest.mark.three_processes)
several = pytest.mark.parametrize("processes", [2, three])


def several_run(*cases: str) -> pytest.MarkDecorator:
    """Each case on each number of processes that runs it."""
    two = [(2, case) for case in cases if case in OF_TWO]
    more = [pytest.param(3, case, marks=pytest.mark.three_processes) for case in cases]
    return pytest.mark.parametrize(("processes", "case"), [*two, *more])


@several
def test_several_processes_share_the_batch(found: Callable[[int], Found], processes: int) -> None:
    few = {2: [[0, 5], [5, 11]], 3: [[0, 3], [3, 7], [7, 11]]}[processes]
    even = {2: [[0, 24], [24, 48]], 3: [[0, 16], [16, 32], [32, 48]]}[processes]
    uneven = {2: [[0, 23], [23, 47]], 3: [[0, 15], [15, 31], [31, 47]]}[processes]
    for name, ranks in found(processes).items():
        reports = [report for report, _ in ranks]
        (collectives,) = {report["collectives"] for report in reports}
        assert collectives > 0, name
        if "methods" in name:
            continue
        assert len({report["pid"] for report in reports}) == processes
        assert [report["rank"] for report in reports] == list(range(processes))
        assert {report["world_size"] for report in reports} == {processes}
        if name.startswith("split"):
            continue
        assert {report["kind"] for report in reports} == {"replicate"}
        rows = {11: few, 47: uneven, 48: even}[cases()[name]["config"]["batch_size"]]
        assert [report["rows"] for report in reports] == rows
        for report, tensors in ranks:
            assert all(held == list(range(processes)) for held in report["ranks"].values())
            for key, value in tensors.items():
                if key.startswith("moved/"):
                    assert value > 0, (name, key)
            for key, value in ranks[0][1].items():
                if name != "local batch norm" and not key.startswith(("logits/", "images/")):
                    assert torch.equal(tensors[key], value), (name, key)


@several_run(*WHOLE)
def test_first_gradients_are_those_of_one_process(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    one, many = found(1)[case][0][1], found(processes)[case][0][1]
    assert worst(many, one, "gradient/") < 1e-10
    assert worst(many, one, "losses") < 1e-10


@several_run(*WHOLE)
def test_states_after_many_steps_are_those_of_one_process(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    # Parameters and running statistics, in absolute terms: all are of the order of 1. Momentum is
    # a gradient, and after many steps gradients differ by what rounding makes of the order of sums.
    (one_report, one), (report, many) = found(1)[case][0], found(processes)[case][0]
    assert report["steps"] == one_report["steps"] == WHOLE[case]
    for name, value in one.items():
        if name.startswith("state/") and "/momentum." not in name:
            assert (many[name] - value).abs().max() < 1e-9, name


@several
def test_accumulated_gradients_are_exchanged_once_and_clipped(
    found: Callable[[int], Found], processes: int
) -> None:
    plain, parts = (found(processes)[case][0] for case in ("plain", "accumulated and clipped"))
    # A few buckets a step (fewer in the first); five parts exchanged apart would be 5 times that.
    per_step = plain[0]["reductions"] / STEPS
    assert 2 <= parts[0]["reductions"] / 4 <= 1.05 * per_step
    for peer in ("resnet8-0", "resnet20-0"):
        for tensors, clipped in ((plain[1], False), (parts[1], True)):
            names = [name for name in tensors if name.startswith(f"gradient/{peer}/")]
            norm = torch.cat([tensors[name].flatten() for name in names]).norm().item()
            assert norm == pytest.approx(0.5, rel=1e-5) if clipped else norm > 0.5


@several
@pytest.mark.parametrize("case", ["loader", "split, loader"])
def test_images_that_are_read_are_the_rows_of_those_of_one_process(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    one = found(1)[case][0][1]
    for report, tensors in found(processes)[case]:
        lo, hi = report["rows"]
        for step in range(3):
            whole = one[f"images/{step}"]
            assert whole.shape == (11, 3, 8, 8) and whole.std() > 0.1
            assert torch.equal(tensors[f"images/{step}"], whole[lo:hi])
        assert "images/3" not in tensors


@several
@pytest.mark.parametrize(("case", "images"), [("plain", 101), ("loader", 5)])
def test_evaluation_counts_every_image_once(
    found: Callable[[int], Found], processes: int, case: str, images: int
) -> None:
    one, many = found(1)[case][0][0]["metrics"], found(processes)[case][0][0]["metrics"]
    assert one["ensemble"]["n"] == many["ensemble"]["n"] == images
    assert one["agreement"] == many["agreement"]
    for name, metrics in one["peers"].items():
        for key in ("n", "top1", "top5", "macro_f1"):
            assert many["peers"][name][key] == metrics[key]
        assert many["peers"][name]["nll"] == pytest.approx(metrics["nll"], rel=1e-9)


@pytest.mark.three_processes
def test_rates_and_steps_do_not_depend_on_the_processes(found: Callable[[int], Found]) -> None:
    one, many = found(1)["rates"][0][0], found(3)["rates"][0][0]
    assert one["rates"] == many["rates"]
    assert one["rates"] == [
        pytest.approx(0.001 * 0.1**epoch) for epoch in range(3) for _ in range(3)
    ]


@pytest.mark.parametrize(
    ("processes", "precision", "of_gradients", "tolerance"),
    [
        (2, "bf16", "bf16", 2e-2),
        pytest.param(3, "bf16", "bf16", 2e-2, marks=pytest.mark.three_processes),
        pytest.param(3, "fp32", "fp32, smooth", 1e-4, marks=pytest.mark.three_processes),
    ],
)
def test_lower_precision_differs_by_rounding_only(
    found: Callable[[int], Found],
    processes: int,
    precision: str,
    of_gradients: str,
    tolerance: float,
) -> None:
    for case in {precision, of_gradients}:
        one, ranks = found(1)[case][0][1], [tensors for _, tensors in found(processes)[case]]
        for name in one:
            if name.startswith(("losses", "logits/")):
                rows = ranks[0][name] if name == "losses" else torch.cat([r[name] for r in ranks])
                assert (rows - one[name]).abs().max() <= tolerance * one[name].abs().max(), name
    one, many = found(1)[of_gradients][0][1], found(processes)[of_gradients][0][1]
    backwards = found(1)[f"{of_gradients}, reversed"][0][1]
    rounding = (gradient(backwards) - gradient(one)).norm()
    assert rounding > 0
    assert (gradient(many) - gradient(one)).norm() <= 3 * rounding


@several
@pytest.mark.parametrize("case", ["methods", "split, methods"])
def test_every_method_takes_the_steps_of_one_process(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    one, many = found(1)[case][0][1], merged(found(processes)[case])
    assert {report["kind"] for report, _ in found(processes)[case]} == {
        "split" if case.startswith("split") else "replicate"
    }
    names = [name for name in one if name.startswith("losses/")]
    assert len(names) >= len(BY_LESSON) + 3 and "losses/switokd" not in names
    for name in names:
        method = name.partition("/")[2]
        assert worst(many, one, name) < 1e-10, method
        assert worst(many, one, f"gradient/{method}/") < 1e-9, method
    for name, value in one.items():
        if name.startswith("state/") and "/momentum." not in name:
            assert (many[name] - value).abs().max() < 1e-9, name


@pytest.mark.parametrize(
    ("processes", "case"),
    [
        *((count, case) for count in (1, 2) for case in ("switch", "split, switch")),
        *(
            pytest.param(3, case, marks=pytest.mark.three_processes)
            for case in ("switch", "split, switch")
        ),
    ],
)
def test_the_better_of_two_peers_pauses_in_all_processes(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    # In the second of three steps resnet8-0 is far from resnet20-0: it is sure of each image, and
    # right on one of 47, while the other gives every label a hundredth.
    for report, _ in found(processes)[case]:
        assert report["skipped"] == [[], [], []]
        paused = [["resnet8-0", 2]] if "resnet8-0" in report["held"] else []
        assert report["unmoved"] == paused


@several_run("local batch norm", "broken detach", "broken gradient mean")
def test_broken_versions_do_not_pass(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    honest, broken = found(1)["plain"][0][1], found(processes)[case][0][1]
    assert worst(broken, honest, "gradient/") > 1e-3


# ---------------------------------------------------------------- split


def merged(ranks: list[tuple[dict[str, Any], dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The tensors of all processes, the leader's where a peer has several."""
    return {key: value for _, tensors in reversed(ranks) for key, value in tensors.items()}


@several
def test_every_process_trains_its_own_peers_only(
    found: Callable[[int], Found], processes: int
) -> None:
    for (name, world_size), expected in RANKS.items():
        if world_size != processes:
            continue
        ranks = found(processes)[name]
        assert len({report["pid"] for report, _ in ranks}) == processes
        for rank, (report, tensors) in enumerate(ranks):
            assert (report["kind"], report["ranks"]) == ("split", expected)
            trained = {key.split("/")[1] for key in tensors if key.startswith("moved/")}
            assert trained == {peer for peer, held in expected.items() if rank in held}
            assert all(tensors[key] > 0 for key in tensors if key.startswith("moved/"))
    rows = [report["rows"] for report, _ in found(processes)["split"]]
    assert rows == {2: [[0, 47], [0, 47]], 3: [[0, 23], [23, 47], [0, 47]]}[processes]
    alone = found(1)["split"][0][0]
    assert (alone["kind"], alone["ranks"]) == (
        "replicate",
        {"resnet20-0": [0], "resnet8-0": [0]},
    )


@several_run(*SPLIT)
def test_split_peers_take_the_steps_of_one_process(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    one, many = found(1)[case][0][1], merged(found(processes)[case])
    assert worst(many, one, "gradient/") < 1e-10
    assert worst(many, one, "losses") < 1e-10
    for name, value in one.items():
        if name.startswith("state/") and "/momentum." not in name:
            assert (many[name] - value).abs().max() < 1e-9, name


@several
def test_all_processes_of_a_peer_hold_the_same(
    found: Callable[[int], Found], processes: int
) -> None:
    for name, ranks in found(processes).items():
        if not name.startswith("split") or "local" in name:
            continue
        everything = merged(ranks)
        for _, tensors in ranks:
            for key, value in tensors.items():
                if not key.startswith(("logits/", "images/")):
                    assert torch.equal(value, everything[key]), (name, key)


@pytest.mark.three_processes
def test_the_order_of_the_cohort_changes_nothing(found: Callable[[int], Found]) -> None:
    straight, permuted = (merged(found(3)[c]) for c in ("split", "split, permuted"))
    for name in straight:
        if name.startswith(("gradient/", "losses")):
            assert torch.equal(straight[name], permuted[name]), name


@several
def test_summed_posteriors_have_the_gradient_of_single_ones(
    found: Callable[[int], Found], processes: int
) -> None:
    single, summed = (merged(found(processes)[c]) for c in ("split", "split, sums"))
    assert worst(summed, single, "gradient/") < 1e-10


def test_rounded_logits_give_other_gradients(found: Callable[[int], Found]) -> None:
    exact, rounded = (found(1)[c][0][1] for c in ("split", "split, rounded"))
    assert 1e-6 < worst(rounded, exact, "gradient/") < 1e-1


@pytest.mark.parametrize(
    ("processes", "case"),
    [
        (1, "split, spoiled"),
        (1, "split, sums, spoiled"),
        (2, "split, sums, spoiled"),
        pytest.param(3, "split, spoiled", marks=pytest.mark.three_processes),
        pytest.param(3, "split, sums, spoiled", marks=pytest.mark.three_processes),
    ],
)
def test_a_peer_that_is_not_finite_skips_the_step_and_teaches_nobody(
    found: Callable[[int], Found], processes: int, case: str
) -> None:
    # resnet8-0 returns NaN in the second of four steps.
    for report, tensors in found(processes)[case]:
        assert report["skipped"] == [[], ["resnet8-0"], [], []]
        for key, value in tensors.items():
            assert value.isfinite().all(), key
        if "resnet8-0" in report["held"]:
            assert report["unmoved"] == [["resnet8-0", 2]]
        else:
            assert report["unmoved"] == []


@pytest.mark.three_processes
def test_split_single_precision_differs_by_rounding_only(found: Callable[[int], Found]) -> None:
    one = found(1)["split, fp32, smooth"][0][1]
    many = merged(found(3)["split, fp32, smooth"])
    assert (many["losses"] - one["losses"]).abs().max() <= 1e-4 * one["losses"].abs().max()
    rounding = (gradient(found(1)["split, fp32, smooth, reversed"][0][1]) - gradient(one)).norm()
    assert (gradient(many) - gradient(one)).norm() <= 3 * rounding


@pytest.mark.three_processes
@pytest.mark.parametrize("case", ["split, local batch norm", "split, broken gradient mean"])
def test_broken_groups_do_not_pass(found: Callable[[int], Found], case: str) -> None:
    # Two of three processes train resnet20: batch norm or a mean over only one of them must show.
    honest, broken = found(1)["split"][0][1], merged(found(3)[case])
    assert worst(broken, honest, "gradient/resnet20-0") > 1e-3


@several
@pytest.mark.parametrize(("case", "images"), [("split, four peers", 101), ("split, loader", 5)])
def test_split_evaluation_counts_every_image_once(
    found: Callable[[int], Found], processes: int, case: str, images: int
) -> None:
    one = found(1)[case][0][0]["metrics"]
    for report, _ in found(processes)[case]:
        many = report["metrics"]
        assert many["ensemble"]["n"] == images and many["agreement"] == one["agreement"]
        for name, metrics in one["peers"].items():
            for key in ("n", "top1", "top5", "macro_f1"):
                assert many["peers"][name][key] == metrics[key]
            assert many["peers"][name]["nll"] == pytest.approx(metrics["nll"], rel=1e-8)
        for teacher, row in one["kl"].items():
            for name, value in row.items():
                assert many["kl"][teacher][name] == pytest.approx(value, rel=1e-6, abs=1e-9)
