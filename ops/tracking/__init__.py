"""Where a run is shown besides its folder: W&B or TensorBoard.

A tracker gets the driver's events, as the screen does. It works in a thread of its own, never raises, and holds
nothing that the run folder does not have: whatever it missed, the next one tells from ``rounds.jsonl``.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import TracebackType
from typing import Protocol

from actors.events import Event
from cluster_fl.config import Config, TrackingConfig
from cluster_fl.errors import UserError
from cluster_fl.records import RunFolder
from ops.tracking.behind import Behind, Nowhere

# tracking.name -> the package that it needs.
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX"}


class Tracker(Protocol):
    """Events in. Neither method raises, and ``show`` returns at once."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None:
        """Ends it: waits a bounded time for what is still to be told."""

    def __enter__(self) -> Tracker: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def tracker(
    config: Config, folder: RunFolder, group: str | None = None, name: str | None = None, quiet: bool = False
) -> Tracker:
    """What ``config.tracking`` asks for. Nothing starts before the first event.

    Args:
        group: of the runs that belong together, unless ``tracking.group`` says so.
        name: of the run; the folder's when not given.
        quiet: say nothing but warnings.

    Raises:
        UserError: a package is missing.
    """
    wanted = config.tracking
    check(wanted)
    if wanted.name == "none" or (wanted.name == "wandb" and wanted.mode == "disabled"):
        return Nowhere()
    from ops.tracking.feed import Feed, Sink

    def make() -> Sink:
        if wanted.name == "tensorboard":
            from ops.tracking.tensorboard import TensorBoard

            return TensorBoard(folder.path)
        from ops.tracking.wandb_run import WandbRun

        return WandbRun(config, folder.path, wanted.group or group, name or folder.path.name, quiet)

    return Behind(Feed(config, folder, make))


def check(wanted: TrackingConfig) -> None:
    """Raises UserError if the package that it needs is not installed."""
    package = PACKAGES.get(wanted.name)
    if package is not None and find_spec(package) is None:
        right = f"needs the package {package}: pip install 'cluster-fl[tracking]'."
        raise UserError("tracking.name", wanted.name, right)
