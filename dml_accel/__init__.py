"""Deep Mutual Learning (Zhang et al., CVPR 2018): networks that teach each other.

    core         configuration, errors, files, keyed randomness; no package of ours is below it
    data         data sets, decoding, batches
    models       our networks, specifications of peers, building, optimizer, folders of peers
    distributed  launch checks, process group, placement, batch norm, compilation, planning
    mutual       losses, metrics, peers, teaching, and one optimizer step by each update schedule
    training     the loop, checkpoints, run folders, resuming; one run from top to bottom
    inference    trained networks: load, evaluate, predict, export
    analysis     methods, comparisons over seeds, statistics, tables, plots, the report
    cli          flags and commands

A package imports only from those above it in this list. ``import dml_accel`` imports neither torch
nor timm, yet timm knows our networks afterwards (see ``_register_networks``). ``learn`` and what
goes with it are imported when they are first used.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dml_accel.models import networks
    from dml_accel.training.learn import Config, EvaluationRecord, StepRecord, UsageError, learn

__all__ = [
    "Config",
    "EvaluationRecord",
    "StepRecord",
    "UsageError",
    "__version__",
    "learn",
    "networks",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "networks":
        from dml_accel.models import networks

        return networks
    if name in ("Config", "UsageError"):
        from dml_accel.core import config

        return getattr(config, name)
    if name in __all__:
        from dml_accel.training import learn as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _AfterTimm:
    """A finder on ``sys.meta_path`` that registers our networks once timm has been imported."""

    _asks_others = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find timm as the other finders do; its loader then imports our networks as well."""
        if name != "timm" or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks_others = False
        # This finder stays until timm is imported: many libraries only ask whether it is installed.
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module("dml_accel.models.networks")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_networks() -> None:
    """Register our networks with timm: now if it is imported, else when it is."""
    if "timm" in sys.modules:
        importlib.import_module("dml_accel.models.networks")
    else:
        sys.meta_path.insert(0, _AfterTimm())


_register_networks()
