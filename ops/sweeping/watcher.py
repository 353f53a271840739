"""Hears of every trial from Ray Tune, keeps the ledger, and says a line for each report and each end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune
from rich.console import Console

from ops.sweeping.ledger import Ledger, Row
from ops.sweeping.results import readable, told


class Watcher(tune.Callback):
    """Tune calls it in the command's own process."""

    def __init__(self, ledger: Ledger, quiet: bool) -> None:
        self._ledger, self._quiet = ledger, quiet

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._ledger[str(trial)]
        row.state, row.error = "running", None
        self._ledger.save()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._ledger[str(trial)]
        if result["error"] is not None:
            self._fail(row, result["error"])
            return
        if result["folder"] != row.folder:
            self._forked(row, result)
        row.rounds, row.value, row.sim_time_s = result["rounds"], result["value"], result["sim_time_s"]
        if result["finished"]:
            row.state = "finished"
        self._ledger.save()
        if not result["replayed"]:
            done = ", finished" if result["finished"] else ""
            self._say(row, f"round {row.rounds}  {self._value(row)}{done}  {readable(row.settings)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self._ledger[str(trial)]
        if row.state == "running":
            row.state = "stopped"
            self._ledger.save()
            self._say(row, f"stopped after round {row.rounds}  {self._value(row)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # What a user can do something about never comes this way (TuneTrial.step).
        error = trial.get_error()
        last = str(error).strip().splitlines()[-1] if error is not None else "no reason is known"
        self._fail(self._ledger[str(trial)], f"its process failed: {last}")

    def _forked(self, row: Row, result: Mapping[str, Any]) -> None:
        """The trial has gone on from another one's weights, with other settings."""
        row.folder, row.point = result["folder"], result["point"]
        row.settings = self._ledger.sweep.space.settings(row.point)
        if result["forked"]:
            self._say(row, "goes on from {trial} after round {rounds}".format(**result["forked"]))
        row.changes.append({**(result["forked"] or {}), "folder": row.folder, "settings": row.settings})

    def _fail(self, row: Row, error: str) -> None:
        row.state, row.error = "failed", " ".join(error.split())
        self._ledger.save()
        self._say(row, f"failed: {row.error}")

    def _value(self, row: Row) -> str:
        return told(self._ledger.sweep.section.metric, row.value)

    def _say(self, row: Row, text: str) -> None:
        if not self._quiet:
            done = sum(one.done or one.state == "failed" for one in self._ledger.rows)
            line = f"{done}/{self._ledger.total} {row.trial}  {text}"
            # Tune pickles its callbacks, which a console does not survive.
            Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
