"""The methods, by the name that a configuration gives."""

from __future__ import annotations

from importlib import import_module

from cluster_fl.config import choose
from cluster_fl.methods.base import Method, Setting

NAMES = (
    "fedavg",
    "decoupled",
    "fedprox",
    "heterofl",
    "scalefl",
    "nefl",
    "nestfl",
    "fedrolex",
    "feddropout",
    "fjord",
    "depthfl",
    "inclusivefl",
    "fiarse",
    "feddf",
    "perfedavg",
    "hermes",
    "scaffold",
    "fedopt",
    "feddrop",
)

__all__ = ["NAMES", "Method", "Setting", "get"]


def get(name: str) -> Method:
    """Raises UserError, naming the nearest one, for a method that does not exist."""
    choose("method", name, NAMES)
    method: Method = import_module(f"cluster_fl.methods.{name}").METHOD
    return method
