"""Runs the trials of a sweep that are still to be done, with Ray Tune. Needs a connected Ray.

What Tune keeps of its own is thrown away: sweep.json and the run folders are what a sweep goes on from, so nothing
that somebody may have put there is ever unpickled, and a scheduler hears of the earlier rounds again.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TunesTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from cluster_fl.config import ClusterConfig
from cluster_fl.errors import RunError
from ops import environment
from ops.sweeping.ledger import Ledger
from ops.sweeping.space import Between, Dimension
from ops.sweeping.trial import TuneTrial
from ops.sweeping.watcher import Watcher

TIME, VALUE = "rounds", "value"  # of a report
# A bundle must hold something: of the node's own mark the least there is.
MARK = 0.0001
SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed reports no metric
}


def run(ledger: Ledger, cluster: ClusterConfig, quiet: bool) -> None:
    """Until every trial is done or has failed; the ledger is kept up to date.

    Args:
        cluster: what a trial gets; its ``pools`` are a number.

    Raises:
        UserError: no trial fits on the cluster.
        RunError: Tune failed.
    """
    section, sweep = ledger.sweep.section, ledger.sweep
    watcher = Watcher(ledger, quiet)
    own = sweep.path / ".tune"
    shutil.rmtree(own, ignore_errors=True)
    with _settings():
        going_on = [{"trial": row.trial, "point": row.point} for row in ledger.open_rows()]
        chosen: dict[str, Any] = {}
        if section.search.name == "optuna":
            from ops.sweeping.asking import Asking

            chosen["search_alg"] = Asking(ledger)
            chosen["num_samples"] = len(going_on) + ledger.total - len(ledger.rows)
        trainable = tune.with_parameters(TuneTrial, sweep=sweep, environment=environment.chosen(()))
        tuner = tune.Tuner(
            tune.with_resources(trainable, _bundles(cluster)),
            param_space={} if chosen else {"proposed": tune.grid_search(going_on)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(ledger),
                max_concurrent_trials=None if section.concurrent == "auto" else int(section.concurrent),
                trial_name_creator=_name,
                trial_dirname_creator=_name,
                **chosen,
            ),
            run_config=tune.RunConfig(
                name=own.name,
                storage_path=str(sweep.path),
                callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=cluster.retries),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (tune.TuneError, ray.exceptions.RayError) as error:
            raise RunError(f"Ray Tune failed: {str(error).strip().splitlines()[-1]}") from error
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _name(trial: TunesTrial) -> str:
    name: str = trial.config["proposed"]["trial"]
    return name


def _bundles(cluster: ClusterConfig) -> tune.PlacementGroupFactory:
    """A trial's: one for the driver, on this node, whose disk has the run folders; and one a pool.

    The driver takes no CPU, as everywhere.
    """
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    mark = next(name for name in node["Resources"] if name.startswith("node:") and "__" not in name)
    each = {"CPU": cluster.cpus_per_pool, "GPU": cluster.gpus_per_pool}
    pool = {name: count for name, count in each.items() if count} or {mark: MARK}
    return tune.PlacementGroupFactory([{mark: MARK}, *[pool] * int(cluster.pools)], strategy="PACK")


def _scheduler(ledger: Ledger) -> TrialScheduler:
    section = ledger.sweep.section
    wanted, rounds = section.scheduler, ledger.sweep.config(ledger.sweep.first).rounds
    if wanted.name == "asha":
        asha = ASHAScheduler(
            time_attr=TIME,
            metric=VALUE,
            mode=section.mode,
            max_t=rounds,
            grace_period=min(wanted.grace, rounds),
            reduction_factor=wanted.factor,
            # The last report ends a trial by itself.
            stop_last_trials=False,
        )
        _tell_done(asha, ledger)
        return asha
    if wanted.name == "pbt":
        mutations = {one.name: _mutated(one) for one in ledger.sweep.space.dimensions}
        return PopulationBasedTraining(
            time_attr=TIME,
            metric=VALUE,
            mode=section.mode,
            perturbation_interval=wanted.interval,
            hyperparam_mutations={"proposed": {"point": mutations}},
            quantile_fraction=wanted.quantile,
            resample_probability=wanted.resample,
            require_attrs=False,
            log_config=False,
        )
    return FIFOScheduler()


def _tell_done(scheduler: ASHAScheduler, ledger: Ledger) -> None:
    """Trials that were done before count among those that the others are compared with."""
    for row in ledger.rows:
        if row.done:
            past = TunesTrial("past", stub=True)
            scheduler.on_trial_add(None, past)
            for rounds, value in ledger.reports(row):
                scheduler.on_trial_result(None, past, {TIME: rounds, VALUE: value})


def _mutated(one: Dimension) -> Any:
    """How a dimension's number may change: of a list to its neighbours."""
    if not isinstance(one, Between):
        return list(range(len(one.values)))
    if one.whole:
        return tune.randint(int(one.low), int(one.high) + 1)
    return tune.loguniform(one.low, one.high) if one.log else tune.uniform(one.low, one.high)


@contextmanager
def _settings() -> Iterator[None]:
    """Tune says nothing of its own, and leaves Ctrl-C alone."""
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in SETTINGS}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(SETTINGS)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
