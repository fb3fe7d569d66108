"""Deep Mutual Learning (Zhang et al., CVPR 2018): networks that teach each other.

Importing the package registers its networks with timm. ``learn`` trains networks of one's own; it
and the rest of ``api`` are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from dml_accel.models import networks

if TYPE_CHECKING:
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
    if name in __all__:
        from dml_accel.training import learn as api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
