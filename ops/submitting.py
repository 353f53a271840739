"""``cluster-fl submit``, ``status`` and ``stop``: runs as jobs of a Ray cluster."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster_fl import experiment
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.data import datasets
from cluster_fl.errors import UserError
from ops import environment, package
from ops.commands import split_words
from ops.jobs import MOST_BYTES, Job, Jobs, Log
from ops.tables import columns, wide_console

NAME_LENGTH = 60


def submit(args: argparse.Namespace) -> int:
    """The command. What can be wrong about a configuration is told before anything is sent."""
    files, overrides = split_words(args.words)
    config = compose(files, overrides)
    experiment.make_plan(config, datasets.describe(config.data))
    variables = environment.chosen(args.env)
    source = Path.cwd()
    places = [package.place_of(Path(file), number, source) for number, file in enumerate(files)]
    named = {place: Path(file) for place, file in zip(places, files, strict=True)}
    found = package.contents(source, named | _tables(config, source), args.include, MOST_BYTES)
    name = _job_name(config, files[0])
    if config.run.name is None:
        overrides.append(f"run.name={name}")  # so that whoever knows the job finds its run
    jobs = Jobs(args.address)
    with tempfile.TemporaryDirectory() as folder:
        package.copy(found, Path(folder))
        shown = environment.hand_over(variables, name, Path(folder))
        # Not `cluster-fl`: where the package holds cluster-fl's own source, that is what shall run.
        words = ["python", "-m", "ops.cli", "run", *map(str, places), *overrides]
        jobs.submit(name, shlex.join(words), Path(folder), shown)
    if not args.quiet:
        sent = f"{len(found)} files, {package.readable(package.size(found))}"
        told = f"; of the environment: {', '.join(variables)}" if variables else ""
        print(f"job {name} at {jobs.address} ({sent}{told})", file=sys.stderr)
    if args.detach:
        print(name)
        return 0
    return _follow(jobs, name, args.quiet)


def status(args: argparse.Namespace) -> int:
    """The command: all jobs, or those that are named."""
    jobs = Jobs(args.address)
    found = jobs.named(args.words) if args.words else jobs.all()
    if args.json:
        print(json.dumps([_as_json(job) for job in found], indent=2))
    elif not args.quiet:
        _show(found)
    return 0


def stop(args: argparse.Namespace) -> int:
    """The command. A job that is stopped keeps its complete rounds."""
    jobs = Jobs(args.address)
    found = jobs.named(args.words)
    for job in found:
        if not job.is_over:
            jobs.stop(job.id)
    for job in found:
        ended = jobs.wait(job.id)
        if not args.quiet:
            print(f"{job.id}: {'had ended before, ' if job.is_over else ''}{ended.state.lower()}")
    return 0


def _tables(config: Config, source: Path) -> dict[Path, Path]:
    """The files that a configuration names; absolute ones are the cluster's own."""
    named = {
        "time.devices.file": config.time.devices.file,
        "time.availability.file": config.time.availability.file,
    }
    found = {}
    for key, file in named.items():
        if file is None or os.path.isabs(file):
            continue
        place = package.below(Path(file), source)
        if place is None or not place.is_file():
            right = f"must be a file below {source}, which goes with the job, or the cluster's own by its whole path."
            raise UserError(key, file, right)
        found[place] = place
    return found


def _job_name(config: Config, file: str) -> str:
    """Readable, and no job had it before: the run's name, or the YAML's, and the time."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", config.run.name or Path(file).stem).strip("-")[:NAME_LENGTH]
    return f"{plain or 'run'}-{datetime.now():%Y%m%d-%H%M%S}-{uuid4().hex[:4]}"


def _follow(jobs: Jobs, name: str, quiet: bool) -> int:
    """Shows the job's log until it is over; its exit code."""
    last = _LastLine()
    log = Log(jobs, name, last.take if quiet else _print)
    try:
        job = log.follow()
    except KeyboardInterrupt:
        if not _confirmed(f"\nstop {name}? [y/N] "):
            how = f"`cluster-fl stop {name} --address {jobs.address}`"
            raise KeyboardInterrupt(f"{name} goes on; {how} stops it") from None
        jobs.stop(name)
        job = log.follow()
    code = job.code
    if code:
        told = last.line if quiet else f"job {name}: {job.state.lower()}, exit code {code}"
        print(told, file=sys.stderr)
    return code


def _confirmed(question: str) -> bool:
    """Asks on a terminal; anything but a yes, or a second Ctrl-C, is a no."""
    if not _asks():
        return False
    print(question, end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def _asks() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _print(text: str) -> None:
    print(text, end="", flush=True)


class _LastLine:
    """Of a log nobody wants to see, the line that says how it ended."""

    def __init__(self) -> None:
        self.line = ""

    def take(self, text: str) -> None:
        self.line = next((line for line in reversed(text.splitlines()) if line.strip()), self.line)


def _as_json(job: Job) -> dict[str, Any]:
    """Without Ray's message, which holds the log's end."""
    return {key: value for key, value in asdict(job).items() if key != "message"}


def _show(jobs: Sequence[Job]) -> None:
    table = columns("job", "state", "exit code", "began", "took")
    table.columns[0].justify = "left"
    table.add_column(
        "command", overflow="fold"
    )  # the only one that may be broken: the others are for copying
    for job in jobs:
        code = "" if job.exit_code is None else str(job.exit_code)
        began = "" if job.began is None else f"{datetime.fromtimestamp(job.began):%Y-%m-%d %H:%M:%S}"
        table.add_row(job.id, job.state.lower(), code, began, _took(job), job.command)
    wide_console().print(table)


def _took(job: Job) -> str:
    if job.began is None:
        return ""
    seconds = round((time.time() if job.ended is None else job.ended) - job.began)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
