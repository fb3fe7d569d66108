"""Which device a process trains on, and what is recorded of it."""

import subprocess

import pytest
import torch

from dml_accel.core.config import ComputeConfig
from dml_accel.distributed import device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that nothing computes on."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda one: f"model {one.index}")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 26, 2))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


@pytest.mark.parametrize(
    ("environment", "index"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 0),  # left over: a single process uses the first GPU
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        # Tasks that see one GPU each would ask for index 3 of 1; here it is 5 of 2.
        ({"LOCAL_RANK": "5", "WORLD_SIZE": "8"}, 1),
    ],
)
def test_a_process_uses_the_gpu_that_accelerate_gives_it(
    monkeypatch: pytest.MonkeyPatch, gpus: None, environment: dict, index: int
) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    world = {"RANK": "0", "MASTER_ADDR": "127.0.0.1"} if "WORLD_SIZE" in environment else {}
    for name, value in (world | environment).items():
        monkeypatch.setenv(name, value)
    assert device.own_device(ComputeConfig()) == torch.device("cuda", index)
    assert device.own_device(ComputeConfig(cpu=True)) == torch.device("cpu")


def test_the_model_and_what_drives_it_are_told(monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    def answer(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert words[0] == "nvidia-smi"
        return subprocess.CompletedProcess(words, 0, "570.86.15\n570.86.15\n")

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", answer)
    found = device.device_versions(torch.device("cuda", 1))
    assert found == {
        "gpu": "model 1",
        "cuda": "12.8",
        "cudnn": "91002",
        "nccl": "2.26.2",
        "driver": "570.86.15",
    }
    monkeypatch.setattr(subprocess, "run", missing)
    assert device.device_versions(torch.device("cuda", 1)) == found | {"driver": None}
    assert device.device_versions(torch.device("cpu")) == {}
    assert device.device_versions(torch.device("mps")) == {"gpu": "mps"}
