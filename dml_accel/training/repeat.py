"""A run that is repeated from its config.json: what this machine and command change of it.

A run may have been resumed elsewhere, or in another way. Its config.json describes how its last
steps were taken, and holds in what the steps before them differed:

    "earlier": [{"until_step": 6, "was": {"threads": 1}}],
    "continued": null       or the run or checkpoint that it continued in a folder of its own

What the run left to its machine has been filled in already (``core.settings.with_resolved``). What
cannot be the same is said, one line each, before anything is written.
"""

import platform
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dml_accel.core.config import Config, differences_text, flag_groups
from dml_accel.core.errors import UsageError
from dml_accel.core.settings import Settings
from dml_accel.core.tables import printable
from dml_accel.core.versions import commit, versions
from dml_accel.distributed.device import device_versions, own_device
from dml_accel.distributed.launch import launched_processes
from dml_accel.distributed.plan import Ranks
from dml_accel.training import checkpoint
from dml_accel.training.resume import changed_sources, is_a_placement, resumes_in_place
from dml_accel.training.run_folder import SavedRun
from dml_accel.training.setup import Checked, Modules

_LAST_BITS = "results may differ in the last bits"
_ANOTHER = "the results are those of another run"
# What changes the order of sums, besides processes, device and versions.
_RESOLVED = ("threads", "mixed_precision", "memory_format", "placement", "compile")
_FLAGS = ("placement", "measure", "exchange", "compile", "compile_mode", "memory_format")
# Flags of the data section that leave it open which images those are.
_OF_ANY_IMAGES = {
    "augment",
    "mixup",
    "cutmix",
    "label_smoothing",
    "class_weights",
    "mean",
    "std",
    "bad_images",
}
_SPREAD = {"processes", "placement"}  # facts that say how networks are spread


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


# ---------------------------------------------------------------- what a resumed run keeps


def history(config: Config, path: Path, step: int, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``earlier`` and ``continued`` of a run that resumes, from the config.json before it.

    Args:
        config: of the run.
        path: of its folder.
        step: how many steps it does not take itself.
        now: its description.
    """
    given = None if config.run.resume == "auto" else config.run.resume
    other = not resumes_in_place(config)
    source = Path(given) if given else path
    if checkpoint.is_named(source):
        source = source.parent.parent
    try:
        before = SavedRun(source).description
    except UsageError:
        before = {}
    last, ours = _facts(before), _facts(now)
    segments = [(until, last | was) for until, was in _earlier(before)]
    # A resumed run that wrote no checkpoint has taken no step that counts.
    kept = [one for one in segments if one[0] < step]
    covering = segments[len(kept)][1] if len(kept) < len(segments) else last
    kept.append((step, covering))
    follows = [*(facts for _, facts in kept[1:]), ours]
    earlier = [
        {"until_step": until, "was": _others(facts, ours)}
        for (until, facts), following in zip(kept, follows, strict=True)
        if facts != following
    ]
    return {"earlier": earlier, "continued": given if other else _continued(before)}


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what steps were taken with, by the name that is printed."""
    resolved, found = _mapping(description.get("resolved")), _mapping(description.get("versions"))
    facts: dict[str, Any] = {"processes": resolved.get("world_size")}
    facts |= {name.replace("_", " "): resolved.get(name) for name in _RESOLVED}
    flags = _mapping(description.get("config"))
    facts |= {name.replace("_", " "): flags.get(name) for name in ("exchange", "compile_mode")}
    facts |= {"device": _mapping(resolved.get("device")).get("name")}
    # Of a GPU the device says it.
    facts |= {name: version for name, version in found.items() if name != "gpu"}
    return facts | {"code": description.get("commit")}


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _others(facts: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return {name: facts.get(name) for name in facts | ours if facts.get(name) != ours.get(name)}


def _earlier(description: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return the last step of each earlier segment, and what it was taken with; none if damaged."""
    found = description.get("earlier", [])
    read: list[tuple[int, dict[str, Any]]] = []
    for one in found if isinstance(found, list) else ():
        until, was = _mapping(one).get("until_step"), _mapping(one).get("was")
        after = read[-1][0] if read else 0
        if type(until) is not int or until <= after or not isinstance(was, dict):
            return []
        read.append((until, was))
    return read


def _continued(description: Mapping[str, Any]) -> str | None:
    """Return which run or checkpoint a run continued in a folder of its own; None if it did not."""
    found = _mapping(description.get("config")).get("resume")
    found = description.get("continued", None if found == "auto" else found)
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------- what a repeated run says


def compare_with_original(
    asked: Settings, config: Config, checked: Checked, modules: Modules, quiet: bool
) -> Ranks | None:
    """Say how a run differs from the one that its command repeats.

    Args:
        asked: what the command was asked for.
        config: of this run.
        checked: its images and teachers.
        modules: its networks.
        quiet: whether to print nothing.

    Returns:
        Who trained which peer, where it was chosen for as many processes; else None.

    Raises:
        UsageError: the images are others, though the command names none.
    """
    file = asked.file
    if file is None or file.description is None:
        return None
    images = _other_images(file.description, checked)
    choosing = {field.name for group in flag_groups() for field in group.fields}
    choosing &= set(type(config.data).names()) - _OF_ANY_IMAGES
    if images and not choosing & asked.given:
        raise UsageError(
            f"{file.path}: its run was trained on other images than --dataset "
            f"{config.data.dataset}: {images}; restore them, or give --dataset to train on these"
        )
    try:
        lines = list(_differences(asked, file.description, config, checked, modules, images))
    except (TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{file.path} does not describe a run: {error!r}") from error
    for line in () if quiet else lines:
        print(f"{file.path}: {printable(line)}", file=sys.stderr, flush=True)
    return _recorded_ranks(file.description, config, Config(**file.flags), checked)


def _recorded_ranks(
    description: Mapping[str, Any], config: Config, saved: Config, checked: Checked
) -> Ranks | None:
    # A choice by measured times comes out otherwise each time.
    asked = [
        (one.compute.placement, one.compute.measure, one.method.update) for one in (config, saved)
    ]
    ranks = _mapping(description.get("placement")).get("ranks")
    same = asked[0] == asked[1] and is_a_placement(ranks, launched_processes(), checked.names)
    return ranks if same else None


def _other_images(description: Mapping[str, Any], checked: Checked) -> str:
    recorded, ours = description.get("data"), checked.source.fingerprint
    return ours.difference(recorded) if recorded and ours else ""


def _differences(
    asked: Settings,
    description: Mapping[str, Any],
    config: Config,
    checked: Checked,
    modules: Modules,
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
    spread, processes = _spread_matters(config, modules), launched_processes()
    compute = config.compute.differences(saved.compute)
    compute = {name: pair for name, pair in compute.items() if name in _FLAGS}
    if compute:
        yield f"its run {differences_text(compute)}: {_may_differ(compute, spread)}"
    elif (
        _facts(description)["processes"] == processes > 1
        and config.cohort == saved.cohort
        and _recorded_ranks(description, config, saved, checked) is None
    ):
        yield (
            "it does not record which process trained which network: "
            f"{_may_differ(['placement'], spread)}"
        )
    for name, same in (
        ("frozen peers or links", checked.teachers == description["teachers"]),
        ("pretrained weights", _sha256(checked.starts) == _sha256(_starts(description))),
    ):
        if not same:
            yield f"the files of its {name} have changed: {_ANOTHER}"
    if not {"divergence", "target"} & changed.keys():
        for name in changed_sources(checked.registered, description):
            yield f"the source of its {name} has changed: {_ANOTHER}"
    origin = _continued(description)
    if origin and config.run.resume is None:
        yield f"its run continued {origin}, and this one starts untrained: results may differ"
    first = 1
    for until, other in _earlier(description):
        if other:
            steps = f"step {until} was" if first == until else f"steps {first} to {until} were"
            yield f"its {steps} taken {_with(other)}: {_may_differ(other, spread)}"
        first = until + 1
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
    ours: dict[str, Any] = {"processes": processes, "threads": torch.get_num_threads()}
    ours |= {"device": device_record(device)["name"], **versions(), **device_versions(device)}
    for name in dict.fromkeys([*before, *ours]):
        was, now = before.get(name), ours.get(name)
        # Of a GPU the device says it; what a run without a record had is unknown.
        if was != now and name != "gpu" and (name in description["versions"] or was is not None):
            yield f"{name} {was or 'none'}, now {now or 'none'}: {_may_differ([name], spread)}"
    code, today = description.get("commit"), commit()
    if code != today or str(today).endswith("-dirty"):
        yield f"code {code or 'unknown'}, now {today or 'unknown'}: results may differ"


def _with(was: Mapping[str, Any]) -> str:
    if was.get("threads", 0) is None:
        return "with what is not recorded"
    return "with " + ", ".join(f"{name} {value or 'none'}" for name, value in was.items())


def _may_differ(names: Collection[str], spread: str) -> str:
    if "code" in names:
        return "results may differ"
    if spread and not _SPREAD.isdisjoint(names):
        return f"with {spread} that gives another result"
    return _LAST_BITS


def _spread_matters(config: Config, modules: Modules) -> str:
    """Return why results depend on how networks are spread over processes; empty if they do not."""
    if config.numerics.batch_norm == "local":
        return "--batch-norm local"
    rates = (
        getattr(layer, name, None)
        for module in modules.values()
        for layer in module.modules()
        for name in ("p", "prob", "drop_prob", "drop_rate")  # of torch, then of timm
    )
    return "dropout" if any(type(rate) is float and rate > 0 for rate in rates) else ""


def _starts(description: Mapping[str, Any]) -> dict[str, Any]:
    return {one["name"]: one["start"] for one in description.get("peers", ()) if "start" in one}


def _sha256(starts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: start.get("sha256") for name, start in starts.items()}
