"""The section ``sweep`` of a YAML, and what its parts say together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from cluster_fl.config import Config, check_values, choose
from cluster_fl.errors import UserError
from cluster_fl.option import option
from ops.accuracy import NAMES as ACCURACIES
from ops.sweeping.space import Space

# What may be the metric -> whether more is better.
METRICS = dict.fromkeys(ACCURACIES, True) | {"train_loss": False, "sim_time_s": False}
# What population based training may change in the middle of a run: neither the plan nor what anybody remembers
# depends on it.
CHANGEABLE = (
    *(f"train.{name}" for name in ("lr", "momentum", "weight_decay", "clip_norm", "epochs", "batch_size")),
    *(f"train.correction.{name}" for name in ("mu", "alpha")),
    *(f"server.{name}" for name in ("lr", "beta1", "beta2", "tau")),
)


@dataclass
class SearchConfig:
    name: str = option(
        "random", "how points are proposed; optuna needs that package", choices=("random", "optuna")
    )
    trials: int | None = option(
        None, "points that are drawn; with grids, for each of their combinations", low=1
    )
    seed: int = option(0, "seed of the draws", low=0)


@dataclass
class SchedulerConfig:
    name: str = option(
        "none",
        "none: every trial runs to its end; asha: the worse are cut at so many rounds; pbt: the worse go on from "
        "the better ones' weights, with settings near theirs",
        choices=("none", "asha", "pbt"),
    )
    grace: int = option(1, "asha: rounds after which trials are cut for the first time", low=1)
    factor: int = option(3, "asha: one of so many goes on, to so many times as many rounds", low=2)
    interval: int = option(5, "pbt: rounds between two changes", low=1)
    quantile: float = option(0.25, "pbt: share of the trials that is replaced by as many", above=0, high=0.5)
    resample: float = option(0.25, "pbt: chance that a setting is drawn anew, not moved", low=0, high=1)


@dataclass
class SweepConfig:
    space: dict[str, Any] = option({}, "setting -> what to try")
    search: SearchConfig = option(SearchConfig, "")
    scheduler: SchedulerConfig = option(SchedulerConfig, "")
    metric: str = option("global", "what decides, on the held-out part", choices=tuple(METRICS))
    concurrent: int | str = option("auto", "trials at the same time; auto: as many as there is room for")

    @property
    def mode(self) -> str:
        return "max" if METRICS[self.metric] else "min"

    def definition(self) -> dict[str, Any]:
        """What may not change in a sweep that has begun."""
        return {key: value for key, value in asdict(self).items() if key != "concurrent"}


def check_section(section: SweepConfig, space: Space) -> None:
    """Every value's range, then what several say together.

    Raises:
        UserError: naming the first key that is wrong.
    """
    check_values(section, "sweep.")
    if isinstance(section.concurrent, str):
        choose("sweep.concurrent", section.concurrent, ("auto",))
    elif section.concurrent < 1:
        raise UserError("sweep.concurrent", section.concurrent, "must be auto or at least 1.")
    search, scheduler = section.search, section.scheduler
    if space.drawn and search.trials is None:
        raise UserError("sweep.search.trials", None, "must say how many points are drawn, e.g. 12.")
    if not space.drawn and (search.trials or 1) > 1:
        raise UserError(
            "sweep.search.trials", search.trials, "would repeat the same: all settings are grids."
        )
    if search.name == "optuna":
        _check_optuna(section, space)
    if scheduler.name != "none" and "rounds" in space.keys:
        raise UserError(
            "sweep.space.rounds", "", f"is what {scheduler.name} decides; set rounds outside of sweep."
        )
    if scheduler.name == "pbt":
        for key in space.keys:
            if key not in CHANGEABLE:
                right = (
                    f"cannot change in the middle of a run, as pbt asks; what can: {', '.join(CHANGEABLE)}."
                )
                raise UserError(f"sweep.space.{key}", "", right)


def check_held_out(config: Config) -> None:
    """Raises UserError if there would be nothing to choose by."""
    if not config.data.held_out:
        right = "leaves nothing to choose by during a run: set samples aside, e.g. data.held_out=120."
        raise UserError("data.held_out", config.data.held_out, right)


def _check_optuna(section: SweepConfig, space: Space) -> None:
    if find_spec("optuna") is None:
        raise UserError("sweep.search.name", "optuna", "needs the package optuna: pip install optuna.")
    for one in space.dimensions:
        if one.crossed:
            raise UserError(f"sweep.space.{one.name}.grid", "", "has no place with optuna; write choice.")
    if section.scheduler.name == "pbt":
        raise UserError("sweep.search.name", "optuna", "has no place with pbt, which proposes by itself.")
