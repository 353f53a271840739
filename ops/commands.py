"""What the commands do. Each takes the parsed arguments and returns an exit code."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from actors.events import Event, Finished
from cluster_fl import experiment
from cluster_fl import methods as registry
from cluster_fl.compose import INCIDENTAL, compose
from cluster_fl.config import ClusterConfig, Config, DataConfig
from cluster_fl.data import datasets
from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder
from ops import place, tables
from ops.begun import is_begun
from ops.progress import Screen
from ops.tracking import tracker


class Runner(Protocol):
    """A driver, here or in an actor."""

    def run(self) -> Iterator[Event]: ...

    def stop(self) -> int: ...


# (configuration, folder, whether to go on with what is there) -> the driver of a run.
MakeRunner = Callable[[Config, RunFolder, bool], Runner]


def run(args: argparse.Namespace) -> int:
    config = absolute(compose(*split_words(args.words)))
    name = config.run.name
    folder = RunFolder(Path(config.run.root) / (name or folder_name(config, args.words)))
    # A name that was made here is a new run's; one that was given may be that of a run to go on with.
    if name is not None and is_begun(folder, config, name, "run"):
        if not args.quiet:
            doing = "going on with" if folder.summary() is None else "finished before:"
            print(f"{doing} {folder.path}", file=sys.stderr)
        return _go_on(config, folder, args)
    folder.refuse_existing()
    return _drive(config, folder, args, resume=False)


def resume(args: argparse.Namespace) -> int:
    path, *overrides = args.words
    folder = RunFolder(Path(path).resolve())
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in INCIDENTAL):
            right = f"cannot change in a run that has begun; only {', '.join(INCIDENTAL)} can."
            raise UserError(key, override.partition("=")[2], right)
    return _go_on(folder.config(overrides), folder, args)


def _go_on(config: Config, folder: RunFolder, args: argparse.Namespace) -> int:
    """A run from its last complete round to its end; of a finished one, what it found."""
    folder.load(config)  # another configuration, or a damaged checkpoint, is told before anything starts
    summary = folder.summary()
    if summary is not None:
        _show(args, folder, summary)
        return 0
    return _drive(config, folder, args, resume=True)


def plan(args: argparse.Namespace) -> int:
    config = compose(*split_words(args.words))
    made = experiment.make_plan(config, datasets.describe(config.data))
    if args.json:
        print(json.dumps(made.as_json(), indent=2))
    elif not args.quiet:
        tables.show_plan(made, config)
    return 0


def methods(args: argparse.Namespace) -> int:
    described = [_describe(name) for name in args.words or registry.NAMES]
    if args.json:
        print(json.dumps(described, indent=2))
    elif not args.quiet:
        tables.show_methods(described)
    return 0


def _describe(name: str) -> dict[str, Any]:
    """A method's name, title, what each variant presets, and its options."""
    method = registry.get(name)
    return {
        "name": name,
        "title": method.title,
        "variants": {variant: dict(preset) for variant, preset in method.variants.items()},
        "options": [_describe_option(spec) for spec in fields(method.options)],
    }


def _describe_option(spec: Field[Any]) -> dict[str, Any]:
    made = spec.default_factory() if spec.default_factory is not MISSING else spec.default
    limits = {key: spec.metadata.get(key) for key in ("low", "above", "high")}
    return {
        "name": spec.name,
        "default": made,
        "about": spec.metadata.get("about", ""),
        "choices": list(spec.metadata.get("choices", ())),
        **limits,
    }


def _drive(config: Config, folder: RunFolder, args: argparse.Namespace, resume: bool) -> int:
    with ExitStack() as stack:
        shown = stack.enter_context(tracker(config, folder, quiet=args.quiet))
        runner = connect(stack, config.cluster, args.debug)(config, folder, resume)
        screen = stack.enter_context(Screen(config.rounds, args.quiet))
        try:
            for event in runner.run():
                screen.show(event)
                shown.show(event)
                if isinstance(event, Finished):
                    summary = event.summary
        except KeyboardInterrupt:
            rounds = runner.stop()
            screen.close()
            kept = (
                f"{rounds} of {config.rounds} rounds are kept; go on with `cluster-fl resume {folder.path}`"
            )
            raise KeyboardInterrupt(kept if rounds else "no round was complete") from None
        except RunError as error:
            screen.close()
            raise RunError(f"{error} {folder.write_error(error)}") from error
    _show(args, folder, summary)
    return 0


def connect(stack: ExitStack, cluster: ClusterConfig, debug: bool) -> MakeRunner:
    """Where runs happen until the stack ends: on a Ray cluster, or with ``debug`` in this process.

    Until then SIGTERM, with which Ray stops a job, is as good as Ctrl-C.
    """
    if debug:
        from actors.driver import Driver
        from actors.pools import InlinePools

        stack.enter_context(_sigterm_is_ctrl_c())
        return lambda config, folder, resume: Driver(config, folder, InlinePools, resume)
    from actors.session import Session, connected

    stack.enter_context(connected(cluster))
    stack.enter_context(_sigterm_is_ctrl_c())  # only now: Ray sets a handler of its own as it connects
    return Session


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be caught
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _show(args: argparse.Namespace, folder: RunFolder, summary: dict[str, Any]) -> None:
    if not args.quiet:
        tables.show_summary(folder.plan(), summary, folder.path)


def split_words(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files are what has no '=': they may stand anywhere before or between overrides."""
    files = [a for a in arguments if "=" not in a]
    if not files:
        raise UserError("CONFIG", "", "name at least one YAML file, e.g. configs/quickstart.yaml.")
    return files, [a for a in arguments if "=" in a]


def absolute(config: Config) -> Config:
    """Paths as the user meant them, wherever the driver runs; relative ones begin at :func:`place.start`."""
    start = place.start()
    data: DataConfig = replace(config.data, root=os.path.abspath(start / config.data.root))
    return replace(config, data=data, run=replace(config.run, root=os.path.abspath(start / config.run.root)))


def folder_name(config: Config, arguments: list[str]) -> str:
    """Of a run that has no name."""
    stem = Path(next(a for a in arguments if "=" not in a)).stem
    return f"{stem}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
