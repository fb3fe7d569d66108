"""What a finished run has to say: results.json, results.md and the table on the screen."""

from typing import Any

from tabulate import tabulate

_HEADERS = ("network", "parameters", "top-1 %", "top-5 %", "NLL (nats)", "ECE %")


def results_table(results: dict[str, Any], style: str = "simple") -> str:
    """Return the metrics of every peer and the ensemble as a table (``style`` is tabulate's)."""
    rows = [[p["name"], f"{p['params']:,}", *_cells(p["test"])] for p in results["peers"]]
    rows.append(["ensemble", "", *_cells(results["ensemble"])])
    align = ("left", *["right"] * (len(_HEADERS) - 1))
    return tabulate(rows, _HEADERS, tablefmt=style, colalign=align, disable_numparse=True)


def _cells(metrics: dict[str, Any]) -> list[str]:
    shares = [_percent(metrics["top1"]), _percent(metrics["top5"])]
    nll = "-" if metrics["nll"] is None else f"{metrics['nll']:.4f}"
    return [*shares, nll, _percent(metrics["ece"])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def results_markdown(results: dict[str, Any], config: dict[str, Any], command: str) -> str:
    """Return results.md: the table, and what it takes to repeat it."""
    agreement = ""
    if results["agreement"] is not None:
        agreement = (
            f"\nTwo peers predict the same class on {_percent(results['agreement'])}% of the "
            "images (mean over pairs)."
        )
    seed = f"seed {results['seed']}. The ensemble is the mean posterior.{agreement}"
    rate = results["throughput"]["images_per_second"]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    return f"""# {" + ".join(peer["name"] for peer in results["peers"])} on {config["dataset"]}

{results_table(results, "github")}

Test split, {results["ensemble"]["n"]:,} images, after the last of {results["steps"]:,} steps
({results["epochs"]} epochs configured), {seed}

- Command: `{command}`
- {results["world_size"]} process(es) on {results["device"]}, precision
  {results["mixed_precision"]}, {"-" if rate is None else f"{rate:.0f}"} images per second
- {versions}
"""
