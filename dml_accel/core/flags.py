"""What a flag is: its default, help and range; intervals; sections of flags. No torch here."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dml_accel.core.errors import UsageError

IntervalUnit = Literal["step", "ep", "min"]
Differences = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Range:
    """The values that a finite number may have."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        ends = {name: end for name, end in vars(self).items() if math.isfinite(end)}
        return " and ".join(f"{name.replace('_', ' ')} {end:,}" for name, end in ends.items())


def flag(
    default: Any, text: str | Callable[[], str], allowed: Range | None = None, **argparse: Any
) -> Any:
    """Return a dataclass field that is one flag of the command line.

    Args:
        default: its value where it is not given.
        text: its help, with the unit; or a function that returns it when it is shown, for what
            users may add choices to.
        allowed: the range of a number (default: any finite number).
        argparse: further arguments of ``add_argument``, such as ``choices``.
    """
    metadata = {"help": text, "range": allowed or Range(), "argparse": argparse}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Interval:
    """How often something happens: every ``count`` optimizer steps, epochs or minutes."""

    count: float
    unit: IntervalUnit

    @classmethod
    def parse(cls, text: str, name: str) -> "Interval":
        """Read ``500`` (optimizer steps), ``2ep`` (epochs) or ``10min`` (minutes).

        Raises:
            UsageError: the text is none of the three, or the number is not positive.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|min)?", text.strip())
        unit: Any = (match[2] or "step") if match else "step"
        count = float(match[1]) if match else 0.0
        if count <= 0 or (unit != "min" and count != int(count)):
            raise UsageError(
                f"{name} {text!r} is not an interval: write optimizer steps (500), epochs (1ep) "
                "or minutes (10min)"
            )
        return cls(count, unit)

    def steps(self, steps_per_epoch: int) -> int:
        """Return the interval in optimizer steps; 0 if it is in minutes."""
        return {"step": 1, "ep": steps_per_epoch, "min": 0}[self.unit] * int(self.count)

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether the interval ends with optimizer step ``step``; never if it is in minutes."""
        period = self.steps(steps_per_epoch)
        return period > 0 and step % period == 0


def help_of(field: dataclasses.Field[Any]) -> str:
    """Return the help of a flag."""
    text = field.metadata["help"]
    return str(text() if callable(text) else text)


def check_value(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value that is out of its range, or not one of its choices."""
    choices = field.metadata["argparse"].get("choices")
    if choices and value is not None:
        hint = own_hint(field.name)
        require(value in choices, field.name, value, f"one of {', '.join(choices)}{hint}")
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, (int, float)) and not isinstance(one, bool):
            require(abs(one) < math.inf, field.name, one, "a finite number")
            shown = reprlib.repr(one)  # a whole number may have thousands of digits
            require(one in field.metadata["range"], field.name, shown, field.metadata["range"])
            fits = isinstance(one, float) or abs(one) < 2**63
            require(fits, field.name, shown, f"below {2**63:,}")


def differences_of(mine: object, other: object, names: Iterable[str]) -> Differences:
    """Return the attributes that differ, {name: (mine, the other's)}."""
    pairs = ((name, getattr(mine, name), getattr(other, name)) for name in names)
    return {name: (one, two) for name, one, two in pairs if one != two}


def own_hint(name: str) -> str:
    """Return how a flag takes more values than those of the package; empty if it does not."""
    if name not in ("divergence", "target", "methods"):
        return ""
    return " (for one of your own, start from the file that registers it: python FILE.py ...)"


def require(holds: bool, name: str, value: object, allowed: object) -> None:
    """Refuse the value of a flag that is not allowed."""
    refuse(not holds, f"--{name.replace('_', '-')} is {value}; it must be {allowed}")


def refuse(conflict: bool, text: str) -> None:
    """Refuse what contradicts itself, with this text."""
    if conflict:
        raise UsageError(text)


@dataclass(frozen=True)
class Section:
    """Fields that are read together and have the same effect on the result."""

    title: ClassVar[str]
    changes_result: ClassVar[bool]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Refuse values of this section that exclude each other."""

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the section's flags."""
        return [field.name for field in dataclasses.fields(cls)]

    def differences(self, other: "Section") -> Differences:
        """Return the fields that differ, {name: (mine, the other's)}."""
        return differences_of(self, other, self.names())

    def refused_on_resume(self, saved: "Section") -> Differences:
        """Return the differences to a saved run that forbid resuming it."""
        return self.differences(saved) if self.changes_result else {}
