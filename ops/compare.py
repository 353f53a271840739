"""``cluster-fl compare``: several methods on one population, an ordinary run folder for each method and seed.

A file for it holds what all runs share and a section ``compare`` (:class:`CompareConfig`). The runs lie in
``run.root/<comparison>/<label>/seed-<seed>`` and go on where they stopped; comparison.json beside them has the
table after each run.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster_fl import experiment
from cluster_fl.compose import COMPARE, compose, read_section
from cluster_fl.config import Config, RunConfig, choose
from cluster_fl.data import datasets
from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder, pretty, write_text
from ops import comparison, tables
from ops.accuracy import NAMES as ACCURACIES
from ops.begun import is_begun, keys, value_at
from ops.commands import MakeRunner, absolute, connect, split_words
from ops.comparison import Run, Target, Values
from ops.progress import Screen
from ops.tracking import check, tracker

# What makes runs comparable: an entry cannot change it.
SHARED = ("seed", "run", "cluster", "clients.count", "data", "time")
LABEL_LENGTH = 80


@dataclass
class CompareConfig:
    """The section ``compare``.

    Attributes:
        methods: names, or mappings of what differs from the shared configuration, with a ``label`` or under
            their method's name.
        seeds: each method runs once with each; the configuration's own ``seed`` alone when not given.
        target: the accuracy, a fraction, whose simulated time is asked for.
        target_of: what has to reach it: global, local, worst or personal.
    """

    methods: list[Any] = field(default_factory=list)
    seeds: list[int] | None = None
    target: float | None = None
    target_of: str = "global"


@dataclass(frozen=True)
class Entry:
    """One of ``compare.methods``: what it is called, and what it changes."""

    where: str  # its own key, for messages
    label: str
    settings: dict[str, Any]
    by_name: bool = False

    @property
    def slug(self) -> str:
        """The label as a folder's name; of one case, since some file systems know no other."""
        return re.sub(r"[^\w-]+", "-", self.label).strip("-").lower()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A mistake is told with the entry's key if the entry made it, else with the entry's label."""
        try:
            yield
        except UserError as error:
            if any(error.key == key or error.key.startswith(f"{key}[") for key in keys(self.settings)):
                key = self.where if self.by_name else f"{self.where}.{error.key}"
                raise UserError(key, error.value, error.right) from None
            raise UserError(error.key, error.value, f"{error.right} (for {self.label})") from None


@dataclass(frozen=True)
class Job:
    """One run of the comparison. ``begun``: its folder is there."""

    entry: Entry
    config: Config
    folder: RunFolder
    begun: bool

    @property
    def name(self) -> str:
        return f"{self.entry.label} seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        return self.folder.summary() is not None


@dataclass(frozen=True)
class Comparison:
    """Everything that is known before the first run. ``jobs`` are seed by seed, so that rows grow together."""

    path: Path
    target: Target
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    jobs: tuple[Job, ...]


def compare(args: argparse.Namespace) -> int:
    """The command. Every configuration is composed, checked and planned before the first run starts."""
    whole = prepare(*split_words(args.words))
    if args.table is not None:
        _check_table(args.table)
    results = _run_all(whole, args)
    content = _report(whole, results)
    _write(whole.path / "comparison.json", pretty(content))
    if args.table is not None:
        _write(args.table, comparison.markdown(content))
    if args.json:
        print(pretty(content), end="")
    elif not args.quiet:
        tables.show_comparison(content, whole.path)
    failed = [(job.name, run.error) for job, run in zip(whole.jobs, results, strict=True) if run.error]
    if failed:
        name, error = failed[0]
        first = "" if len(failed) == 1 else "the first, "
        raise RunError(
            f"{len(failed)} of {len(whole.jobs)} runs failed; {first}{name}: {error} "
            "The full report is in its folder's error.log."
        )
    return 0


def prepare(files: Sequence[str], overrides: Sequence[str]) -> Comparison:
    """Reads what is to be compared; writes nothing.

    Raises:
        UserError: an entry, a seed, the target or any run's configuration is wrong, or a run's folder holds
            another configuration.
        RunError: a plan contradicts itself (:func:`experiment.make_plan`).
    """
    own: list[str] = []
    common: list[str] = []
    for override in overrides:
        (own if override.partition("=")[0].split(".")[0] == COMPARE else common).append(override)
    section = read_section(COMPARE, CompareConfig, files, own)
    entries = tuple(_entries(section.methods))
    _check_common(section, common)
    configs = [_config(entry, files, common) for entry in entries]
    _check_target(section, configs[0])
    seeds = tuple(_seeds(section, configs[0]))
    name = configs[0].run.name or Path(files[0]).stem
    path = Path(configs[0].run.root) / name
    RunFolder(path).refuse_existing()
    jobs = tuple(
        _job(entry, config, seed, path)
        for seed in seeds
        for entry, config in zip(entries, configs, strict=True)
    )
    for entry in entries:
        _check_plan(entry, jobs)
    for job in jobs:
        check(job.config.tracking)
    return Comparison(path, Target(section.target, section.target_of), seeds, entries, jobs)


def _entries(methods: Sequence[Any]) -> list[Entry]:
    if not methods:
        raise UserError("compare.methods", methods, "must hold at least one method, e.g. [scalefl].")
    entries: list[Entry] = []
    for number, content in enumerate(methods):
        entry = _entry(f"compare.methods[{number}]", content)
        for other in entries:
            if other.slug == entry.slug:
                right = f"is also what {other.where} is called; give each a label of its own."
                raise UserError(f"{entry.where}.label", entry.label, right)
        entries.append(entry)
    return entries


def _entry(where: str, content: Any) -> Entry:
    if isinstance(content, str):
        return Entry(where, content, {"method": content}, by_name=True)
    if not isinstance(content, Mapping):
        right = "must be a method's name, or a mapping, e.g. {label: mine, method: scalefl}."
        raise UserError(where, content, right)
    settings = {str(key): value for key, value in content.items() if key != "label"}
    valid = [spec.name for spec in fields(Config)]
    for key in settings:
        if key not in valid:
            near = difflib.get_close_matches(key, ["label", *valid], 1, 0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Valid: label, {', '.join(valid)}."
            raise UserError(f"{where}.{key}", settings[key], f"is not an option. {hint}")
    for key in keys(settings):
        if any(key == shared or key.startswith(f"{shared}.") for shared in SHARED):
            right = "is the same for all methods: set it outside of compare (seeds: compare.seeds)."
            raise UserError(f"{where}.{key}", value_at(settings, key), right)
    label = content.get("label", settings.get("method"))
    if label is None:
        raise UserError(f"{where}.label", None, "must name the entry, since it names no method of its own.")
    entry = Entry(where, " ".join(str(label).split()), settings)
    if not isinstance(label, str | int | float) or not entry.slug or len(entry.label) > LABEL_LENGTH:
        right = f"must be at most {LABEL_LENGTH} characters with a letter or digit: it names a folder too."
        raise UserError(f"{where}.label", label, right)
    return entry


def _check_common(section: CompareConfig, overrides: Sequence[str]) -> None:
    """Overrides apply to all runs, so they cannot hold what the section decides for each."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "method":
            raise UserError(key, value, f"is what compare.methods decides; write compare.methods=[{value}].")
        if key == "seed" and section.seeds is not None:
            raise UserError(key, value, f"is what compare.seeds decides; write compare.seeds=[{value}].")


def _config(entry: Entry, files: Sequence[str], overrides: Sequence[str]) -> Config:
    with entry.explaining():
        return absolute(compose(files, overrides, entry.settings))


def _check_target(section: CompareConfig, config: Config) -> None:
    target = section.target
    choose("compare.target_of", section.target_of, ACCURACIES)
    if target is None:
        return
    if not 0 < target <= 1:
        raise UserError("compare.target", target, "must be a fraction above 0 and at most 1, e.g. 0.8.")
    if not config.data.held_out:
        right = "needs accuracies during a run: set samples aside, e.g. data.held_out=120."
        raise UserError("compare.target", target, right)


def _seeds(section: CompareConfig, config: Config) -> list[int]:
    seeds = [config.seed] if section.seeds is None else section.seeds
    if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise UserError("compare.seeds", seeds, "must be different whole numbers from 0, e.g. [0,1,2].")
    return seeds


def _job(entry: Entry, config: Config, seed: int, path: Path) -> Job:
    root, name = path / entry.slug, f"seed-{seed}"
    config = replace(config, seed=seed, run=RunConfig(str(root), name))
    folder = RunFolder(root / name)
    return Job(entry, config, folder, is_begun(folder, config, path.name, "comparison"))


def _check_plan(entry: Entry, jobs: Sequence[Job]) -> None:
    """Plans the first of an entry's runs that is still to be finished; its other seeds differ by chance only."""
    config = next((job.config for job in jobs if job.entry is entry and not job.finished), None)
    if config is not None:
        with entry.explaining():
            experiment.make_plan(config, datasets.describe(config.data))


def _check_table(file: Path) -> None:
    if file.is_dir() or not file.parent.is_dir():
        raise UserError("--table", file, "must be a file in a folder that exists.")


def _run_all(whole: Comparison, args: argparse.Namespace) -> list[Run]:
    """Every job's outcome, in order; the finished ones are read, the others run on one Ray cluster."""
    runs = [
        _outcome(whole, job, comparison.measure(job.folder, whole.target) if job.finished else None)
        for job in whole.jobs
    ]
    with ExitStack() as stack:
        make_runner: MakeRunner | None = None
        try:
            for at, job in enumerate(whole.jobs):
                heading = f"{at + 1}/{len(whole.jobs)} {job.name}"
                if runs[at].values is not None:
                    _tell(f"{heading}: finished before", args.quiet)
                    continue
                _tell(heading, args.quiet)
                make_runner = make_runner or connect(stack, job.config.cluster, args.debug)
                runs[at] = _run(whole, job, make_runner, args.quiet)
                if runs[at].error is not None:
                    _tell(f"{heading} failed: {runs[at].error}", args.quiet)
                _write(whole.path / "comparison.json", pretty(_report(whole, runs)))
        except KeyboardInterrupt:
            done = sum(job.finished for job in whole.jobs)
            told = f"{done} of {len(runs)} runs in {whole.path} are finished; go on with the same command"
            raise KeyboardInterrupt(told) from None
    return runs


def _run(whole: Comparison, job: Job, make_runner: MakeRunner, quiet: bool) -> Run:
    runner = make_runner(job.config, job.folder, job.begun)
    shown = tracker(job.config, job.folder, whole.path.name, job.name, quiet)
    with job.entry.explaining(), shown, Screen(job.config.rounds, quiet) as screen:
        try:
            for event in runner.run():
                screen.show(event)
                shown.show(event)
        except KeyboardInterrupt:
            runner.stop()
            raise
        except RunError as error:
            job.folder.write_error(error)
            return _outcome(whole, job, None, " ".join(str(error).split()))
    return _outcome(whole, job, comparison.measure(job.folder, whole.target))


def _outcome(whole: Comparison, job: Job, values: Values | None, error: str | None = None) -> Run:
    return Run(job.config.seed, job.folder.path.relative_to(whole.path).as_posix(), values, error)


def _report(whole: Comparison, runs: Sequence[Run]) -> dict[str, Any]:
    methods = []
    for entry in whole.entries:
        own = [(job, run) for job, run in zip(whole.jobs, runs, strict=True) if job.entry is entry]
        config = own[0][0].config
        methods.append(
            comparison.method_report(entry.label, config.method, config.variant, [run for _, run in own])
        )
    return comparison.report(whole.target, whole.seeds, methods)


def _tell(text: str, quiet: bool) -> None:
    """A line on stderr, where a run's screen is too."""
    if not quiet:
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}.") from error
