"""Deep Mutual Learning (Zhang et al., CVPR 2018): networks that teach each other.

    core         configuration, errors, files, keyed randomness; no package of ours is below it
    data         data sets, decoding, batches
    models       our networks, specifications of peers, building, optimizer, folders of peers
    distributed  launch checks, process group, placement, batch norm, compilation, planning
    mutual       losses, metrics, peers, teaching, and one optimizer step by each update schedule
    training     the loop, checkpoints, run folders, resuming; one run from top to bottom
    inference    trained networks: load, evaluate, predict, export
    analysis     methods, comparisons over seeds, statistics, tables, plots, the report
    api          what Python users call: the commands as functions, methods of their own
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
    from dml_accel.api.methods import register_divergence as register_divergence
    from dml_accel.api.methods import register_method as register_method
    from dml_accel.api.methods import register_target as register_target
    from dml_accel.api.runs import Comparison as Comparison
    from dml_accel.api.runs import Run as Run
    from dml_accel.api.runs import compare as compare
    from dml_accel.api.runs import train as train
    from dml_accel.api.trained import Networks as Networks
    from dml_accel.api.trained import evaluate as evaluate
    from dml_accel.api.trained import export as export
    from dml_accel.api.trained import load as load
    from dml_accel.api.trained import predict as predict
    from dml_accel.core.config import Config as Config
    from dml_accel.core.errors import DivergedError as DivergedError
    from dml_accel.core.errors import RunError as RunError
    from dml_accel.core.errors import StoppedError as StoppedError
    from dml_accel.core.errors import UsageError as UsageError
    from dml_accel.models import networks as networks
    from dml_accel.mutual.divergences import Divergence as Divergence
    from dml_accel.mutual.gathering import gather_logits as gather_logits
    from dml_accel.mutual.losses import Losses as Losses
    from dml_accel.mutual.losses import mutual_loss as mutual_loss
    from dml_accel.mutual.targets import Target as Target
    from dml_accel.training.learn import learn as learn
    from dml_accel.training.loop import EvaluationRecord as EvaluationRecord
    from dml_accel.training.loop import StepRecord as StepRecord

# Where each public name lies; its module is imported when the name is first used.
_PUBLIC = {
    "Comparison": "api.runs",
    "Config": "core.config",
    "DivergedError": "core.errors",
    "Divergence": "mutual.divergences",
    "EvaluationRecord": "training.loop",
    "Losses": "mutual.losses",
    "Networks": "api.trained",
    "Run": "api.runs",
    "RunError": "core.errors",
    "StepRecord": "training.loop",
    "StoppedError": "core.errors",
    "Target": "mutual.targets",
    "UsageError": "core.errors",
    "compare": "api.runs",
    "evaluate": "api.trained",
    "export": "api.trained",
    "gather_logits": "mutual.gathering",
    "learn": "training.learn",
    "load": "api.trained",
    "mutual_loss": "mutual.losses",
    "networks": "models",
    "predict": "api.trained",
    "register_divergence": "api.methods",
    "register_method": "api.methods",
    "register_target": "api.methods",
    "train": "api.runs",
}
__all__ = ["__version__", *_PUBLIC]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "networks":
        return importlib.import_module("dml_accel.models.networks")
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"dml_accel.{_PUBLIC[name]}"), name)
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
