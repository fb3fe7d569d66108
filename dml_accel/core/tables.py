"""What finished runs have to say: results.md and the tables on the screen."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from dml_accel.core.config import Config
from dml_accel.distributed.plan import Machine, Prediction

_HEADERS = ("network", "parameters", "top-1 %", "top-5 %", "NLL (nats)", "ECE %")


def table(rows: list[list[Any]], headers: Sequence[str], style: str, left: int) -> str:
    """Return a table whose first ``left`` columns are words and whose others are numbers."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers, tablefmt=style, colalign=align, disable_numparse=True)


def results_table(results: dict[str, Any], style: str = "simple") -> str:
    """Return the metrics of every peer and the ensemble as a table (``style`` is tabulate's)."""
    rows = [[p["name"], f"{p['params']:,}", *_cells(p["test"])] for p in results["peers"]]
    rows.append(["ensemble", "", *_cells(results["ensemble"])])
    return table(rows, _HEADERS, style, left=1)


def _cells(metrics: dict[str, Any]) -> list[str]:
    shares = [percent(metrics["top1"]), percent(metrics["top5"])]
    nll = "-" if metrics["nll"] is None else f"{metrics['nll']:.4f}"
    return [*shares, nll, percent(metrics["ece"])]


def percent(share: float | None) -> str:
    """Return a share in percent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f}"


def printable(text: str) -> str:
    """Return a stranger's text as a terminal may show it: one line, no control sequences."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def results_markdown(results: dict[str, Any], config: dict[str, Any], command: str) -> str:
    """Return results.md: the table, and what it takes to repeat it."""
    agreement = ""
    if results["agreement"] is not None:
        agreement = (
            f"\nTwo peers predict the same class on {percent(results['agreement'])}% of the "
            "images (mean over pairs)."
        )
    seed = f"seed {results['seed']}. The ensemble is the mean posterior.{agreement}"
    rate = results["throughput"]["images_per_second"]
    sent = ", ".join(f"{size / 1e3:.1f}" for size in results["sent_bytes_per_step"])
    placed = "; ".join(
        f"{name} on {', '.join(map(str, ranks))}"
        for name, ranks in results["placement"]["ranks"].items()
    )
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    return f"""# {" + ".join(peer["name"] for peer in results["peers"])} on {config["dataset"]}

{results_table(results, "github")}

Test split, {results["ensemble"]["n"]:,} images, after the last of {results["steps"]:,} steps
({results["epochs"]} epochs configured), {seed}

- Command: `{command}`
- {results["world_size"]} process(es) on {results["device"]}, precision
  {results["mixed_precision"]}, {"-" if rate is None else f"{rate:.0f}"} images per second
- Placement {results["placement"]["kind"]}: {placed}; kB that each process sends a step: {sent}
- {versions}
"""


# ---------------------------------------------------------------- plans


def plan_text(
    predictions: tuple[Prediction, Prediction],
    why: str,
    config: Config,
    classes: int,
    machine: Machine,
) -> str:
    """Return both placements process by process, and which one is chosen.

    Args:
        predictions: of ``replicate`` and of ``split``.
        why: the choice in one line.
        config: of the run.
        classes: of the images.
        machine: what was assumed.
    """
    parts = []
    headers = ("process", "peers", "busy ms", "idle %", "sends kB a step", "memory MB")
    for kind, found in zip(("replicate", "split"), predictions, strict=True):
        rows = []
        for rank, busy in enumerate(found.busy):
            rows.append(
                [
                    rank,
                    " ".join(name for name, held in found.ranks.items() if rank in held),
                    f"{1e3 * busy:.1f}",
                    f"{100 * found.idle[rank]:.0f}",
                    f"{found.sent[rank] / 1e3:.1f}",
                    f"{found.memory[rank] / 1e6:.0f}",
                ]
            )
        parts.append(
            f"{kind}: {1e3 * found.step_seconds:.1f} ms a step\n\n"
            + table(rows, headers, "simple", left=2)
        )
    assumed = (
        "networks timed here"
        if config.measure
        else (
            f"{machine.macs_per_second / 1e9:.0f} billion multiply-accumulates a second a process"
        )
    )
    parts.append(
        f"{config.batch_size} images of {config.image_size} pixels a step, {classes} classes; "
        f"assumed: {assumed}, {machine.bandwidth / 1e9:g} GB/s, "
        f"{1e6 * machine.latency:.0f} us a message.\n"
        "Memory is parameters, gradients, momentum and activations, without images and libraries."
    )
    parts.append(f"--placement {config.placement}: {why}")
    return "\n\n".join(parts)
