"""ONNX files of a network or an ensemble, compared with torch before they are kept.

Shape letters: K networks, B images, S pixels per side, C classes.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_accel.core.errors import UsageError
from dml_accel.core.rng import generator
from dml_accel.core.versions import torch_release

FILE = "model.onnx"
INPUT, LOGITS, LOG_MEAN = "input", "logits", "log_mean_posterior"
LARGEST_DIFFERENCE = 1e-4  # relative to the largest value
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_MOST_BYTES = 2**31 - 2**24  # a single file of the format holds at most 2 GiB
# With torch 2.6 no network of a batch of any size can be written; what is between was not tried.
_EXPORTER_IS_TESTED = torch_release() >= (2, 11)
_BATCH_SIZES = (1, 2, 5)  # compared with torch; the graph is traced with 2


class Ensemble(nn.Module):
    """Several networks as one module, from images to the log of their mean posterior."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to log probabilities [B, C]."""
        log_p = torch.stack([F.log_softmax(net(x), dim=-1) for net in self.nets])  # [K, B, C]
        return log_p.logsumexp(0) - math.log(len(self.nets))


def write_onnx(net: nn.Module, shape: Sequence[int], output: str, path: Path) -> float:
    """Write a network as ONNX, and run the file to compare it with torch.

    Args:
        net: on the CPU, in evaluation mode and single precision.
        shape: of one of its inputs, such as (3, S, S).
        output: name of the graph's output.
        path: of the file.

    Returns:
        The largest difference between the two, relative to the largest value.

    Raises:
        UsageError: the exporter does not support the network, the network is too large, or the
            outputs differ by more than ``LARGEST_DIFFERENCE``.
    """
    stored = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    if stored > _MOST_BYTES:
        raise UsageError(f"{stored:,} bytes of weights do not fit into one {FILE} (2 GiB)")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The exporter may be older than the packages that it uses, which a user cannot mend.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                net,
                (torch.zeros(2, *shape),),
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
            f"torch {torch.__version__} cannot write the network as ONNX "
            f"({type(error).__name__}: {reason.strip()}); use --format safetensors"
            f"{'' if _EXPORTER_IS_TESTED else ', or torch 2.11 or newer'}"
        ) from error
    difference = measure_difference(net, shape, path)
    if not difference <= LARGEST_DIFFERENCE:  # NaN, too
        raise UsageError(
            f"the outputs of {FILE} differ from torch by {difference:.1e} of the largest value, "
            f"which is more than {LARGEST_DIFFERENCE:.0e}: the file is not kept"
        )
    return difference


@torch.no_grad()
def measure_difference(net: nn.Module, shape: Sequence[int], path: Path) -> float:
    """Return the largest difference between a file and its network, relative to the largest value.

    Both receive normal noise in batches of several sizes. NaN if an output is NaN, infinity if a
    shape differs.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in _BATCH_SIZES:
        x = torch.randn(rows, *shape, generator=generator("onnx", rows))
        expected = net(x)
        actual = torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])
        if actual.shape != expected.shape:
            return math.inf
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        if math.isnan(difference):  # max() would drop it
            return difference
        worst = max(worst, difference)
    return worst
