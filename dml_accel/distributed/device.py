"""The device of this process, and the versions of what drives it."""

import subprocess

import torch

from dml_accel.core.config import ComputeConfig
from dml_accel.distributed.launch import launched_local_rank, launched_processes, runs_on_cpu

_SECONDS_TO_ANSWER = 20


def choose_device(cpu: bool) -> torch.device:
    """Return this machine's accelerator; the CPU if it has none, or if ``cpu`` asks for it."""
    if cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def own_device(compute: ComputeConfig) -> torch.device:
    """Return the device that this process trains on; it can be asked before a group exists."""
    device = choose_device(runs_on_cpu(compute))
    if device.type != "cuda":
        return device
    # As Accelerate counts: a process that sees a single GPU calls it 0, whatever its local rank.
    local = launched_local_rank() if launched_processes() > 1 else 0
    return torch.device("cuda", local % torch.cuda.device_count())


def device_versions(device: torch.device) -> dict[str, str | None]:
    """Return the model of a GPU and the versions of what drives it; nothing for a CPU.

    None for a version that cannot be told.
    """
    if device.type == "cpu":
        return {}
    if device.type != "cuda":
        return {"gpu": device.type}
    cudnn = torch.backends.cudnn.version()
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "gpu": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": str(cudnn) if cudnn else None,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "driver": _driver(),
    }


def _driver() -> str | None:
    # torch knows only the CUDA version that the driver supports, not the driver's own.
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=_SECONDS_TO_ANSWER
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
