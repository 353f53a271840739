"""Whether a run's folder is the run that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from cluster_fl.compose import INCIDENTAL, fingerprint
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.records import RunFolder


def is_begun(folder: RunFolder, config: Config, name: str, what: str) -> bool:
    """Whether ``folder`` holds the run of ``config``, so that it can go on; False if it holds none.

    Args:
        name: the ``run.name`` that the user gave.
        what: what was asked for ("run", "comparison"), for the message.

    Raises:
        UserError: the folder holds another run, or one that cannot be told.
    """
    if not folder.config_file.exists():
        folder.refuse_existing()
        return False
    try:
        before = folder.config()
    except UserError as error:
        why = f"whose config.yaml cannot be used ({error})"
    else:
        if fingerprint(before) == fingerprint(config):
            return True
        why = f"of another configuration ({', '.join(_differences(before, config))})"
    right = f"{folder.path} holds a run {why}; give this {what} another run.name, or delete that folder."
    raise UserError("run.name", name, right)


def keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values, sections included."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{key}.")


def value_at(node: Any, key: str) -> Any:
    """The value under a dotted key; None if there is none."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _differences(before: Config, after: Config) -> list[str]:
    """The first few keys in which two configurations differ, other than where and how fast they run."""
    one, other = asdict(before), asdict(after)
    ignored = (*INCIDENTAL, "run")
    found = [
        key
        for key in dict.fromkeys((*keys(one), *keys(other)))
        if value_at(one, key) != (value := value_at(other, key))
        and not isinstance(value, Mapping)
        and not any(key == skip or key.startswith(f"{skip}.") for skip in ignored)
    ]
    return [*found[:3], "..."] if len(found) > 3 else found
