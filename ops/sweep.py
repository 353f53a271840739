"""``cluster-fl sweep``: which settings do best, with Ray Tune; an ordinary run folder for each trial.

A file for it holds what all trials share and a section ``sweep`` (:class:`SweepConfig`). The runs lie in
``run.root/<sweep>/<trial>``; sweep.json beside them has the trials, best.yaml the best configuration. The same command
goes on with a sweep that was stopped.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec

from actors.placement import places
from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder
from ops.commands import connect, split_words
from ops.sweeping import results
from ops.sweeping.definition import prepare
from ops.sweeping.ledger import FILE, Ledger

# What `ray[tune]` adds to Ray.
NEEDED = ("pandas", "pyarrow", "tensorboardX", "fsspec", "pydantic", "requests")


def sweep(args: argparse.Namespace) -> int:
    """The command. Everything that can be checked is, before the first trial starts."""
    whole = prepare(*split_words(args.words))
    for package in NEEDED:
        if find_spec(package) is None:
            right = f'needs Ray Tune ({package} is missing): pip install "cluster-fl[sweep]".'
            raise UserError("sweep", whole.name, right)
    ledger = Ledger.of(whole, args.resume)
    if not ledger.complete:
        with RunFolder(whole.path).locked():
            ledger = Ledger.of(whole, args.resume)  # nobody else has it now
            _run(ledger, args.quiet)
    found = results.best(ledger)
    file = None if found is None else results.write_best(ledger, found)
    ledger.save(results.as_json(found, file))
    if args.json:
        print((whole.path / FILE).read_text(encoding="utf-8"), end="")
    elif not args.quiet:
        results.show(ledger, found, file)
    failed = [row for row in ledger.rows if row.state == "failed"]
    if failed:
        first = "" if len(failed) == 1 else "the first, "
        told = f"{len(failed)} of {ledger.total} trials failed; {first}{failed[0].trial}: {failed[0].error}"
        raise RunError(f"{told} The same command tries them again.")
    return 0


def _run(ledger: Ledger, quiet: bool) -> None:
    sweep = ledger.sweep
    cluster, side_by_side = sweep.config(sweep.first).cluster, sweep.section.concurrent
    # Side by side trials use a cluster better than pools do.
    pools = 1 if cluster.pools == "auto" else int(cluster.pools)
    with ExitStack() as stack:
        # A Ray of our own has room for what is asked for.
        connect(
            stack, replace(cluster, pools=pools * (1 if side_by_side == "auto" else int(side_by_side))), False
        )
        from ops.sweeping import tuning

        cluster = replace(cluster, pools=pools)
        places(cluster)  # one trial fits, or the message says what does
        try:
            ledger.save()
            tuning.run(ledger, cluster, quiet)
        except KeyboardInterrupt:
            done = sum(row.done for row in ledger.rows)
            told = f"{done} of {ledger.total} trials in {sweep.path} are done; go on with the same command and --resume"
            raise KeyboardInterrupt(told) from None
