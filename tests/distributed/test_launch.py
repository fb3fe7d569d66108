"""What is refused before any process group: ways of starting, plugins, precisions (law 9)."""

import contextlib

import pytest
import torch

from dml_accel.core.config import Config
from dml_accel.core.errors import UsageError
from dml_accel.distributed import launch
from dml_accel.distributed.environment import world as world_of_the_launcher
from tests.helpers import tiny_config

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
WORKERS = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
HERE = {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
OWN_GPU = {"CUDA_VISIBLE_DEVICES": "0"}  # SLURM may call every task's own GPU 0


def check_launch(config: Config) -> None:
    launch.check_launch(config.numerics, config.compute, config.optim)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES")
    for name in (*ACCELERATE, *WORKERS, *ADDRESS, *HERE, *others):
        monkeypatch.delenv(name, raising=False)


REFUSED = {
    "accelerate launch --cpu --num_processes 2": (
        ACCELERATE | ADDRESS | {"ACCELERATE_USE_CPU": "True"},
        {},
        "started a single process and ignored --num_processes and --num_machines",
    ),
    "accelerate launch --num_processes 2": (
        ACCELERATE | ADDRESS | {"ACCELERATE_USE_CPU": "False"},
        {},
        "write accelerate launch --multi_gpu --num_processes N",
    ),
    "FSDP": (ACCELERATE | {"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP does not work with a cohort"),
    "DeepSpeed": (
        ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true"},
        {},
        "DeepSpeed does not work with a cohort",
    ),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "mixed precision fp8 is not supported"),
    "TF32 without a GPU": ({}, {"tf32": True, "float64": False}, "--tf32 needs a CUDA GPU"),
    "fp16 from the launcher": (
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {"float64": False},
        "fp16 needs a GPU",
    ),
    "fp16 from the flag": ({}, {"mixed_precision": "fp16", "float64": False}, "fp16 needs a GPU"),
    "float64 with bf16": (
        {},
        {"mixed_precision": "bf16"},
        "--float64 and mixed precision bf16 exclude each other",
    ),
    "SageMaker": (ACCELERATE | {"ACCELERATE_USE_SAGEMAKER": "true"}, {}, "SageMaker's data par"),
    "no number of parts": (
        ACCELERATE | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
        {},
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 'auto'",
    ),
    "compilation": (
        ACCELERATE | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {},
        "launch without it and give train.py --compile",
    ),
    "accumulation by the launcher": (
        ACCELERATE | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
        {},
        "--grad-accum, not with the launcher",
    ),
    "more processes than images": (
        WORKERS,
        {"batch_size": 8, "grad_accum": 4},
        "3 processes, but only 2 images in a micro-batch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    environment, changes, message = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refusal:
        check_launch(tiny_config(**changes))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("environment", "changes"),
    [
        ({}, {}),
        (ACCELERATE, {}),
        (ACCELERATE | WORKERS, {"batch_size": 3}),
        (ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, {}),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}, {}),
        (ACCELERATE | {"MASTER_ADDR": "127.0.0.1"}, {}),  # exported for something else
        (ADDRESS, {}),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"mixed_precision": "no"}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"float64": False}),
    ],
)
def test_accepted(monkeypatch: pytest.MonkeyPatch, environment: dict, changes: dict) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch(tiny_config(**changes))


@pytest.mark.parametrize(
    ("gpus", "environment", "message"),
    [
        (0, {"LOCAL_RANK": "0"}, "several processes need CUDA GPUs or the CPU; add --cpu"),
        (2, {}, "WORLD_SIZE is 3 but LOCAL_RANK is not set"),
        (2, HERE, "3 processes on this machine but 2 GPUs; start at most 2"),
        # torchrun's processes share what they see; so do those that see all of a machine's one GPU.
        (1, HERE | OWN_GPU | {"TORCHELASTIC_RUN_ID": "a"}, "but 1 GPU; start at most 1"),
        (1, HERE, r"give each its own \(srun --gpus-per-task=1\)"),
        (2, HERE | {"CUDA_VISIBLE_DEVICES": "0,1"}, "but 2 GPUs"),
    ],
)
def test_processes_need_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, gpus: int, environment: dict, message: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (WORKERS | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        check_launch(tiny_config(cpu=False, float64=False))


def test_tasks_that_each_see_a_gpu_of_their_own_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (WORKERS | HERE | OWN_GPU).items():
        monkeypatch.setenv(name, value)
    check_launch(tiny_config(cpu=False, float64=False))


def test_kernels_are_not_chosen_by_timing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"compile": "on", "compile_mode": "max-autotune-no-cudagraphs"}
    check_launch(tiny_config(**tuned))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="chooses nothing on a GPU.*use reduce-overhead"):
        check_launch(tiny_config(**tuned, cpu=False))
    check_launch(tiny_config(compile="on", compile_mode="reduce-overhead", cpu=False))


@pytest.mark.parametrize(("version", "refused"), [("2.6.0", True), ("2.15.0", False)])
def test_apple_gpus_need_an_optimizer_that_skips_steps(
    monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", version)
    text = "on Apple GPUs the optimizer of torch 2.6.0 cannot skip a step .*; use torch 2.15"
    with pytest.raises(UsageError, match=text) if refused else contextlib.nullcontext():
        check_launch(tiny_config(cpu=False, float64=False))


def test_double_precision_is_refused_on_apple_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="Apple GPUs have no double precision; add --cpu"):
        check_launch(tiny_config(cpu=False))
    check_launch(tiny_config(cpu=True))


@pytest.mark.parametrize(
    ("launched", "environment", "threads", "expected"),
    [
        (1, {}, None, None),  # as torch finds it
        (1, {}, 3, 3),
        (2, {"LOCAL_WORLD_SIZE": "2"}, None, 6),
        (2, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, None, 6),  # what launchers set
        (2, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4"}, None, None),  # what a user sets
        (2, {"LOCAL_WORLD_SIZE": "1"}, None, 12),  # another machine
        (24, {"LOCAL_WORLD_SIZE": "24"}, None, 1),
        (2, {"LOCAL_WORLD_SIZE": "2"}, 5, 5),
    ],
)
def test_processes_share_the_cores_of_their_machine(
    monkeypatch: pytest.MonkeyPatch,
    launched: int,
    environment: dict,
    threads: int | None,
    expected: int | None,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = {"WORLD_SIZE": str(launched), "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (world | environment).items():
        monkeypatch.setenv(name, value)
    assert launch._threads(threads, world_of_the_launcher()) == expected
