"""What the commands do. Each takes the parsed arguments and returns an exit code."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from ops import tables
from ops.progress import Screen


class Runner(Protocol):
    """A driver, here or in an actor."""

    def run(self) -> Iterator[Event]: ...

    def stop(self) -> int: ...


# (configuration, folder, whether to go on with what is there) -> the driver of a run.
MakeRunner = Callable[[Config, RunFolder, bool], Runner]


def run(args: argparse.Namespace) -> int:
    config = absolute(compose(*split_words(args.words)))
    folder = RunFolder(Path(config.run.root) / (config.run.name or folder_name(config, args.words)))
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
    config = folder.config(overrides)
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
        runner = connect(stack, config.cluster, args.debug)(config, folder, resume)
        screen = stack.enter_context(Screen(config.rounds, args.quiet))
        try:
            for event in runner.run():
                screen.show(event)
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
    """Where runs happen until the stack ends: on a Ray cluster, or with ``debug`` in this process."""
    if debug:
        from actors.driver import Driver
        from actors.pools import InlinePools

        return lambda config, folder, resume: Driver(config, folder, InlinePools, resume)
    from actors.session import Session, connected

    stack.enter_context(connected(cluster))
    return Session


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
    """Paths as the user meant them, wherever the driver runs."""
    data: DataConfig = replace(config.data, root=os.path.abspath(config.data.root))
    return replace(config, data=data, run=replace(config.run, root=os.path.abspath(config.run.root)))


def folder_name(config: Config, arguments: list[str]) -> str:
    """Of a run that has no name."""
    stem = Path(next(a for a in arguments if "=" not in a)).stem
    return f"{stem}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
