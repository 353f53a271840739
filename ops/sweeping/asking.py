"""Points from Optuna: each trial's outcome makes the next proposal better."""

from __future__ import annotations

from collections import deque
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState, create_trial
from ray.tune.search import Searcher

from ops.sweeping.ledger import Ledger, Row
from ops.sweeping.space import Between, Dimension


class Asking(Searcher):
    """First the trials that are still to be done, then new ones. What a cut trial has reached counts as it is."""

    def __init__(self, ledger: Ledger) -> None:
        section = ledger.sweep.section
        super().__init__(metric="value", mode=section.mode)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._ledger = ledger
        self._distributions = {one.name: _distribution(one) for one in ledger.sweep.space.dimensions}
        # With what was proposed before, so that a sweep that goes on does not propose the same again.
        sampler = optuna.samplers.TPESampler(seed=section.search.seed + len(ledger.rows))
        direction = StudyDirection.MAXIMIZE if section.mode == "max" else StudyDirection.MINIMIZE
        self._study = optuna.create_study(sampler=sampler, direction=direction)
        self._waiting: deque[Row] = deque(ledger.open_rows())
        self._asked: dict[str, Trial] = {}
        for row in ledger.rows:
            if row.done:
                past = create_trial(params=row.point, distributions=self._distributions, value=row.value)
                self._study.add_trial(past)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self._waiting:
            row = self._waiting.popleft()
            self._study.enqueue_trial(row.point)
            self._asked[trial_id] = self._study.ask(self._distributions)
        elif len(self._ledger.rows) < self._ledger.total:
            self._asked[trial_id] = asked = self._study.ask(self._distributions)
            row = self._ledger.propose(dict(asked.params))
        else:
            finished: dict[str, Any] = Searcher.FINISHED
            return finished
        return {"proposed": {"trial": row.trial, "point": row.point}}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        value = (result or {}).get("value")
        asked = self._asked.pop(trial_id)
        if error or value is None:
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            self._study.tell(asked, value)

    def save(self, checkpoint_path: str) -> None:
        """The ledger has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """From the ledger, as it is made."""


def _distribution(one: Dimension) -> BaseDistribution:
    if not isinstance(one, Between):
        return CategoricalDistribution(range(len(one.values)))
    if one.whole:
        return IntDistribution(int(one.low), int(one.high))
    return FloatDistribution(one.low, one.high, log=one.log)
