"""Where a run begins: untrained, or from a checkpoint, in every process alike."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml_accel.core.config import Config, UsageError
from dml_accel.distributed.processes import Processes
from dml_accel.training.agenda import Start
from dml_accel.training.setup import Checked


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        path: the checkpoint; None where it begins untrained.
        state: the content of its state.json.
    """

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def start(self, checkpoints: Path) -> Start:
        """Return what the peers have behind them, for a run that keeps its own in a folder."""
        if not self.path:
            return Start()
        here = self.path.resolve().parent == checkpoints.resolve()
        return Start(self.state["step"], self.state["lost"], here)

    def ranks(self, config: Config, world_size: int) -> dict[str, list[int]] | None:
        """Return the placement of the checkpoint where this run may have the same."""
        if not self.path or self.state["world_size"] != world_size:
            return None
        placement = self.state["placement"]
        known = config.placement in ("auto", placement["kind"])
        return dict(placement["ranks"]) if known else None

    def compiled(self, config: Config, world_size: int) -> list[str] | None:
        """Return which peers were compiled where this run is to do as it did."""
        if self.ranks(config, world_size) is None:
            return None
        same = self.state["config"].get("compile", "off") == config.compile
        return list(self.state["compiled"]) if same else None

    def agreed(self, processes: Processes) -> "Origin":
        """Return rank 0's origin in every process."""
        text = processes.text_of_first(json.dumps([str(self.path or ""), self.state]))
        path, state = json.loads(text)
        return Origin(Path(path) if path else None, state)


def with_starts(checked: Checked, origin: Origin) -> Checked:
    """Return what the peers started from once, where the run goes on from a checkpoint.

    Raises:
        UsageError: the checkpoint for which no weights to start from were read is gone.
    """
    if origin.path:
        return dataclasses.replace(checked, starts=origin.state["starts"])
    begun = checked.starts.keys()
    missing = [s.name for s in checked.specs if s.start is not None and s.name not in begun]
    if missing:
        raise UsageError(f"the checkpoint that holds {', '.join(missing)} is gone; start again")
    return checked
