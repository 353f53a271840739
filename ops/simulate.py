"""``cluster-fl simulate``: the clock of a run without its training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cluster_fl import simulation
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment
from cluster_fl.records import RunFolder
from cluster_fl.timing import intervals, timeline, trace
from cluster_fl.timing.policies import Standing, Step
from cluster_fl.timing.totals import Totals
from ops.clock_tables import show_simulation
from ops.commands import folder_name, split_words


def simulate(args: argparse.Namespace) -> int:
    """The command. Nothing is written unless ``--timeline`` asks for it, and then only at the end."""
    files, overrides = split_words(args.words)
    names = args.policies.split(",") if args.policies else [None]
    if args.timeline and len(names) > 1:
        raise UserError("--timeline", args.policies, "shows one policy: leave out --policies.")
    configs = [compose(files, [*overrides, *_naming(name)]) for name in names]
    folder = _folder(configs[0], args.words) if args.timeline else None
    made, notes = simulation.prepare(configs[0])
    each = [simulation.under(made, config) for config in configs]  # who does not go with it is told first
    content = {
        "method": made.config.method,
        "clients": made.config.clients.count,
        "per_round": made.config.clients.per_round,
        "plan": made.plan.as_json()["levels"],
        "notes": notes,
        "policies": [_measure(own, folder) for own in each],
    }
    if folder is not None and not (folder / trace.NAME).exists():
        notes.append(f"the timeline has no {trace.NAME}: it is of more than {trace.MOST:,} attempts")
    if args.json:
        print(json.dumps(content, indent=2))
    elif not args.quiet:
        show_simulation(content, folder)
    return 0


def _naming(name: str | None) -> list[str]:
    return [] if name is None else [f"time.policy.name={name}"]


def _folder(config: Config, words: list[str]) -> Path:
    """Where the timeline is to go. Raises UserError if something is there."""
    folder = RunFolder(Path(config.run.root) / (config.run.name or folder_name(config, words)))
    folder.refuse_existing()
    if folder.timeline.file.exists():
        raise UserError("run.name", folder.path.name, f"{folder.path} holds a timeline already.")
    return folder.path


def _measure(made: Experiment, folder: Path | None) -> dict[str, Any]:
    """One policy's part of the document; its timeline goes to ``folder`` if one is given."""
    totals, last = Totals(made.plan, made.config.clients.count), Standing()
    with _recording(made, folder) as record:
        for step in simulation.steps(made):
            pauses = intervals.pauses(step.ended, made.population.availability)
            totals.add(step, pauses)
            record(step, pauses)
            last = step.after
    policy = made.config.time.policy
    measured = totals.as_json(policy.asynchronous)
    return {"policy": policy.name, **measured, "under_way": len(last.flight)}


Record = Callable[[Step, np.ndarray], None]


@contextmanager
def _recording(made: Experiment, folder: Path | None) -> Iterator[Record]:
    """What keeps a step and its pauses; the timeline and its trace appear in ``folder`` at the end of the block."""
    if folder is None:
        yield lambda step, pauses: None
        return
    with _made(folder):
        ends, last = list[float](), Standing()
        with timeline.Writer.to(folder / timeline.Timeline(folder).file.name) as writer:

            def keep(step: Step, pauses: np.ndarray) -> None:
                nonlocal last
                writer.add(timeline.rows(step, pauses))
                ends.append(step.end)
                last = step.after

            yield keep
            over = timeline.unfinished(last)
            writer.add(timeline.rows(over, intervals.pauses(over.ended, made.population.availability)))
        trace.add(folder, ends)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, which is gone again if the block fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("run.root", folder.parent, f"cannot be written: {error.strerror}.") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise
