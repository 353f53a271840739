"""From a run's records to flat numbers with names: the one place that says what is logged and what it means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from cluster_fl.timing.attempts import Fate
from ops.accuracy import NAMES

Row = dict[str, float]

ROUND, SIM_TIME = "round", "sim_time_s"
BEST = "max,last"
# What an accuracy block says of a model -> the group of its metrics, in a round and after the last one.
KINDS = {
    "last_exit": ("accuracy", "test"),
    "exit_mean": ("exit_mean", "test_exit_mean"),
    "ensemble": ("ensemble", "test_ensemble"),
}


@dataclass(frozen=True)
class Metric:
    """``name`` may end with a ``*``.

    Attributes:
        step: against what it is shown; nothing: it is an axis itself.
        summary: what a table of runs shows of it; its last value when not given.
    """

    name: str
    about: str
    step: str | None = ROUND
    summary: str | None = None

    def covers(self, name: str) -> bool:
        return fnmatchcase(name, self.name)


METRICS = (
    Metric(ROUND, "number of the round, from 0; the test's is one more than the last round's", None),
    Metric(SIM_TIME, "simulated seconds since the run began, at the end of the round", None),
    Metric("wall_time_s", "seconds that the cluster has spent since the run began", None),
    Metric("bytes/total", "bytes sent in both directions since the run began", None),
    Metric("accuracy/*", "share of held-out samples that the last exit answers right", summary=BEST),
    Metric("exit_mean/*", "the same, the mean over the model's exits", summary=BEST),
    Metric("ensemble/*", "the same, all exits together, where a method answers so", summary=BEST),
    Metric("test/*", "after the last round: the last exit on all clients' test parts"),
    Metric("test_exit_mean/*", "after the last round: the mean over the exits"),
    Metric("test_ensemble/*", "after the last round: all exits together"),
    Metric("train/loss", "mean loss of the clients that trained"),
    Metric("bytes/down", "bytes that clients received"),
    Metric("bytes/up", "bytes that clients sent"),
    Metric("clients/ended", "clients whose attempt ended in the round, in whatever way", SIM_TIME),
    *(
        Metric(f"clients/{fate}", about, SIM_TIME)
        for fate, about in (
            ("merged", "of these, whose update counts"),
            ("late", "of these, not done when the round ended"),
            ("lost", "of these, dropped out in the middle"),
            ("stale", "of these, done from weights that were too old"),
            ("abandoned", "of these, done in a round with too few others"),
        )
    ),
    Metric("clients/refused", "updates that were left out because they were not finite", SIM_TIME),
    Metric("clients/staleness", "rounds between a merged client's weights and its merge, mean", SIM_TIME),
    Metric("time/round_s", "simulated seconds of the round", SIM_TIME),
    Metric("time/client_mean_s", "simulated seconds of a client's attempt, mean", SIM_TIME),
    Metric("time/client_max_s", "simulated seconds of the longest attempt", SIM_TIME),
    Metric("wall/round_s", "seconds that the round took"),
    Metric("wall/phase/*", "seconds of each of its phases"),
    Metric("wall/busy", "share of the pools' time in which they worked"),
    Metric("wall/tail_s", "seconds of pools that waited for the last one of a phase"),
    Metric("wall/pools", "pools"),
    Metric("wall/retries", "tasks that were sent again after a pool died"),
)


class History:
    """Rows of a run's rounds, which must come in order from round 0: it keeps the totals."""

    def __init__(self) -> None:
        self._sim_time_s = self._wall_time_s = 0.0
        self._bytes = 0

    def row(self, record: Mapping[str, Any]) -> Row:
        """A line of rounds.jsonl. What the record does not know is left out."""
        self._bytes += record["bytes_down"] + record["bytes_up"]
        row: Row = {
            ROUND: record["round"],
            SIM_TIME: record["sim_time_s"],
            "wall_time_s": record["wall_time_s"],
            "bytes/total": self._bytes,
            "bytes/down": record["bytes_down"],
            "bytes/up": record["bytes_up"],
            "time/round_s": record["sim_time_s"] - self._sim_time_s,
            **_clients(record),
            **_wall(record, record["wall_time_s"] - self._wall_time_s),
            **_accuracy(record.get("accuracy", {}), after_last=False),
        }
        if record["train_loss"] is not None:
            row["train/loss"] = record["train_loss"]
        self._sim_time_s, self._wall_time_s = record["sim_time_s"], record["wall_time_s"]
        return row

    @staticmethod
    def last(summary: Mapping[str, Any]) -> Row:
        """What summary.json says: the row after the last round's."""
        return {
            ROUND: summary["rounds"],
            SIM_TIME: summary["sim_time_s"],
            "wall_time_s": summary["wall_time_s"],
            "bytes/total": summary["bytes"],
            **_accuracy(summary["accuracy"], after_last=True),
        }


def _clients(record: Mapping[str, Any]) -> Row:
    ended = record["participants"]
    fates = Counter(one["fate"] for one in ended)
    row: Row = {"clients/ended": len(ended), "clients/refused": len(record["refused"])}
    row |= {f"clients/{fate.name.lower()}": fates[fate.name.lower()] for fate in Fate}
    late_by = [record["round"] - one["version"] for one in ended if one["fate"] == Fate.MERGED.name.lower()]
    if late_by:
        row["clients/staleness"] = sum(late_by) / len(late_by)
    if ended:
        seconds = [one["seconds"] for one in ended]
        row |= {"time/client_mean_s": sum(seconds) / len(seconds), "time/client_max_s": max(seconds)}
    return row


def _wall(record: Mapping[str, Any], seconds: float) -> Row:
    wall = record["wall"]
    row: Row = {
        "wall/round_s": seconds,
        "wall/tail_s": wall["tail_s"],
        "wall/pools": wall["pools"],
        "wall/retries": record["retries"],
        **{f"wall/phase/{phase}": spent for phase, spent in wall["phases"].items()},
    }
    if seconds > 0 and wall["pools"]:
        row["wall/busy"] = wall["busy_s"] / (wall["pools"] * seconds)
    return row


def _accuracy(blocks: Mapping[str, Any], after_last: bool) -> Row:
    """Every model's numbers; a model that a method does not have, or that nobody was asked about, is left out."""
    return {
        f"{KINDS[kind][after_last]}/{model}": value
        for model, block in _models(blocks)
        for kind, value in block.items()
        if value is not None
    }


def _models(blocks: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float | None]]]:
    named = [(name, blocks.get(name)) for name in NAMES]
    levels = [(f"level_{at}", block) for at, block in enumerate(blocks.get("levels") or (), start=1)]
    return ((name, block) for name, block in (*named, *levels) if block is not None)
