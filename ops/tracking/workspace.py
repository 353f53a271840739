"""The dashboard's definition: which metrics of :mod:`ops.tracking.history` are shown, against what, and how."""

from __future__ import annotations

from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from cluster_fl.config import TrackingConfig
from cluster_fl.errors import RunError, UserError
from ops.tracking.behind import one_line
from ops.tracking.history import ROUND, SIM_TIME

NAME = "cluster-fl"
# Stands for the user's own entity in a definition that is not saved.
NOBODY = "entity"
BYTES = "bytes/total"
ACCURACIES = ("accuracy/global", "accuracy/local", "accuracy/worst")
FATES = ("merged", "late", "lost", "stale", "abandoned", "refused")
COLUMNS = ("config:method.value", "config:seed.value", "summary:test/global", "summary:test/worst")


def definition(wanted: TrackingConfig) -> dict[str, Any]:
    """What W&B would be sent; nothing is."""
    model = build(wanted, wanted.entity or NOBODY)._to_model()
    made: dict[str, Any] = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return made


def publish(wanted: TrackingConfig) -> str:
    """Saves it as a new view of the project; says where.

    Raises:
        UserError: W&B finds no key.
        RunError: W&B is not reached, or refuses.
    """
    # Without this W&B asks on a terminal for a key that it does not find.
    wandb.setup(wandb.Settings(silent=True))
    try:
        api = wandb.Api(timeout=30)
        url: str = build(wanted, wanted.entity or api.default_entity).save().url
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        right = f"W&B has no key to use ({one_line(str(error))}); run `wandb login`, or print with --json."
        raise UserError("dashboard", wanted.project, right) from None
    except Exception as error:
        raise RunError(f"W&B did not take the dashboard: {one_line(str(error))}") from error
    return url


def build(wanted: TrackingConfig, entity: str) -> ws.Workspace:
    """Of one group's runs if ``tracking.group`` is given, else of all."""
    group = wanted.group
    filters = [] if group is None else [expr.Metric("Group") == group]
    return ws.Workspace(
        entity=entity,
        project=wanted.project,
        name=NAME if group is None else f"{NAME}: {group}",
        sections=[_accuracy(), _clients(), _cluster(), _made_of()],
        settings=ws.WorkspaceSettings(x_axis=ROUND, max_runs=30),
        runset_settings=ws.RunsetSettings(pinned_columns=list(COLUMNS), filters=filters),
        auto_generate_panels=False,
    )


def _accuracy() -> ws.Section:
    panels = [
        _lines("Accuracy over rounds", ROUND, *ACCURACIES),
        _lines("Accuracy over simulated time", SIM_TIME, *ACCURACIES),
        _lines("Accuracy over bytes sent", BYTES, *ACCURACIES),
        _levels("Accuracy of each level", "accuracy"),
        _levels("Accuracy of each level, mean over its exits", "exit_mean"),
        _lines("Training loss", ROUND, "train/loss"),
        wr.BarPlot(title="Accuracy on the test parts", metrics=["test/global", "test/local", "test/worst"]),
    ]
    return ws.Section(name="Accuracy", panels=panels, is_open=True)


def _clients() -> ws.Section:
    times = ("time/round_s", "time/client_mean_s", "time/client_max_s")
    panels = [
        _lines("Simulated seconds of a round, and of its clients", SIM_TIME, *times),
        _lines("Simulated time over rounds", ROUND, SIM_TIME),
        _lines("How attempts ended", SIM_TIME, *(f"clients/{fate}" for fate in FATES)),
        _lines("Clients whose attempt ended", SIM_TIME, "clients/ended"),
        _lines("Staleness of merged updates", SIM_TIME, "clients/staleness"),
        _lines("Bytes of a round", ROUND, "bytes/down", "bytes/up"),
        _lines("Bytes in all", ROUND, BYTES),
        wr.MediaBrowser(title="Clients of a round", media_keys=["timeline"], num_columns=1),
    ]
    return ws.Section(name="Clients and their clock", panels=panels, is_open=True)


def _cluster() -> ws.Section:
    panels = [
        _lines("Seconds of a round, here", ROUND, "wall/round_s", "wall/tail_s"),
        wr.LinePlot(title="Where they went", x=ROUND, metric_regex=r"^wall/phase/.+$"),
        _lines("Share of the pools' time in work", ROUND, "wall/busy"),
        _lines("Pools, and tasks sent again", ROUND, "wall/pools", "wall/retries"),
        _lines("Seconds in all", ROUND, "wall_time_s"),
    ]
    return ws.Section(name="Cluster", panels=panels)


def _made_of() -> ws.Section:
    panels = [
        wr.WeavePanelSummaryTable(table_name="plan", layout=wr.Layout(w=24, h=8)),
        wr.MediaBrowser(title="Classes of each client", media_keys=["classes"], num_columns=1),
    ]
    return ws.Section(name="Plan and population", panels=panels)


def _lines(title: str, axis: str, *metrics: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=axis, y=list(metrics))


def _levels(title: str, group: str) -> wr.LinePlot:
    """As many lines as a run has levels."""
    return wr.LinePlot(title=title, x=ROUND, metric_regex=rf"^{group}/level_\d+$")
