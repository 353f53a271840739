"""Where relative paths begin."""

from __future__ import annotations

import os
from pathlib import Path

# Ray sets it for the command of a job, and for nothing else.
JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def in_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return JOB_MARK in os.environ


def start() -> Path:
    """The folder that the command was called in; in a job, whose folder is a throw-away copy, the home folder."""
    return Path.home() if in_job() else Path.cwd()
