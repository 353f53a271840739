"""``cluster-fl dashboard``: one W&B workspace for all runs of a project, made from code."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec

from cluster_fl.compose import compose
from cluster_fl.errors import UserError

PACKAGE = "wandb_workspaces"


def dashboard(args: argparse.Namespace) -> int:
    """The command: saves the dashboard as a new view of the project, or prints its definition."""
    files = [word for word in args.words if "=" not in word]
    wanted = compose(files, [word for word in args.words if "=" in word]).tracking
    if find_spec(PACKAGE) is None:
        right = "needs the package wandb-workspaces: pip install 'cluster-fl[tracking]'."
        raise UserError("dashboard", wanted.project, right)
    from ops.tracking import workspace

    if args.json:
        print(json.dumps(workspace.definition(wanted), indent=2))
        return 0
    url = workspace.publish(wanted)
    if not args.quiet:
        print(url)
    return 0
