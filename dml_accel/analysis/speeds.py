"""What makes the times of runs differ besides their methods: flags of speed, processes, devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dml_accel.analysis.runs import Run
from dml_accel.core.config import ComputeConfig, Config
from dml_accel.core.tables import printable
from dml_accel.core.versions import versions
from dml_accel.distributed.device import device_versions, own_device
from dml_accel.distributed.launch import launched_processes

_FLAGS = ("compile_mode", "low_memory", "return_memory", "exchange")
_VERSIONS = ("torch", "gpu", "driver", "cuda", "cudnn", "nccl")
_HERE = "this command"


def speed_of(run: Run) -> dict[str, Any]:
    """Return what a finished run's times depend on, by name; without what it did not record."""
    results = run.results
    found = _of_flags(run.config.compute) | _of_versions(results.get("versions") or {})
    found |= {
        "processes": results.get("world_size"),
        "device": str(results.get("device")).partition(":")[0],
        "--threads": results.get("threads"),
        "--compile": "on" if run.description.get("compiled") else "off",
        "--memory-format": (run.description.get("resolved") or {}).get("memory_format"),
        "--placement": (results.get("placement") or {}).get("kind"),
    }
    return {name: value for name, value in found.items() if value is not None}


def speed_here(config: Config) -> dict[str, Any]:
    """Return the same for the runs that this process is about to train."""
    compute, device = config.compute, own_device(config.compute)
    found = _of_flags(compute) | _of_versions(versions() | device_versions(device))
    found |= {"processes": launched_processes(), "device": device.type}
    # What auto chooses, the runs that were started before have chosen.
    found |= {"--memory-format": compute.memory_format}
    found |= {"--threads": torch.get_num_threads()} if device.type == "cpu" else {}
    found |= {"--compile": compute.compile} if compute.compile != "auto" else {}
    found |= {"--placement": compute.placement} if compute.placement != "auto" else {}
    return {name: value for name, value in found.items() if value is not None}


def _of_flags(compute: ComputeConfig) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": getattr(compute, name) or "default" for name in _FLAGS}


def _of_versions(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in _VERSIONS if name in found}


def speed_differences(runs: Sequence[Run], config: Config | None) -> str:
    """Return what makes the times of runs incomparable, in words; empty if nothing does.

    Args:
        runs: the finished ones.
        config: of the runs to come; None if there are none.
    """
    speeds = {run.name: speed_of(run) for run in runs}
    if config is not None and runs:
        speeds[_HERE] = speed_here(config)
    parts = []
    for name in dict.fromkeys(name for speed in speeds.values() for name in speed):
        by_value: dict[str, list[str]] = {}
        for run, speed in speeds.items():
            if name in speed:
                by_value.setdefault(printable(str(speed[name])), []).append(run)
        if len(by_value) > 1:
            parts.append(
                f"{name} {', '.join(f'{value} in {_some(w)}' for value, w in by_value.items())}"
            )
    return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
