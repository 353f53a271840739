"""How a schema declares an option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, is_dataclass
from typing import Any


def option(
    default: Any,
    about: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    infinite: bool = False,
) -> Any:
    """A field with its meaning and its range: ``low <= value``, ``above < value``, ``value <= high``.

    ``infinite``: plus infinity is a value too.
    """
    metadata = {
        "about": about,
        "low": low,
        "above": above,
        "high": high,
        "choices": tuple(choices),
        "infinite": infinite,
    }
    if isinstance(default, list | dict) or (isinstance(default, type) and is_dataclass(default)):
        make = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=make, metadata=metadata)
    return field(default=default, metadata=metadata)
