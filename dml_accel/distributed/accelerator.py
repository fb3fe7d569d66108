"""An accelerator of HF Accelerate that belongs to one run, whatever others the process has.

Accelerate keeps device and precision in two dictionaries of the whole process, so that a second run
there, or the user's own ``Accelerator``, could not have others.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

_SHARED = (AcceleratorState, PartialState)


class OwnAccelerator(Accelerator):
    """An accelerator with a state of its own; ``release`` it at the end of the run."""

    def __init__(self, **options: Any) -> None:
        self._own: list[dict[str, Any]] = [{} for _ in _SHARED]
        with self._in_place():
            super().__init__(**options)

    def prepare_model(self, *args: Any, **options: Any) -> nn.Module:
        """As Accelerate does, in the precision of this accelerator."""
        with self._in_place():
            return super().prepare_model(*args, **options)

    def release(self) -> None:
        """Let the process forget this accelerator's device and precision."""
        for kind, own in zip(_SHARED, self._own, strict=True):
            if kind._shared_state is own:
                kind._shared_state = {}

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        others = [kind._shared_state for kind in _SHARED]
        for kind, own in zip(_SHARED, self._own, strict=True):
            kind._shared_state = own
        try:
            yield
        finally:
            for kind, other in zip(_SHARED, others, strict=True):
                # Where there is no other, ours stays: trackers ask for it during the run.
                if other:
                    kind._shared_state = other
