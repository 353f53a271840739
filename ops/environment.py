"""What of the caller's environment a job gets.

Ray shows a job's variables to everybody who can reach the dashboard's interface and writes them into its nodes' logs.
So those whose names say that they are secret travel in a file of the job's package instead, which the command in the
job takes in and removes before it does anything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster_fl.errors import UserError
from ops import place

# Without being asked for. Folders of this machine are none of it.
FORWARDED = (
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_NOTES",
    "WANDB_PROJECT",
    "WANDB_RUN_GROUP",
    "WANDB_TAGS",
)
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
FILE = Path(".cluster-fl-secrets.json")


def chosen(names: Sequence[str]) -> dict[str, str]:
    """The variables of :data:`FORWARDED` that are set, and these. Raises UserError if one of these is not."""
    for name in names:
        if name not in os.environ:
            raise UserError("--env", name, "must be the name of a variable that is set.")
    return {name: os.environ[name] for name in (*FORWARDED, *names) if name in os.environ}


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody's business."""
    return any(word in name.upper() for word in SECRET)


def hand_over(variables: Mapping[str, str], job: str, package: Path) -> dict[str, str]:
    """Puts the secret ones into the package; returns the others, which Ray may know."""
    secrets = {name: value for name, value in variables.items() if is_secret(name)}
    if secrets:
        # The job's name makes a package of its own for each: Ray shares one folder among equal ones.
        (package / FILE).write_text(json.dumps({"job": job, "secrets": secrets}), encoding="utf-8")
    return {name: value for name, value in variables.items() if name not in secrets}


def take_over() -> None:
    """In a job: sets what was handed over, and removes the file."""
    if place.in_job() and FILE.exists():
        content = json.loads(FILE.read_text(encoding="utf-8"))
        FILE.unlink()
        os.environ.update(content["secrets"])
