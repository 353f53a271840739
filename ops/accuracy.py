"""Reading the accuracy blocks of records and summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("global", "local", "worst", "personal")


def last_exit(accuracy: Mapping[str, Any], name: str) -> float | None:
    """The fraction that the last exit answers right; None where a method has no such model or nobody was asked."""
    block = accuracy.get(name)
    return None if block is None else block["last_exit"]
