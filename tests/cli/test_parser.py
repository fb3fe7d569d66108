"""The flags of every command: help, usage errors, defaults; none of them imports torch."""

import inspect
import json
import re
import shlex
import sys
from typing import Any

import pytest

from dml_accel import cli
from dml_accel.cli.parser import PLANNED, parse
from dml_accel.core.config import Config, flag_groups, flag_types
from dml_accel.core.errors import UsageError
from tests.helpers import run_program

COMMANDS = ["train", "compare", "plan", "report", "check-data", "cache"]
COMMANDS += ["evaluate", "predict", "export"]
# Libraries that take seconds to import, or that only a command at work needs.
HEAVY = {"torch", "timm", "datasets", "numpy", "accelerate", "PIL", "safetensors", "matplotlib"}
# What scripts rely on: every flag with its default.
DEFAULTS = {
    "cohort": ["2"],
    "seed": 0,
    "dataset": "uoft-cs/cifar100",
    "dataset_config": None,
    "image_column": None,
    "label_column": None,
    "train_split": "train",
    "test_split": "test",
    "val_split": "auto",
    "test_fraction": 0.0,
    "image_size": None,
    "eval_resize": None,
    "crop_mode": "center",
    "mean": [],
    "std": [],
    "bad_images": "refuse",
    "augment": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "class_weights": "none",
    "train_limit": None,
    "val_fraction": 0.0,
    "labelled_fraction": 1.0,
    "epochs": 200,
    "max_steps": None,
    "batch_size": 64,
    "grad_accum": 1,
    "optimizer": "sgd",
    "opt_args": [],
    "lr": 0.1,
    "lr_schedule": "step",
    "lr_step": 60,
    "lr_milestones": [],
    "lr_gamma": 0.1,
    "lr_min": 0.0,
    "lr_power": 1.0,
    "lr_every": "step",
    "warmup": 0.0,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "wd_exclude_norm_bias": False,
    "clip_norm": None,
    "peer_opt": [],
    "ema": None,
    "early_stop": None,
    "kl_weight": 1.0,
    "ce_weight": 1.0,
    "temperature": 1.0,
    "divergence": "kl",
    "divergence_args": [],
    "standardize": False,
    "gate": "none",
    "kl_reduction": "mean",
    "kl_warmup": 0,
    "kl_ramp": "linear",
    "burn_in": 0,
    "exchange_every": 1,
    "update": "simultaneous",
    "target": "peers",
    "links": "full",
    "frozen_peers": [],
    "teach_with": "weights",
    "kl_images": "all",
    "mixed_precision": None,
    "float64": False,
    "tf32": False,
    "batch_norm": "group",
    "exchange_dtype": None,
    "cpu": False,
    "threads": None,
    "processes": "auto",
    "compile": "auto",
    "compile_mode": "default",
    "memory_format": None,
    "low_memory": False,
    "return_memory": False,
    "feed": "auto",
    "images_on": "auto",
    "workers": None,
    "placement": "auto",
    "measure": False,
    "exchange": "logits",
    "timeout": 10.0,
    "output_dir": None,
    "resume": None,
    "eval_every": "1ep",
    "save_every": "1ep",
    "keep": "last",
    "keep_checkpoints": 2,
    "max_nonfinite": 10,
    "log_with": [],
}
# Flags that only one command has.
OWN = {
    "train": {"--recipe", "--config"},
    "compare": {"--recipe", "--config", "--methods", "--seeds", "--preset"},
    "plan": {
        "--recipe",
        "--config",
        "--world",
        "--classes",
        "--gpus",
        "--bandwidth",
        "--latency",
        "--step-ms",
        "--plot",
    },
    "report": {"--to", "--analyse"},
    "check-data": {
        "--dataset",
        "--dataset-config",
        "--image-column",
        "--label-column",
        "--train-split",
        "--val-split",
        "--test-split",
        "--test-fraction",
        "--workers",
        "--to",
    },
    "cache": {"--prune", "--all", "--limit"},
    "evaluate": {
        "--checkpoint",
        "--weights",
        "--dataset",
        "--dataset-config",
        "--image-column",
        "--label-column",
        "--test-split",
        "--test-fraction",
        "--to",
        "--feed",
        "--bad-images",
        "--workers",
        "--cpu",
    },
    "predict": {"--checkpoint", "--weights", "--peer", "--format", "--cpu"},
    "export": {
        *("--checkpoint", "--weights", "--peer", "--to", "--format"),
        *("--push-to", "--private"),
    },
}


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def help_of(*words: str) -> str:
    """What --help prints."""
    done = run_program(sys.executable, "-m", "dml_accel", *words, "--help", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of every command."""
    return {command: help_of(command) for command in COMMANDS}


def flags_in(text: str) -> list[str]:
    """The flags that a help lists, in order."""
    return re.findall(r"^  (--[\w-]+)", text, re.M)


# ---------------------------------------------------------------- at once

HELP = [[], ["--help"], *([command, "--help"] for command in COMMANDS)]
USAGE = {
    "an unknown command": (["trian"], "invalid choice: 'trian' (choose from"),
    "an unknown flag": (["train", "--epoch", "3"], "--epoch: did you mean --epochs?"),
    "a flag with a value": (["train", "--epoch=3"], "--epoch=3: did you mean --epochs?"),
    "a flag like no other": (["train", "--qqq"], "unknown argument --qqq: see train --help"),
    "a word that is not quoted": (["train", "resnet8"], "train: unexpected argument resnet8"),
    "a bad number": (["train", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    "a fraction": (["train", "--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
    "no value": (["train", "--lr"], "argument --lr: expected one argument"),
    "a bad choice": (["train", "--update", "x"], "argument --update: invalid choice: 'x'"),
    "out of range": (["train", "--momentum", "1"], "--momentum is 1.0; it must be at least 0 and"),
    "a conflict": (["train", "--tf32", "--float64"], "--tf32 has no effect with --float64"),
    "a conflict of sections": (
        ["train", "--update", "official", "--placement", "split"],
        "--update official updates peers in turn",
    ),
    "a bad interval": (["train", "--eval-every", "often"], "--eval-every 'often' is not an inter"),
    "resuming nothing": (["train", "--resume", "auto"], "--resume auto needs --output-dir"),
    "a flag of another command": (["compare", "--update", "official"], "use --methods"),
    "compare resumes by itself": (["compare", "--resume", "auto"], "compare has no --resume: the"),
    "compare: images of the KL": (["compare", "--kl-images", "all"], "the method semi has KL on"),
    "no seeds": (["compare", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
    "a bad method": (["compare", "--methods", "x"], "argument --methods: invalid choice: 'x'"),
    "an unknown recipe": (["train", "--recipe", "papper"], "--recipe papper is unknown: did you"),
    "no file": (["plan", "--config", "no/such.yaml"], "no/such.yaml cannot be read: No such file"),
    "a flag that is never off": (["train", "--no-batch-size"], "--batch-size is never off, give"),
    "no processes": (["plan", "--world", "0"], "--world is 0; it must be at least 1"),
    "millions of processes": (["plan", "--world", "2", "1000000"], "at least 1 and at most 65,536"),
    "only too many processes": (["plan", "--world", "66", "65"], "--world 65 is more than the 64"),
    "no bandwidth": (["plan", "--bandwidth", "0"], "--bandwidth is 0.0; it must be above 0"),
    "too many processes": (["plan", "--world", "65"], "--world 65 is more than the 64 images of a"),
    "a flag that changes no plan": (["plan", "--lr", "1"], "plan has no --lr: it does not count"),
    "that flag off": (["plan", "--no-clip-norm"], "plan has no --no-clip-norm: it does not count"),
    "two times": (["plan", "--measure", "--step-ms", "5"], "and --step-ms 5 is of elsewhere: drop"),
    "GPUs here": (["plan", "--gpus", "--cpu"], "--gpus assumes rates, and --cpu is about this mac"),
    "a step of no time": (["plan", "--step-ms", "0"], "--step-ms is 0.0; it must be above 0, and"),
    "a plot of another kind": (["plan", "--plot", "x.pdf"], "--plot is x.pdf; it must be a .png o"),
    "a plot nowhere": (["plan", "--plot", "no/such/x.svg"], "--plot no/such/x.svg: there is no fo"),
    "all of nothing": (["cache", "--all"], "--all says what --prune removes: write cache --prune"),
    "no size": (["cache", "--limit", "5 apples"], "--limit is '5 apples'; write a size, as 20GB"),
    "no runs": (["report"], "the following arguments are required: DIR"),
    "no folder": (["report", "no/such"], "no/such is not a folder; name a folder of runs"),
    "no run": (["evaluate", "no/such"], "no/such is not a folder; name a run, or peers/<name>"),
    "no images": (["predict", "no/such"], "the following arguments are required: IMAGE"),
    "no folder to use": (["export", "no/such"], "no/such is not a folder; name a run, or"),
    "no network": (["export", "no/such", "--to", "x"], "no/such is not a folder; name a run, or"),
}
SCRIPT = """
import json, resource, sys
from dml_accel import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([code, used.ru_utime + used.ru_stime, sorted(sys.modules)]))
"""


def run_light(words: list[str]) -> tuple[int, str, str]:
    """Run a command in a fresh interpreter; it must import nothing heavy and be fast."""
    done = run_program(sys.executable, "-W", "error", "-c", SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    out, _, last = done.stdout.rstrip("\n").rpartition("\n")
    code, seconds, modules = json.loads(last)
    loaded = HEAVY & {name.partition(".")[0] for name in modules}
    assert not loaded, f"imports {', '.join(sorted(loaded))}"
    assert seconds < 2  # it takes a fifth of a second; a machine may be busy
    return code, out, done.stderr


@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(words) or "nothing")
def test_help_is_printed_at_once(words: list[str]) -> None:
    code, out, err = run_light(words)
    assert (code, err) == (0, "")
    assert out.startswith("usage: dml-accel") and "--help" in out


def test_recipes_are_listed_at_once() -> None:
    for command in ("train", "compare", "plan"):
        code, out, err = run_light([command, "--recipe", "list", "--cohort", "mobilenet"])
        assert (code, err) == (0, "")
        assert out.startswith("paper\n")
        assert "--peer-opt mobilenet-0:lr=0.01" in " ".join(out.split())


@pytest.mark.parametrize("case", USAGE)
def test_a_usage_error_is_one_line_at_once(case: str) -> None:
    words, said = USAGE[case]
    code, out, err = run_light(words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [
        ("--batchsize", "did you mean --batch-size?"),
        ("--batch_size", "did you mean --batch-size?"),
        ("--weight-deacy", "did you mean --weight-decay?"),
        ("--lr-steps", "did you mean --lr-step?"),
        ("--batch", "did you mean --batch-size or --batch-norm?"),
        ("--save", "did you mean --save-every?"),
        ("--output", "did you mean --output-dir?"),
        # Flags of other programs, which ours are not like.
        ("--no-such-optimizer", "see train --help"),
        ("--gradient-noise", "see train --help"),
        ("--label-smoothin", "did you mean --label-smoothing?"),
        ("--devices", "see train --help"),
        ("-x", "see train --help"),
    ],
)
def test_a_hint_names_what_was_meant_or_nothing(unknown: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(["train", unknown, "1"])
    assert str(error.value) == f"unknown argument {unknown}: {hint}"


def test_a_command_that_works_imports_torch() -> None:
    # So the checks above would notice it.
    words = ["plan", "--cohort", "resnet8", "--image-size", "16", "--batch-size", "8"]
    with pytest.raises(AssertionError, match="imports .*torch"):
        run_light(words)


# ---------------------------------------------------------------- the flags


def test_flags_and_defaults_are_those_that_scripts_rely_on() -> None:
    assert Config().as_dict() == DEFAULTS


def test_train_has_a_flag_for_every_field_in_one_group_per_section(helps: dict[str, str]) -> None:
    groups = re.split(r"^(\w+):$", helps["train"], flags=re.M)
    titles, texts = groups[1::2], groups[2::2]
    assert titles == ["options", *(group.title for group in flag_groups()), "examples"]
    for group, text in zip(flag_groups(), texts[1:-1], strict=True):
        assert flags_in(text) == [flag_of(field.name) for field in group.fields]
        assert " ".join(text.split()).startswith(group.text)


def test_the_help_of_train_shows_the_default_of_every_flag(helps: dict[str, str]) -> None:
    entries = re.split(r"^  (--[\w-]+)", helps["train"].partition("\nexamples:")[0], flags=re.M)
    shown = dict(zip(entries[1::2], entries[2::2], strict=True))
    for name, default in DEFAULTS.items():
        text = " ".join(shown[flag_of(name)].split())
        if default not in (None, [], False):
            value = " ".join(default) if isinstance(default, list) else default
            end = " with sgd" if name == "lr" else ")"
            assert f"(default: {value}{end}" in text, name
        assert len(text) > 20, name  # its help


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_have_the_same_flags_and_their_own(
    command: str, helps: dict[str, str]
) -> None:
    shared = {flag_of(name) for name in DEFAULTS}
    lacking = {"--resume"} if command == "compare" else set()
    if command == "plan":
        lacking = shared - {flag_of(name) for name in PLANNED}
    if command == "compare":
        lacking |= {"--update", "--target", "--kl-images", "--kl-ramp", "--gate", "--standardize"}
        lacking |= {"--divergence", "--divergence-args", "--exchange-every"}
    if command not in ("train", "compare", "plan"):
        lacking = shared
    expected = OWN.get(command, set()) | (shared - lacking)
    found = flags_in(helps[command])
    assert len(found) == len(set(found)) and set(found) == expected


def test_flags_that_are_not_given_are_left_out() -> None:
    # A preset must know which flags were given.
    assert parse(["train"]) == {"subcommand": "train"}
    assert set(parse(["compare"])) == {"subcommand", "methods", "seeds", "preset"}
    own = {"world", "classes", "gpus", "bandwidth", "latency", "step_ms", "plot"}
    assert set(parse(["plan"])) == {"subcommand", *own}


def on(name: str) -> tuple[list[str], Any]:
    """Words that a flag takes, and the value that it then has."""
    hint = str(flag_types()[name])
    choices = {
        field.name: field.metadata["argparse"].get("choices")
        for group in flag_groups()
        for field in group.fields
    }[name]
    if "bool" in hint:
        return [], True
    if choices:
        chosen = [choice for choice in choices if choice != DEFAULTS[name]][-1]
        return [chosen], chosen
    if name in ("mean", "std"):
        return ["0.5", "0.25", "1"], [0.5, 0.25, 1.0]
    if "tuple" in hint:
        return (["1", "2.5"], [1.0, 2.5]) if "float" in hint else (["a", "b"], ["a", "b"])
    if "int" in hint:
        return ["9"], 9
    return (["0.25"], 0.25) if "float" in hint else (["10min"], "10min")


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_flag_sets_its_field(name: str) -> None:
    words, value = on(name)
    found = parse(["train", flag_of(name), *words])
    assert found == {"subcommand": "train", name: value}
    assert type(found[name]) is type(value)
    assert value != DEFAULTS[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_off_by_default_can_be_turned_off(name: str) -> None:
    off, default = f"--no-{flag_of(name)[2:]}", None if name == "lr" else DEFAULTS[name]
    if default or name == "seed":
        with pytest.raises(UsageError, match=f"{off}: {flag_of(name)} is never off"):
            parse(["train", off])
        return
    for words in ([off], [flag_of(name), *on(name)[0], off]):
        found = parse(["train", *words])
        assert found == {"subcommand": "train", name: default}
        assert Config(**{name: found[name]}) == Config()


def test_settings_of_peers_are_not_both_off_and_on() -> None:
    with pytest.raises(UsageError, match="--no-peer-opt and --peer-opt exclude each other"):
        parse(["train", "--no-peer-opt", "--peer-opt", "resnet32-0:lr=1"])


def test_the_help_says_that_flags_can_be_off(helps: dict[str, str]) -> None:
    for command in ("train", "compare", "plan"):
        text = " ".join(helps[command].split())
        assert text.count("--no-FLAG turns off any flag that is off by default") == 2


def test_compile_alone_means_on() -> None:
    assert parse(["train", "--compile"])["compile"] == "on"
    assert parse(["train", "--compile", "--cpu"])["compile"] == "on"
    assert parse(["train", "--compile", "auto"])["compile"] == "auto"


def test_flags_cannot_be_abbreviated() -> None:
    for words in (["--batch", "8"], ["--batch=8"], ["--coh", "2"]):
        with pytest.raises(UsageError, match="unknown argument --(batch|coh).*did you mean --"):
            parse(["train", *words])


def test_every_example_of_the_help_is_a_command(helps: dict[str, str]) -> None:
    count = 0
    for command, text in helps.items():
        for line in text.partition("\nexamples:\n")[2].splitlines():
            words = shlex.split(line.rpartition(" | ")[2], comments=True)
            if words:
                assert words[:2] == ["dml-accel", command], line
                parse(words[1:])
                count += 1
    assert count > 15


def test_all_ways_to_start_the_program_enter_one_function() -> None:
    assert list(inspect.signature(cli.main).parameters) == ["arguments"]
    done = run_program(sys.executable, "train.py", "--help", COLUMNS="100")
    assert done.returncode == 0
    assert " ".join(done.stdout.split()) == " ".join(help_of("train").split())
