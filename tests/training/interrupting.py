"""A small run, interrupted at a chosen moment and compared with one that was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dml_accel.training import checkpoint
from dml_accel.training.run_folder import RunFolder
from tests import helpers
from tests.helpers import assert_same_state, load, status_of

# 5 steps per epoch; every third step a checkpoint, every fourth an evaluation.
WORDS = (
    "--cohort timm:test_efficientnet resnet8 --dataset digits --image-size 8 --train-limit 45 "
    "--batch-size 8 --epochs 3 --lr 0.05 --lr-step 2 --grad-accum 2 --clip-norm 1 "
    "--val-fraction 0.02 --save-every 3 --eval-every 4 --cpu"
).split()
NAMES = ("resnet8-0", "test_efficientnet-0")
# The same with averages, best weights and an early stop; an evaluation after every step.
CHOOSING = (
    "--cohort resnet8*2 --ema 0.9 --teach-with ema --keep best --early-stop 2 --eval-every 1"
).split()


class KilledError(BaseException):
    """The end of the process, as far as the run can tell: it catches nothing of this kind."""


def train(folder: Path, *words: str) -> int:
    return helpers.train(folder, *WORDS, "--resume", "auto", *words)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The content of every file, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_same_run(folder: Path, straight: Path) -> None:
    """Weights, buffers, momentum and results are equal; both runs are done."""
    for name in NAMES:
        weights = (path / "peers" / name / "model.safetensors" for path in (folder, straight))
        assert_same_state(*map(load_file, weights))
        last = (
            path / f"checkpoints/step-00000015/{name}.safetensors" for path in (folder, straight)
        )
        assert_same_state(*map(load_file, last))
    for part in ("peers", "ensemble", "agreement", "steps"):
        assert load(folder / "results.json")[part] == load(straight / "results.json")[part]
    assert status_of(folder) == {"status": "done", "reason": None, "step": 15}


def on_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Callable[[], object]
) -> None:
    """Act when ``owner.name`` is called for the ``call``-th time, before the call."""
    whole, calls = getattr(owner, name), [0]

    def acting(*words: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            act()
        return whole(*words, **named)

    monkeypatch.setattr(owner, name, acting)


def killed(folder: Path, owner: Any, name: str, call: int, *words: str) -> None:
    """Train until ``owner.name`` is called for the ``call``-th time; leave what a kill leaves."""

    def die() -> None:
        raise KilledError

    def leave(self: RunFolder, *_: object) -> None:
        """Close the files as the system does: a killed process does not write its status."""
        self._status.close()
        self._lock.close()
        if self._metrics:
            self._metrics.close()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        on_call(patch, owner, name, call, die)
        patch.setattr(RunFolder, "__exit__", leave)
        train(folder, *words)


def forged(folder: Path, **changes: Any) -> None:
    """Change state.json and its sha256, as an attacker could."""
    path = folder / "state.json"
    state = load(path) | changes
    state.pop("sha256")
    state = {name: value for name, value in state.items() if value is not None}
    sha256 = checkpoint._sha256(checkpoint._dump(state))
    path.write_bytes(checkpoint._dump(state | {"sha256": sha256}))
