"""--config: what a file may say, what is refused, and a run that is repeated bit for bit."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dml_accel import cli
from dml_accel.api.runs import settled as settle
from dml_accel.cli.commands import _parsed
from dml_accel.core.config import Config, flag_types
from dml_accel.core.config_file import _Loader, read_config_file
from dml_accel.core.errors import UsageError
from tests.helpers import DIGITS, ROOT, load, train

RUN = ["--cohort", "resnet8*2", *DIGITS, "--max-steps", "4"]


def settled(*words: str, command: str = "train") -> Config:
    """What a command line and what stands behind it say together."""
    values = _parsed([command, *words])
    flags = {n: one for n, one in values.items() if n in (*flag_types(), "config", "recipe")}
    return settle(command, flags).config


def write(folder: Path, content: str | bytes, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# ---------------------------------------------------------------- what a file may say

SAID: dict[str, tuple[str, dict[str, Any]]] = {
    "flags as they are written": (
        "lr-schedule: cosine\nbatch_size: 16",
        {"lr_schedule": "cosine", "batch_size": 16},
    ),
    "numbers as people write them": (
        "weight-decay: 5e-4\nlr: .1\nwarmup: 2\nseed: 010",
        {"weight_decay": 5e-4, "lr": 0.1, "warmup": 2, "seed": 10},
    ),
    # In older YAML these three words are truth values.
    "words that are no truth values": (
        "mixed-precision: no\ncompile: off\naugment: none\ntf32: true",
        {"mixed_precision": "no", "compile": "off", "augment": ["none"], "tf32": True},
    ),
    "one value or several": (
        "cohort: 3\nlr-schedule: milestones\nlr-milestones: [2, 3.5]",
        {"cohort": ["3"], "lr_milestones": [2, 3.5]},
    ),
    "sections": (
        "optim:\n  lr: 0.2\n  epochs: 7\ndata: {image-size: 8}\ncohort: {seed: 3}",
        {"lr": 0.2, "epochs": 7, "image_size": 8, "seed": 3},
    ),
    "a recipe": ("recipe: mcl\nepochs: 30", {"epochs": 30, "batch_size": 128}),
    "nothing for the default": ("lr:\nthreads: null", {"lr": 0.1, "threads": None}),
    "a mark at its start": ("\ufefflr: 0.3", {"lr": 0.3}),
}


@pytest.mark.parametrize("case", SAID)
def test_a_file_says_what_flags_say(case: str, tmp_path: Path) -> None:
    content, expected = SAID[case]
    found = settled("--config", write(tmp_path, content)).as_dict()
    assert {name: found[name] for name in expected} == expected


def test_the_file_in_the_documentation_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs/training.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", page, re.S | re.M)
    found = settled("--config", write(tmp_path, shown)).optim
    assert (found.lr, found.lr_milestones, found.optimizer) == (0.05, (75, 90, 105), "momentum")


def test_flags_override_a_file_which_overrides_a_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, '{"recipe": "one", "epochs": 20, "lr": 0.2, "tf32": true}', "x.json")
    found = settled("--config", path, "--lr", "0.3", "--no-tf32", "--lr-schedule", "step")
    assert (found.optim.batch_size, found.optim.epochs, found.optim.lr) == (128, 20, 0.3)
    assert not found.numerics.tf32 and found.optim.lr_milestones == ()
    # A recipe on the command line takes the place of the file's.
    assert settled("--config", path, "--recipe", "paper").optim.batch_size == 64


def test_home_directories_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, "output-dir: ~/runs\nfrozen-peers: [~/a]")
    found = settled("--config", path)
    assert found.run.output_dir == "/home/me/runs"
    assert found.method.frozen_peers == ("/home/me/a",)


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "an unknown key": (
        "lr-schedul: step",
        "unknown key 'lr-schedul': did you mean lr-schedule? The keys of optim: epochs, max-steps",
    ),
    "a key like no other": (
        "qqqq: 1",
        "unknown key 'qqqq': The keys of cohort: cohort, seed; data",
    ),
    "a key of another section": ("optim: {image-size: 8}", "unknown key 'image-size' in optim: "),
    "a flag of compare": ("seeds: 3", "unknown key 'seeds': did you mean seed?"),
    "a key twice": ("lr: 1\nlr: 2", "says lr twice"),
    "a key written two ways": ("batch-size: 1\nbatch_size: 2", "says batch_size twice"),
    "a flag and its section": ("lr: 1\noptim: {lr: 2}", "says lr twice"),
    "a wrong type": ("lr: fast", "configuration lr is 'fast'; its type must be float"),
    "a fraction": ("epochs: 1.5", "configuration epochs is 1.5; its type must be int"),
    "a truth value": ("lr: true", "configuration lr is True; its type must be float"),
    "a date": ("lr: 2020-01-01", "configuration lr is '2020-01-01'"),
    "out of range": ("momentum: 1.0", "--momentum is 1.0; it must be"),
    "a conflict": ("lr-milestones: [3]", "needs --lr-schedule milestones, not step (--lr-milest"),
    "more than a value": ("lr: {a: 1}", "lr holds more than a value or a list of values"),
    "lists in a list": ("cohort: [[resnet8]]", "cohort holds more than a value or a list"),
    "no mapping": ("- lr", "must hold flags by name, such as lr: 0.1"),
    "nothing at all": ("", "must hold flags by name, such as lr: 0.1"),
    "an unknown recipe": ("recipe: modren", "--recipe modren is unknown: did you mean modern?"),
    "an empty recipe": ("recipe: ''", "--recipe '' is unknown: there are paper, one, "),
    "no name of a recipe": ("recipe: [paper]", "recipe must be the name of one"),
    "a key that is a list": ("[lr]: 1\n[lr]: 2", "is not valid YAML: while constructing a mapping"),
    "damaged": ("lr: [1", "is not valid YAML: "),
    "code": ("lr: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine"),
    "deep": ("[" * 300, "is not valid YAML: "),
    "too long": (" " * 2**16 + "lr: 1", "has more than the allowed 65,536 bytes"),
    "bytes": (b"lr: \xff", "is not in UTF-8"),
}
REFUSED_JSON = {
    "a key twice": ('{"lr": 1, "lr": 2}', "says lr twice"),
    "deep": ("[" * 10**5, "is not valid JSON: maximum recursion depth"),
    "no number": ('{"lr": NaN}', "is not valid JSON: NaN is not a JSON number"),
    "a number as a word": ('{"lr": "0.1"}', "configuration lr is '0.1'; its type must be float"),
}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("x.yaml", *case) for case in REFUSED.values()]
    + [("x.json", *case) for case in REFUSED_JSON.values()]
    + [("x.toml", "lr = 1", "its name must end in .json, .yaml, .yml")],
    ids=[*REFUSED, *(f"{name} in JSON" for name in REFUSED_JSON), "another ending"],
)
def test_a_file_is_refused_in_one_line(
    name: str, content: str | bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(folder, "--config", write(tmp_path, content, name)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert not folder.exists()


def test_many_names_of_one_list_stay_short(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefgh")]
    with pytest.raises(UsageError) as error:
        read_config_file(Path(write(tmp_path, "cohort: [" + "x," * 10**4 + "{}]")))
    assert len(str(error.value)) < 1000
    with pytest.raises(UsageError, match="unknown key 'a'") as error:
        read_config_file(Path(write(tmp_path, "\n".join(lines))))
    assert len(str(error.value)) < 3000


def test_compare_and_plan_take_files_of_what_they_have(tmp_path: Path) -> None:
    path = write(tmp_path, "lr: 0.2\nupdate: simultaneous")
    for command in ("compare", "plan"):
        assert settled("--config", path, command=command).optim.lr == 0.2
    with pytest.raises(UsageError, match="compare has no update: use --methods"):
        settled("--config", write(tmp_path, "update: official"), command="compare")
    with pytest.raises(UsageError, match="plan has no resume"):
        settled("--config", write(tmp_path, "resume: x"), command="plan")


def test_compare_has_no_recipe_by_names_for_cohorts_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["compare", "--preset", "paper-table2", "--recipe", "crd"]) == 2
    assert "--recipe crd sets --peer-opt by the names of a cohort" in capsys.readouterr().err


def test_the_cohort_of_a_file_takes_the_place_of_a_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts: list[Any] = []
    monkeypatch.setattr(
        "dml_accel.analysis.compare.compare",
        lambda _, found, *__: (tmp_path, cohorts.append(found)),
    )
    path = write(tmp_path, "cohort: [mobilenet]\nrecipe: crd")
    assert cli.main(["compare", "--preset", "paper-table2", "--config", path]) == 0
    words = ["--preset", "paper-table2", "--recipe", "crd"]
    for off in (["--no-peer-opt"], ["--lr", "0.2"]):
        assert cli.main(["compare", *words, *off]) == 0
    assert cohorts[0] == (("mobilenet",),) and len(cohorts[1]) == len(cohorts[2]) == 6


def test_every_flag_that_a_recipe_turns_on_can_be_turned_off() -> None:
    off = ["--no-ema", "--no-mixup", "--no-wd-exclude-norm-bias", "--no-augment"]
    found = settled("--recipe", "modern", *off)
    assert (found.optim.ema, found.data.mixup, found.data.augment) == (None, 0, None)
    assert not found.optim.wd_exclude_norm_bias and found.optim.optimizer == "adamw"
    with pytest.raises(UsageError, match="--recipe '' is unknown"):
        settled("--recipe=")


def test_keys_of_yaml_are_not_compared_with_all_before_them() -> None:
    compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    keys = [yaml.ScalarNode("tag:yaml.org,2002:str", Key(f"key {one}")) for one in range(300)]
    node = yaml.MappingNode("tag:yaml.org,2002:map", [(key, key) for key in keys])
    assert len(_Loader("").construct_mapping(node)) == 300
    assert compared < 300


STORED = {"optimizer": "sgd", "lr": 0.1, "opt_args": ["dampening=0"], "weight_decay": 1e-4}
OWN = ["resnet8-1:optimizer=lion", "resnet8-1:lr=1e-4"]
STORED |= {"peer_opt": ["resnet8-0:lr=0.01,weight_decay=0", *OWN]}
OTHERS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "another family": (
        ["--optimizer", "adamw"],
        {
            "lr": 1e-3,
            "opt_args": [],
            "weight_decay": 1e-4,
            "peer_opt": ["resnet8-0:weight_decay=0", *OWN],
        },
        "left out, as it is meant for another optimizer than adamw: --opt-args dampening=0 "
        "--lr 0.1 --peer-opt resnet8-0:lr=0.01",
    ),
    "its rate is given": (
        ["--optimizer", "adamw", "--lr", "0.002", "--no-opt-args", "--no-peer-opt"],
        {"lr": 0.002, "opt_args": [], "peer_opt": []},
        "",
    ),
    "the family": (["--optimizer", "nesterov"], STORED | {"optimizer": "nesterov"}, ""),
    "the same": (["--seed", "1"], STORED, ""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_optimizer_does_not_get_the_rate_of_a_run(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected, said = OTHERS[case]
    path = write(tmp_path, json.dumps({"config": STORED}), "config.json")
    found = settled("--config", path, *words).as_dict()
    assert {name: found[name] for name in expected} == expected
    assert capsys.readouterr().err == (f"{path}: {said}\n" if said else "")


# ---------------------------------------------------------------- repeating a run


def weights(run: Path) -> dict[str, str]:
    """The sha256 of every peer's weights."""
    found = sorted((run / "peers").glob("*/model.safetensors"))
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def threads() -> Iterator[int]:
    """How many this process has, restored afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose threads were not asked for."""
    run, before = tmp_path_factory.mktemp("original") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    assert train(run, *RUN, "--recipe", "dkd") == 0
    torch.set_num_threads(before)
    return run


def test_a_run_is_repeated_bit_for_bit_with_what_it_resolved(
    original: Path, tmp_path: Path, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    description = load(original / "config.json")
    assert description["config"]["threads"] is None and description["recipe"] == "dkd"
    resolved = description["resolved"]
    assert resolved.pop("device")["type"] == torch.device("cpu").type
    assert resolved == {
        "augment": ["crop"],
        "threads": 1,
        "mixed_precision": "no",
        "memory_format": "channels_last",
        "world_size": 1,
        "processes": 1,
        "placement": "replicate",
        "compile": "off",
        "feed": "memory",
    }
    torch.set_num_threads(2)
    capsys.readouterr()
    again = tmp_path / "again"
    assert train(again, "--config", str(original / "config.json")) == 0
    assert weights(again) == weights(original) != {}
    said = [line for line in capsys.readouterr().err.splitlines() if "config.json:" in line]
    assert all(": code " in line for line in said)  # changes that are not committed yet
    repeated = load(again / "config.json")
    assert repeated["config"]["threads"] == 1 and repeated["recipe"] == "dkd"
    assert repeated["config"]["output_dir"] == str(again)


def tampered(original: Path, folder: Path, **changes: Any) -> str:
    """The config.json of a run with some of its entries replaced."""
    description = load(original / "config.json")
    for name, value in changes.items():
        place: Any = description
        *parents, last = name.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return write(folder, json.dumps(description), "config.json")


DIFFERENCES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "more threads than cores": (
        {"resolved__threads": 10**4},
        [],
        "threads 10000, now 1: results may differ in the last bits",
    ),
    "another device": (
        {"resolved__device": {"type": "cuda", "name": "NVIDIA H100"}},
        [],
        "device NVIDIA H100, now ",
    ),
    "more processes": ({"resolved__world_size": 2}, [], "processes 2, now 1: results may differ"),
    "another torch": ({"versions__torch": "2.0.1"}, [], "torch 2.0.1, now "),
    "another commit": ({"commit": "abc"}, [], "code abc, now "),
    "other flags": ({}, ["--lr", "0.2"], "started with --lr 0.05, but this command says --lr 0.2"),
    "an older run": ({"resolved": None}, [], "it does not record threads and device"),
    "processes and their own batch statistics": (
        {"resolved__world_size": 2, "config__batch_norm": "local"},
        [],
        "processes 2, now 1: with --batch-norm local that gives another result",
    ),
    "flags that change sums": ({}, ["--exchange", "sum"], "but this command says --exchange sum"),
    "a run that continued another": ({"continued": "runs/x"}, [], "its run continued runs/x"),
    "an older one": ({"config__resume": "runs/x"}, [], "its run continued runs/x"),
    "earlier steps": (
        {"earlier": [{"until_step": 2, "was": {"threads": 7, "torch": "2.0\n"}}]},
        [],
        "its steps 1 to 2 were taken with threads 7, torch 2.0\ufffd: results may differ in the",
    ),
    "earlier steps, not the first": (
        {
            "earlier": [
                {"until_step": 2, "was": {}},
                {"until_step": 3, "was": {"processes": 2}},
            ],
            "config__batch_norm": "local",
        },
        [],
        "its step 3 was taken with processes 2: with --batch-norm local that gives another result",
    ),
    "earlier steps of an unknown run": (
        {"earlier": [{"until_step": 2, "was": {"threads": None, "code": None}}]},
        [],
        "its steps 1 to 2 were taken with what is not recorded: results may differ",
    ),
    "other teachers": ({"teachers": {}}, [], "files of its frozen peers or links have changed"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_what_cannot_be_the_same_is_said(
    case: str,
    original: Path,
    tmp_path: Path,
    threads: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes, words, said = DIFFERENCES[case]
    torch.set_num_threads(1)
    # Whatever follows takes time and is the same for all.
    monkeypatch.setattr("dml_accel.training.progress.workload", _stop)
    path = tampered(original, tmp_path, **changes)
    with pytest.raises(_EnoughError):
        train(tmp_path / "again", "--config", path, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(lines) == 1 and lines[0].startswith(f"{path}: ")


def test_a_run_resumed_with_other_threads_says_so_when_it_is_repeated(
    original: Path,
    tmp_path: Path,
    threads: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shutil.copytree(original, tmp_path / "run")
    torch.set_num_threads(2)
    words = [*RUN, "--recipe", "dkd", "--max-steps", "5", "--resume", "auto"]
    assert train(run, *words) == 0
    (segment,) = load(run / "config.json")["earlier"]
    assert segment["until_step"] == 4 and segment["was"]["threads"] == 1
    capsys.readouterr()
    monkeypatch.setattr("dml_accel.training.progress.workload", _stop)
    with pytest.raises(_EnoughError):
        train(tmp_path / "again", "--config", str(run / "config.json"))
    assert "config.json: its steps 1 to 4 were taken with threads 1" in capsys.readouterr().err


class _EnoughError(Exception):
    pass


def _stop(*_: object) -> None:
    raise _EnoughError


def test_other_images_are_no_repeat_unless_they_are_asked_for(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = load(original / "config.json")
    description["data"]["splits"]["train"]["images"] = 3
    path = write(tmp_path, json.dumps(description), "config.json")
    again = tmp_path / "again"
    assert train(again, "--config", path) == 2
    error = capsys.readouterr().err
    assert "was trained on other images than --dataset digits: the train split had 3" in error
    assert not again.exists()
    assert train(again, "--config", path, "--dataset", "digits", "--max-steps", "1") == 0
    assert "its run was trained on other images, the train split had 3" in capsys.readouterr().err


def test_the_config_of_a_run_sets_every_flag(original: Path, tmp_path: Path) -> None:
    path = str(original / "config.json")
    with pytest.raises(UsageError, match="--recipe paper would change nothing: .* sets every flag"):
        settled("--config", path, "--recipe", "paper")
    with pytest.raises(
        UsageError, match=r"is a folder; the flags of a run are in its config\.json"
    ):
        settled("--config", str(original))
    found = settled("--config", path)
    assert found.run.output_dir is None and found.data.augment == ("crop",)
    assert settled("--config", path, "--dataset", "x").data.augment is None
