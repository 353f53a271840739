"""The ``cluster-fl`` command.

Exit codes: 0; 2 for a user's mistake (one line on stderr); 1 for a failure (one line and where the log is);
130 for Ctrl-C or SIGTERM, after a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ops import place

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    if not sys.warnoptions:
        # Libraries' notices to their developers are none of the user's business.
        warnings.simplefilter("ignore")
    parser = _parser()
    # argparse alone would not take `run a.yaml --quiet rounds=2`: what it leaves over are more positionals.
    args, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    args.words += rest
    # The user's own modules (`model.name: package.module:function`) lie where the command is called.
    sys.path.append(os.getcwd())
    if place.in_job():
        from ops import environment

        environment.take_over()
    try:
        code: int = args.command(args)
        return code
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", 130)
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    from cluster_fl.errors import ClusterFLError, UserError

    if isinstance(error, ClusterFLError):
        return _fail(str(error), 2 if isinstance(error, UserError) else 1)
    log = place.start() / "cluster-fl-error.log"
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return _fail(f"unexpected {type(error).__name__}: {error}. The full report is in {log.resolve()}.", 1)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    print("cluster-fl: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return code


# The heavy imports (torch, ray) wait until a command needs them, so that --help answers at once.


def _run(args: argparse.Namespace) -> int:
    from ops.commands import run

    return run(args)


def _resume(args: argparse.Namespace) -> int:
    from ops.commands import resume

    return resume(args)


def _plan(args: argparse.Namespace) -> int:
    from ops.commands import plan

    return plan(args)


def _compare(args: argparse.Namespace) -> int:
    from ops.compare import compare

    return compare(args)


def _sweep(args: argparse.Namespace) -> int:
    from ops.sweep import sweep

    return sweep(args)


def _simulate(args: argparse.Namespace) -> int:
    from ops.simulate import simulate

    return simulate(args)


def _replay(args: argparse.Namespace) -> int:
    from ops.replay import replay

    return replay(args)


def _methods(args: argparse.Namespace) -> int:
    from ops.commands import methods

    return methods(args)


def _dashboard(args: argparse.Namespace) -> int:
    from ops.tracking.dashboard import dashboard

    return dashboard(args)


def _submit(args: argparse.Namespace) -> int:
    from ops.submitting import submit

    return submit(args)


def _status(args: argparse.Namespace) -> int:
    from ops.submitting import status

    return status(args)


def _stop(args: argparse.Namespace) -> int:
    from ops.submitting import stop

    return stop(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cluster-fl", description="Simulates heterogeneous federated learning with nested submodels."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add(
        commands,
        "run",
        _run,
        "Train the experiment that YAML files and overrides describe.",
        "cluster-fl run configs/scalefl_cifar10.yaml data.root=data rounds=2",
        ("CONFIG", "YAML files, later ones over earlier, and key=value overrides"),
        debug=True,
    )
    _add(
        commands,
        "plan",
        _plan,
        "Show the split configuration alone: levels, costs and the search's candidates.",
        "cluster-fl plan configs/scalefl_cifar10.yaml levels.tolerance=0.05",
        ("CONFIG", "YAML files and key=value overrides"),
        json=True,
    )
    _add(
        commands,
        "resume",
        _resume,
        "Go on with a run from its last complete round.",
        "cluster-fl resume runs/quickstart cluster.pools=1",
        ("RUN_DIR", "the run's folder, and overrides of cluster.*, checkpoint.* and tracking.*"),
        debug=True,
    )
    _add(
        commands,
        "compare",
        _compare,
        "Run several methods on the same population and seeds, and print one table.",
        "cluster-fl compare configs/compare_digits.yaml compare.seeds=[0,1,2]",
        ("CONFIG", "YAML files with a section `compare`, and key=value overrides"),
        json=True,
        debug=True,
        table=True,
    )
    swept = _add(
        commands,
        "sweep",
        _sweep,
        "Try settings with Ray Tune, show which did best, and write the best configuration.",
        "cluster-fl sweep configs/sweep/lr_asha.yaml sweep.search.trials=6",
        ("CONFIG", "YAML files with a section `sweep`, and key=value overrides"),
        json=True,
    )
    swept.add_argument(
        "--resume",
        action="store_true",
        help="go on with a sweep of that name, and start none if there is none",
    )
    simulated = _add(
        commands,
        "simulate",
        _simulate,
        "Run the clock alone, without training: round times, waste, bytes, and who trains which part of the model.",
        "cluster-fl simulate configs/simulate.yaml rounds=100 --policies wait,over_select,fedbuff",
        ("CONFIG", "YAML files and key=value overrides"),
        json=True,
    )
    simulated.add_argument(
        "--policies", metavar="NAME,...", help="instead of time.policy.name, each of these"
    )
    simulated.add_argument(
        "--timeline", action="store_true", help="write the timeline and its trace into run.root/run.name"
    )
    _add(
        commands,
        "replay",
        _replay,
        "Show what another synchronous round policy would have made of a recorded run's clients and times.",
        "cluster-fl replay runs/quickstart time.policy.name=deadline time.policy.deadline_s=4",
        ("RUN_DIR", "the run's folder, and overrides of time.policy.*"),
        json=True,
    )
    _add(
        commands,
        "methods",
        _methods,
        "List the methods, their variants and their options.",
        "cluster-fl methods scalefl",
        ("NAME", "methods; all of them when none is named"),
        json=True,
        nargs="*",
    )
    _add(
        commands,
        "dashboard",
        _dashboard,
        "Make one W&B dashboard for all runs of a project, or of one group of them.",
        "cluster-fl dashboard tracking.project=cluster-fl tracking.group=compare_digits",
        ("CONFIG", "YAML files and key=value overrides; only tracking.* counts"),
        json=True,
        nargs="*",
    )
    _add_jobs(commands)
    return parser


def _add_jobs(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Commands that speak to a cluster's dashboard."""
    url = "http://127.0.0.1:8265"
    submit = _add(
        commands,
        "submit",
        _submit,
        "Run an experiment as a job of a Ray cluster and follow its log; the exit code is the run's.",
        f"cluster-fl submit configs/scalefl_cifar10.yaml run.name=first --address {url}",
        ("CONFIG", "YAML files and key=value overrides, as for run"),
    )
    submit.add_argument("--detach", action="store_true", help="print the job's name and do not wait")
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="forward this variable as well"
    )
    submit.add_argument(
        "--include", action="append", default=[], type=Path, metavar="PATH",
        help="send this file or folder besides the YAML files and the modules below this folder",
    )  # fmt: skip
    status = _add(
        commands,
        "status",
        _status,
        "List the jobs of a Ray cluster.",
        f"cluster-fl status --address {url}",
        ("JOB", "jobs; all of them when none is named"),
        json=True,
        nargs="*",
    )
    stop = _add(
        commands,
        "stop",
        _stop,
        "Stop jobs; the complete rounds of their runs are kept.",
        f"cluster-fl stop first-20260101-120000-1a2b --address {url}",
        ("JOB", "as status shows it"),
    )
    for command in (submit, status, stop):
        command.add_argument(
            "--address", metavar="URL",
            help=f"the cluster's dashboard; RAY_API_SERVER_ADDRESS, else {url}, when not given",
        )  # fmt: skip


def _add(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    command: Command,
    about: str,
    example: str,
    argument: tuple[str, str],
    json: bool = False,
    debug: bool = False,
    table: bool = False,
    nargs: str = "+",
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about, epilog=f"example: {example}")
    metavar, help_text = argument
    parser.add_argument("words", metavar=metavar, nargs=nargs, help=help_text)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON for machines")
    if debug:
        parser.add_argument("--debug", action="store_true", help="one pool in this process, without Ray")
    if table:
        parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table as Markdown too")
    parser.set_defaults(command=command)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse's complaints as one line, like every other mistake."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


if __name__ == "__main__":
    sys.exit(main())
