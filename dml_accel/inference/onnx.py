"""One file model.onnx of a network or of an ensemble, compared with torch before it is kept.

Shape letters: K networks, B images, S pixels a side, C classes.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_accel.core.config import UsageError
from dml_accel.core.rng import generator

FILE = "model.onnx"
INPUT, LOGITS, LOG_MEAN = "input", "logits", "log_mean_posterior"
MOST_DIFFERENCE = 1e-4  # relative to the largest value
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_MOST_BYTES = 2**31 - 2**24  # one file of the format holds 2 GiB
_COMPARED = (1, 2, 5)  # images of a batch; the graph is traced with 2


class Ensemble(nn.Module):
    """Networks that answer together: from images to the log of their mean posterior."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to log probabilities [B, C]."""
        log_p = torch.stack([F.log_softmax(net(x), dim=-1) for net in self.nets])
        return log_p.logsumexp(0) - math.log(len(self.nets))


def require_installed() -> None:
    """Refuse where the libraries are missing.

    Raises:
        UsageError: one is.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}: pip install 'dml-accel[onnx]'")


def write(net: nn.Module, size: int, output: str, path: Path) -> float:
    """Write a network as ONNX and run the file beside it.

    Args:
        net: on the CPU, in evaluation mode, of single precision.
        size: S, pixels a side of its inputs.
        output: what the graph calls what it returns.
        path: of the file.

    Returns:
        The largest difference between both, relative to the largest value.

    Raises:
        UsageError: the exporter does not know the network, it is too large, or what the file
            computes differs by more than ``MOST_DIFFERENCE``.
    """
    stored = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    if stored > _MOST_BYTES:
        raise UsageError(f"{stored:,} bytes of weights are more than one {FILE} holds (2 GiB)")
    example = torch.zeros(2, 3, size, size)
    try:
        with torch.no_grad():
            torch.onnx.export(
                net,
                (example,),
                str(path),
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # every stage of the exporter raises its own kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise UsageError(
            f"the network cannot be written as ONNX ({type(error).__name__}: {reason.strip()}); "
            "use --format safetensors"
        ) from error
    found = difference(net, size, path)
    if not found <= MOST_DIFFERENCE:
        raise UsageError(
            f"what {FILE} computes differs from torch by {found:.1e} of the largest value, which "
            f"is more than {MOST_DIFFERENCE:.0e}; it is not kept"
        )
    return found


@torch.no_grad()
def difference(net: nn.Module, size: int, path: Path) -> float:
    """Return by how much a file's outputs differ from a network's, relative to the largest.

    Compared on normalised noise, in batches of several sizes.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in _COMPARED:
        x = torch.randn(rows, 3, size, size, generator=generator("onnx", rows))
        expected = net(x)
        found = torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])
        if found.shape != expected.shape:
            return math.inf
        gap = ((found - expected).abs().max() / expected.abs().max()).item()
        worst = gap if math.isnan(gap) else max(worst, gap)
        if math.isnan(worst):
            return worst
    return worst
