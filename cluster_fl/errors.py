"""The two ways a run can end early, each with one line for the user."""

from __future__ import annotations


class ClusterFLError(Exception):
    """Base of every error whose message is meant for the user as it stands (one line, no traceback)."""


class UserError(ClusterFLError):
    """Something the user wrote or chose cannot work; the command exits with code 2.

    Args:
        key: the config key or argument that is wrong, e.g. ``levels.tolerance``.
        value: what it was set to.
        right: what would be right, as a clause ("must be between 0 and 1").
    """

    def __init__(self, key: str, value: object, right: str) -> None:
        super().__init__(f"{key}={value}: {right}")
        self.key, self.value, self.right = key, value, right

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str]]:
        return UserError, (self.key, self.value, self.right)


class RunError(ClusterFLError):
    """The run failed for a reason outside the configuration; the command exits with code 1."""
