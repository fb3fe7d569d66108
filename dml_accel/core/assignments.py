"""Words that are ``key=value``: ``--opt-args``, ``--peer-opt``, and what stands in brackets."""

import ast
import re
from collections.abc import Mapping
from typing import Any

from dml_accel.core.errors import UsageError
from dml_accel.core.flags import refuse


def assignment(flag: str, text: str) -> tuple[str, str]:
    """Return the two sides of ``key=value``, with the key as Python writes it."""
    name, equals, value = text.partition("=")
    if not (equals and name.strip() and value.strip()):
        raise UsageError(f"{flag} {text!r} is not KEY=VALUE, such as eps=1e-6")
    return name.strip().replace("-", "_"), value.strip()


def pairs_in(text: str) -> list[str]:
    """Return the parts of ``key=value,key=value``."""
    # A comma within a value, as in betas=0.9,0.95 or scale=(0.2,1), is followed by no key.
    return re.split(r",(?=\s*[A-Za-z_][\w-]*\s*=)", text)


def literal(text: str) -> Any:
    """Return the number, tuple or other literal of Python that a text is; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a plain word, as in interpolation=bilinear


def refuse_repeated(flag: str, keys: list[str]) -> None:
    """Refuse keys of which one is there twice."""
    twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
    refuse(twice is not None, f"{flag} gives {twice} twice: once is meant")


def number_of(flag: str, name: str, value: str) -> float:
    """Return a value as a number, or refuse it."""
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"{flag}: {name} is {value!r}; it must be a number") from None


def peer_settings(text: str) -> tuple[str, dict[str, str]]:
    """Return a peer's name and its settings, from ``--peer-opt NAME:key=value,key=value``.

    Raises:
        UsageError: it is not written so.
    """
    name, colon, rest = text.partition(":")
    if not (colon and name.strip() and rest.strip()):
        raise UsageError(f"--peer-opt {text!r} is not PEER:KEY=VALUE, such as mobilenet-0:lr=0.01")
    pairs = [assignment(f"--peer-opt {name}:", part) for part in pairs_in(rest)]
    refuse_repeated(f"--peer-opt {name}:", [key for key, _ in pairs])
    return name.strip(), dict(pairs)


def peer_text(name: str, settings: Mapping[str, str]) -> str:
    """Return what ``peer_settings`` reads back."""
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in settings.items())
