"""A run that is repeated from its config.json: what this machine and command change of it.

What the run left to its machine has been filled in already (``core.settings.with_resolved``). What
cannot be the same is said, one line each, before anything is written.
"""

import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dml_accel.core.config import Config, differences_text, flag_groups
from dml_accel.core.errors import UsageError
from dml_accel.core.settings import Settings
from dml_accel.core.versions import commit, versions
from dml_accel.distributed.device import device_versions, own_device
from dml_accel.distributed.launch import launched_processes
from dml_accel.training.setup import Checked

_LAST_BITS = "results may differ in the last bits"
_ANOTHER = "the results are those of another run"


def device_record(device: torch.device) -> dict[str, str]:
    """Return the type and the model of a device, as a run records them.

    Kernels of a CPU are chosen by its instructions, and so are the last bits of their sums.
    """
    if device.type == "cuda":
        return {"type": device.type, "name": torch.cuda.get_device_name(device)}
    if device.type != "cpu":
        return {"type": device.type, "name": platform.machine()}
    return {"type": "cpu", "name": f"{_cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def compare_with_original(asked: Settings, config: Config, checked: Checked, quiet: bool) -> None:
    """Say how a run differs from the one that its command repeats.

    Args:
        asked: what the command was asked for.
        config: of this run.
        checked: its images and teachers.
        quiet: whether to print nothing.

    Raises:
        UsageError: the images are others, though the command names none.
    """
    file = asked.file
    if file is None or file.description is None:
        return
    images = _other_images(file.description, checked)
    choosing = {field.name for group in flag_groups() for field in group.fields}
    choosing &= set(type(config.data).names()) - {"augment", "mixup", "cutmix", "label_smoothing"}
    if images and not choosing & asked.given:
        raise UsageError(
            f"{file.path}: its run was trained on other images than --dataset "
            f"{config.data.dataset}: {images}; restore them, or give --dataset to train on these"
        )
    try:
        lines = list(_differences(asked, file.description, config, checked, images))
    except (TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{file.path} does not describe a run: {error!r}") from error
    for line in () if quiet else lines:
        print(f"{file.path}: {line}", file=sys.stderr, flush=True)


def _other_images(description: Mapping[str, Any], checked: Checked) -> str:
    recorded, ours = description.get("data"), checked.source.fingerprint
    return ours.difference(recorded) if recorded and ours else ""


def _differences(
    asked: Settings,
    description: Mapping[str, Any],
    config: Config,
    checked: Checked,
    images: str,
) -> Iterator[str]:
    """Yield in words what is not as it was."""
    assert asked.file is not None
    saved = Config(**asked.file.flags)
    changed = config.differences(saved)
    changed.pop("dataset", None)  # it may have another name or place
    if changed:
        yield f"its run {differences_text(changed)}: {_ANOTHER}"
    if images:
        yield f"its run was trained on other images, {images}: {_ANOTHER}"
    for name, same in (
        ("frozen peers or links", checked.teachers == description["teachers"]),
        ("pretrained weights", _sha256(checked.starts) == _sha256(_starts(description))),
    ):
        if not same:
            yield f"the files of its {name} have changed: {_ANOTHER}"
    origin = description["config"].get("resume")
    if origin not in (None, "auto") and config.run.resume is None:
        yield f"its run continued {origin}, and this one starts untrained: {_ANOTHER}"
    resolved = description.get("resolved")
    if not isinstance(resolved, dict):
        yield f"it does not record threads and device: {_LAST_BITS}"
        resolved = {}
    device = own_device(config.compute)
    before: dict[str, Any] = {
        "processes": resolved.get("world_size"),
        "threads": resolved.get("threads"),
    }
    before |= {"device": resolved.get("device", {}).get("name"), **description["versions"]}
    ours: dict[str, Any] = {"processes": launched_processes(), "threads": torch.get_num_threads()}
    ours |= {"device": device_record(device)["name"], **versions(), **device_versions(device)}
    for name in dict.fromkeys([*before, *ours]):
        was, now = before.get(name), ours.get(name)
        # Of a GPU the device says it; what a run without a record had is unknown.
        if was != now and name != "gpu" and (name in description["versions"] or was is not None):
            yield f"{name} {was or 'none'}, now {now or 'none'}: {_LAST_BITS}"
    code, today = description.get("commit"), commit()
    if code != today or str(today).endswith("-dirty"):
        yield f"code {code or 'unknown'}, now {today or 'unknown'}: results may differ"


def _starts(description: Mapping[str, Any]) -> dict[str, Any]:
    return {one["name"]: one["start"] for one in description.get("peers", ()) if "start" in one}


def _sha256(starts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: start.get("sha256") for name, start in starts.items()}
