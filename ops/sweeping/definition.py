"""A sweep before its first trial: everything that is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cluster_fl import experiment
from cluster_fl.compose import SWEEP, compose, fingerprint, read, read_section
from cluster_fl.config import Config, DataConfig, RunConfig
from cluster_fl.data import datasets
from cluster_fl.errors import RunError, UserError
from cluster_fl.records import RunFolder
from ops.commands import absolute
from ops.sweeping.section import SweepConfig, check_held_out, check_section
from ops.sweeping.space import Point, Space, nested, parse
from ops.tracking import check

# Of a finite space all points are checked before anything starts, up to so many.
CHECKED = 1000
# Sections that decide nothing about the plan.
UNPLANNED = ("train", "server", "aggregation", "evaluate", "time", "rounds", "seed")


@dataclass(frozen=True)
class Sweep:
    """What a trial needs to know too.

    Attributes:
        layers: the files as they were when the sweep was called.
        points: of its trials; of a search that proposes as it goes on, as many examples.
        first: a point that is right.
    """

    path: Path
    layers: tuple[DictConfig, ...]
    overrides: tuple[str, ...]
    section: SweepConfig
    space: Space
    points: tuple[Point, ...]
    first: Point
    data_root: str

    @property
    def name(self) -> str:
        return self.path.name

    def config(self, point: Mapping[str, float], trial: str | None = None) -> Config:
        """The configuration of a point, as a run of its own or as a trial below the sweep's folder.

        Raises:
            UserError: it contradicts itself; the key is of the space if that decides it.
        """
        settings = self.space.settings(point)
        try:
            config = compose(self.layers, self.overrides, nested(settings))
        except UserError as error:
            decided = any(
                error.key == key or error.key.startswith((f"{key}.", f"{key}[")) for key in settings
            )
            key = f"sweep.space.{error.key}" if decided else error.key
            raise UserError(key, error.value, error.right) from None
        run = RunConfig(str(self.path.parent if trial is None else self.path), trial)
        data: DataConfig = replace(config.data, root=self.data_root)
        return replace(config, data=data, run=run)

    def definition(self) -> dict[str, Any]:
        """What a sweep that goes on must find as it was."""
        return {**self.section.definition(), "configuration": fingerprint(self.config(self.first))}


def prepare(files: Sequence[str], overrides: Sequence[str]) -> Sweep:
    """Reads and checks what is to be tried; writes nothing.

    Raises:
        UserError: the section is wrong; or a point of a finite space; or every point of those drawn first.
        RunError: a plan contradicts itself.
    """
    layers = tuple(read(file) for file in files)
    own = [word for word in overrides if word.partition("=")[0].split(".")[0] == SWEEP]
    common = tuple(word for word in overrides if word not in own)
    section = read_section(SWEEP, SweepConfig, layers, own)
    space = parse(section.space)
    check_section(section, space)
    _check_overrides(space, common)
    points = tuple(space.points(section.search.trials or 1, section.search.seed))
    draft = Sweep(Path(), layers, common, section, space, points, points[0], "")
    first = _check(draft)
    base = absolute(compose(layers, common, nested(space.settings(first))))
    path = Path(base.run.root) / (base.run.name or Path(files[0]).stem)
    RunFolder(path).refuse_existing()
    return replace(draft, path=path, first=first, data_root=base.data.root)


def _check_overrides(space: Space, overrides: Sequence[str]) -> None:
    """Overrides apply to all trials, so they cannot hold what the space decides for each."""
    for override in overrides:
        key, _, value = override.partition("=")
        for decided in space.keys:
            if key == decided or key.startswith(f"{decided}.") or decided.startswith(f"{key}."):
                raise UserError(key, value, f"is what sweep.space.{decided} decides.")


def _check(draft: Sweep) -> Point:
    """Composes the points that are known, and plans those of a finite space; returns the first that is right.

    Of drawn points some may contradict themselves: their trials fail, and the others go on.
    """
    everything = draft.space.combinations(CHECKED)
    right: list[tuple[Point, Config]] = []
    wrong: UserError | None = None
    for point in everything or draft.points:
        try:
            right.append((point, draft.config(point)))
        except UserError as error:
            if everything:
                raise
            wrong = wrong or error
    if not right:
        assert wrong is not None
        raise wrong
    for _, config in right:
        check_held_out(config)
        check(config.tracking)
    if everything:
        _check_plans(draft.space, right)
    return right[0][0]


def _check_plans(space: Space, right: Sequence[tuple[Point, Config]]) -> None:
    """Plans what differs in more than how it is trained."""
    planned: list[dict[str, Any]] = []
    for point, config in right:
        settings = space.settings(point)
        own = {key: value for key, value in settings.items() if key.split(".")[0] not in UNPLANNED}
        if own not in planned:
            planned.append(own)
            told = ", ".join(f"{key}={value}" for key, value in own.items())
            told = told and f" (for {told})"
            try:
                experiment.make_plan(config, datasets.describe(config.data))
            except UserError as error:
                raise UserError(error.key, error.value, f"{error.right}{told}") from None
            except RunError as error:
                raise RunError(f"{error}{told}") from None
