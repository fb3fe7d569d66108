"""How an accelerator computes: IEEE single precision unless --tf32, deterministic kernels."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dml_accel.distributed.processes import set_arithmetic

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> dict[str, Any]:
    """Everything that is set for an accelerator, and that torch derives from it."""
    found = {
        "convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "products in TF32": torch.backends.cuda.matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get(WORKSPACE),
    }
    if hasattr(torch.backends.cudnn, "conv"):  # the newer interface, from torch 2.9
        found["conv"] = torch.backends.cudnn.conv.fp32_precision
    return found


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The settings at the start of a process, put back afterwards."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    found = settings()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield found
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.backends.cudnn.allow_tf32 = found["convolutions in TF32"]
    torch.set_float32_matmul_precision(found["precision"])
    torch.use_deterministic_algorithms(found["deterministic"], warn_only=found["only warns"])
    torch.utils.deterministic.fill_uninitialized_memory = found["fills memory"]
    os.environ.pop(WORKSPACE, None)
    assert settings() == found


def test_single_precision_on_a_gpu_is_ieee_and_deterministic(before: dict[str, Any]) -> None:
    assert before["convolutions in TF32"]  # torch's default, which is what has to be undone
    set_arithmetic(GPU, tf32=False)
    found = settings()
    assert not found["convolutions in TF32"] and not found["products in TF32"]
    assert found["precision"] == "highest" and found.get("conv") != "tf32"
    assert found["deterministic"] and found["only warns"] and not found["fills memory"]
    assert found["workspace"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_tf32_is_used_everywhere_where_it_is_asked_for(before: dict[str, Any]) -> None:
    set_arithmetic(GPU, tf32=False)
    set_arithmetic(GPU, tf32=True)
    found = settings()
    assert found["convolutions in TF32"] and found["products in TF32"]
    assert found.get("conv", "tf32") == "tf32"
    assert found["deterministic"]


def test_a_workspace_that_was_chosen_is_kept(
    before: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_arithmetic(GPU, tf32=False)
    assert settings()["workspace"] == ":16:8"


def test_a_cpu_computes_as_before(before: dict[str, Any]) -> None:
    set_arithmetic(CPU, tf32=False)
    assert settings() == before
