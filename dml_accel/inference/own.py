"""Export of a network that ``learn`` has trained, with the module that its author brings."""

import copy
import shutil
from pathlib import Path

from torch import nn

from dml_accel.core.errors import UsageError
from dml_accel.core.files import write_json
from dml_accel.inference import onnx
from dml_accel.inference.export import check_target, filling
from dml_accel.models.own_network import CARD, WEIGHTS, load_own, read_own
from dml_accel.models.timm_config import FILE
from dml_accel.training.run_folder import WEIGHTS as FOLDERS


def find_own(path: Path, peer: str | None, weights: str = "last") -> Path:
    """Return the folder of a network that ``learn`` has trained.

    Args:
        path: of a run, or the folder itself.
        peer: its name; None for the only one.
        weights: which weights of a run.

    Raises:
        UsageError: there is no such network; the text names those that there are.
    """
    if (path / WEIGHTS).is_file():
        read_own(path)
        return path
    found = sorted(one.parent for one in (path / FOLDERS[weights]).glob(f"*/{WEIGHTS}"))
    names = [one.name for one in found]
    if not names:
        raise UsageError(f"{path} holds no network with {FOLDERS[weights]}/<name>/{WEIGHTS}")
    if peer is None and len(names) > 1:
        raise UsageError(f"{path} has {len(names)} networks: choose with peer= {', '.join(names)}")
    name = names[0] if peer is None else peer
    if name not in names:
        raise UsageError(f"peer={name!r}: {path} has no such network; it has {', '.join(names)}")
    folder = path / FOLDERS[weights] / name
    read_own(folder)
    return folder


def export_own(folder: Path, network: nn.Module, to: Path, style: str = "safetensors") -> str:
    """Write a network that ``learn`` has trained into a new folder; return a line that says so.

    Args:
        folder: of the network; see ``find_own``.
        network: its module, which gets the trained weights.
        to: a new or empty folder.
        style: ``safetensors`` or ``onnx``.

    Raises:
        UsageError: the weights are not those of the module, or its ONNX file would differ from it.
    """
    check_target(to)
    with filling(to) as temporary:
        return write_own_export(folder, network, temporary, style)


def write_own_export(folder: Path, network: nn.Module, to: Path, style: str) -> str:
    """Write the files of ``export_own`` into a folder that exists."""
    own = read_own(folder)
    load_own(folder, network)
    network.eval()
    for name in (CARD, FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)
    if style == "safetensors":
        shutil.copyfile(folder / WEIGHTS, to / WEIGHTS)
        return f"{folder.name} as {WEIGHTS}, {FILE}, {CARD}: its class, {own.kind}, is not in them"
    net = copy.deepcopy(network).cpu().float().eval()
    path = to / onnx.FILE
    difference = onnx.write_onnx(net, own.shape, onnx.LOGITS, path)
    graph = {
        "num_classes": own.classes,
        "onnx": {
            "file": onnx.FILE,
            "input": {"name": onnx.INPUT, "type": "float32", "shape": ["batch", *own.shape]},
            "output": {"name": onnx.LOGITS, "type": "float32", "shape": ["batch", own.classes]},
        },
    }
    if own.normalisation is not None:
        graph |= {"mean": list(own.normalisation.mean), "std": list(own.normalisation.std)}
    write_json(to / FILE, graph)
    return (
        f"{folder.name} as {onnx.FILE} ({path.stat().st_size:,} bytes); largest difference to "
        f"torch {difference:.1e} of the largest value"
    )
