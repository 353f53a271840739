"""The clock alone tells what a real run's clock tells, and adds it up rightly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster_fl import experiment, simulation
from cluster_fl.config import Config
from cluster_fl.data import datasets
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.regions import Regions
from cluster_fl.timing import intervals
from cluster_fl.timing.attempts import Fate
from cluster_fl.timing.policies import Step
from cluster_fl.timing.totals import SPENT, Spread, Totals
from tests.tiny import LEVELS, lines, run_here, tiny

# Everything that disturbs a client; with it a participant takes 0.1 to 0.3 s, and some rounds wait for days.
DISTURBED = (
    "rounds=4",
    "clients.per_round=5",
    "time.stragglers.name=lognormal",
    "time.load.shares=[0,0.5]",
    "time.load.mid_round=true",
    "time.dropout=0.2",
    "time.availability.source=markov",
    "time.availability.on_s=1",
    "time.availability.off_s=0.5",
)
POLICIES = {
    "wait": (),
    "deadline": ("time.policy.deadline_s=0.15", "time.policy.min_share=0.2"),
    "over_select": (),
    "tiers": ("time.policy.tiers=2", "clients.per_round=4"),
    "semi_sync": ("time.policy.period_s=0.1",),
    "fedbuff": ("time.policy.buffer=3",),
}

WIDTHS = "levels.pairs=[{width: 0.5}, {width: 0.75}, {width: 1.0}]"  # for methods that keep all units


def named(policy: str) -> tuple[str, ...]:
    return f"time.policy.name={policy}", *DISTURBED, *POLICIES[policy]


def simulated(config: Config) -> tuple[Experiment, list[Step]]:
    made, _ = simulation.prepare(config)
    return made, list(simulation.steps(made))


# The same as a run.


@pytest.mark.parametrize("policy", ["wait", "deadline", "over_select", "fedbuff"])
def test_it_is_the_clock_of_a_real_run(tmp_path: Path, policy: str) -> None:
    config = tiny(tmp_path, *named(policy))
    run_here(config, tmp_path / "run")
    records, (_, steps) = lines(tmp_path / "run"), simulated(config)
    assert [step.end for step in steps] == [record["sim_time_s"] for record in records]
    for step, record in zip(steps, records, strict=True):
        assert int(step.ended.down.sum()) == record["bytes_down"]
        assert int(step.ended.up.sum()) == record["bytes_up"]
        fates = [Fate(fate).name.lower() for fate in step.ended.fate]
        assert fates == [one["fate"] for one in record["participants"]]
        assert step.ended.attempts.client.tolist() == [one["client"] for one in record["participants"]]


def test_it_has_the_clients_of_a_real_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, "data.partition.name=dirichlet", "data.partition.alpha=1")
    made, notes = simulation.prepare(config)
    real = experiment.prepare(config)
    assert made.population.samples.tolist() == real.population.samples.tolist()
    assert len(set(made.population.samples.tolist())) > 1
    assert made.plan.as_json() == real.plan.as_json()
    assert made.population.tier_of.tolist() == real.population.tier_of.tolist()
    assert notes == []


def test_another_policy_on_the_same_clients(tmp_path: Path) -> None:
    made, _ = simulation.prepare(tiny(tmp_path, *named("wait")))
    for policy in POLICIES:
        config = tiny(tmp_path, *DISTURBED, *POLICIES[policy], f"time.policy.name={policy}")
        ends = [step.end for step in simulation.steps(simulation.under(made, config))]
        assert ends == [step.end for step in simulated(config)[1]]


# What it needs to know.


def test_samples_that_are_given(tmp_path: Path) -> None:
    made, notes = simulation.prepare(tiny(tmp_path, "clients.count=5000", "clients.samples=7"))
    assert made.population.samples.tolist() == [7] * 5000
    assert notes == []


def test_more_clients_than_samples(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^clients\.samples=None: .*digits has 1357 training samples for 1358"
    ):
        simulation.prepare(tiny(tmp_path, "clients.count=1358"))


def test_without_the_data_samples_are_spread_evenly(tmp_path: Path) -> None:
    """And nothing is downloaded, although data.download is true."""
    config = tiny(tmp_path, "data.name=mnist", f"data.root={tmp_path / 'no'}", "data.held_out=3")
    made, notes = simulation.prepare(config)
    samples = made.population.samples
    assert samples.sum() == 59_997
    assert samples.max() - samples.min() == 1
    assert len(notes) == 1
    assert "mnist is not in" in notes[0]
    assert not (tmp_path / "no").exists()


def test_the_sizes_of_data_sets(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert datasets.load(config.data).train_count == simulation.TRAINING_SAMPLES["digits"]
    assert set(simulation.TRAINING_SAMPLES) == set(datasets._ENTRIES)


def test_a_partition_that_cannot_be_is_told(tmp_path: Path) -> None:
    words = ("data.partition.name=shards", "data.partition.shards_per_client=1000")
    with pytest.raises(UserError, match=r"shards_per_client=1000"):
        simulation.prepare(tiny(tmp_path, *words))


def test_sizes_that_follow_from_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^method=hermes: .*weights"):
        simulation.prepare(tiny(tmp_path, "method=hermes", "levels.pairs=null"))


def test_a_pair_that_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^time\.policy\.name=fedbuff: .*feddf"):
        simulation.prepare(tiny(tmp_path, "method=feddf", WIDTHS, "data.public=50", *named("fedbuff")))


def test_nobody_reads_weights_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"method=mine: .*conv1"):
        simulation.Unknown("mine")["conv1"]


@pytest.mark.parametrize("method", ["fedrolex", "nestfl"])
def test_channels_that_vary_are_noted(tmp_path: Path, method: str) -> None:
    _, notes = simulation.prepare(tiny(tmp_path, f"method={method}", WIDTHS, "model.norm=none"))
    assert len(notes) == 1
    assert method in notes[0]


# What it adds up.


def by_hand(steps: list[Step], pauses: list[np.ndarray], level: int | None) -> dict[str, Any]:
    """The totals attempt by attempt."""
    fates: Counter[str] = Counter()
    spent = dict.fromkeys(SPENT, 0.0)
    waste = {"seconds": 0.0, "bytes_down": 0, "bytes_up": 0}
    down = up = 0
    for step, paused in zip(steps, pauses, strict=True):
        own = step.ended.attempts
        for at, (fate, stop) in enumerate(zip(step.ended.fate, step.ended.stop, strict=True)):
            if level is not None and own.level[at] != level:
                continue
            fates[Fate(fate).name.lower()] += 1
            moments = [
                min(float(column[at]), float(stop))
                for column in (own.start, own.downloaded, own.computed, own.finish)
            ]
            work = [b - a - p for a, b, p in zip(moments, moments[1:], paused[:, at], strict=False)]
            for name, seconds in zip(SPENT, work, strict=False):
                spent[name] += seconds
            spent["paused"] += float(paused[:, at].sum())
            if fate in (Fate.MERGED, Fate.ABANDONED):
                spent["waiting"] += step.end - stop
            sent = int(step.ended.down[at]), int(step.ended.up[at])
            down, up = down + sent[0], up + sent[1]
            if fate != Fate.MERGED:
                waste["seconds"] += sum(work)
                waste["bytes_down"] += sent[0]
                waste["bytes_up"] += sent[1]
    worked = sum(spent[name] for name in intervals.PHASES)
    return {
        "attempts": sum(fates.values()),
        "fates": {fate.name.lower(): fates[fate.name.lower()] for fate in Fate},
        "time_s": {name: pytest.approx(seconds, abs=1e-6) for name, seconds in spent.items()},
        "utilisation": pytest.approx(worked / sum(spent.values())),
        "waste": {
            "seconds": pytest.approx(waste["seconds"]),
            "share": pytest.approx(waste["seconds"] / worked),
            "bytes_down": waste["bytes_down"],
            "bytes_up": waste["bytes_up"],
        },
        "bytes_down": down,
        "bytes_up": up,
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_totals_are_those_of_every_attempt(tmp_path: Path, policy: str) -> None:
    config = tiny(tmp_path, *named(policy), "clients.count=40", "rounds=30")
    made, steps = simulated(config)
    pauses = [intervals.pauses(step.ended, made.population.availability) for step in steps]
    totals = Totals(made.plan, 40)
    for step, paused in zip(steps, pauses, strict=True):
        totals.add(step, paused)
    found = totals.as_json(config.time.policy.asynchronous)

    assert (found["rounds"], found["sim_time_s"]) == (30, steps[-1].end)
    assert found["sim_time_hours"] == steps[-1].end / 3600
    lengths = np.diff([0.0, *(step.end for step in steps)])
    quantiles = {"p50": np.quantile(lengths, 0.5), "p95": np.quantile(lengths, 0.95)}
    expected = {"mean": lengths.mean(), **quantiles, "max": lengths.max()}
    assert found["round_s"] == {name: pytest.approx(value) for name, value in expected.items()}

    for level in (None, *range(1, LEVELS + 1)):
        own = found if level is None else found["levels"][level - 1]
        expected = by_hand(steps, pauses, level)
        assert {key: own[key] for key in expected} == expected
    assert sum(level["attempts"] for level in found["levels"]) == found["attempts"]

    ages = Counter(
        int(step.round - version)
        for step in steps
        for version in step.ended.attempts.version[step.ended.merged]
    )
    told = found["staleness"]
    assert (told is None) == (not config.time.policy.asynchronous)
    if told is not None:
        assert dict(enumerate(told)) == {age: ages[age] for age in range(len(told))}

    asked = {int(client) for step in steps for client in step.ended.attempts.client}
    counted = {int(client) for step in steps for client in step.ended.attempts.client[step.ended.merged]}
    assert found["clients"] == {"count": 40, "asked": len(asked), "counted": len(counted)}
    for level, told_of in enumerate(found["levels"], start=1):
        theirs = set(np.flatnonzero(made.plan.level_of == level).tolist())
        numbers = told_of["clients"], told_of["clients_asked"], told_of["clients_counted"]
        assert numbers == (len(theirs), len(theirs & asked), len(theirs & counted))

    # Regions of nested levels: whoever trains a level trains those of the smaller ones.
    for level, told_of in enumerate(found["levels"], start=1):
        holders = [int((step.ended.attempts.level[step.ended.merged] >= level).sum()) for step in steps]
        assert told_of["region"]["holders"] == pytest.approx(np.mean(holders))
        assert told_of["region"]["rounds_without"] == pytest.approx(np.mean(np.array(holders) == 0))


def test_what_a_client_takes_is_told_whatever_its_fate(tmp_path: Path) -> None:
    config = tiny(tmp_path, *named("deadline"), "clients.count=40", "rounds=30")
    made, steps = simulated(config)
    totals = Totals(made.plan, 40)
    for step in steps:
        totals.add(step, np.zeros((3, len(step.ended.attempts))))
    needs = np.concatenate([s.ended.attempts.finish - s.ended.attempts.start for s in steps])
    found = totals.as_json(False)["needs_s"]
    assert found["mean"] == pytest.approx(needs.mean())
    assert found["max"] == needs.max()
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        assert found[name] == pytest.approx(np.quantile(needs, share, method="inverted_cdf"), rel=0.005)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e9])
def test_quantiles_of_a_spread(scale: float) -> None:
    values = scale * np.random.default_rng(0).lognormal(0, 2, 5000)
    which = np.arange(5000) % 2
    made = Spread(2)
    for part in np.array_split(np.arange(5000), 7):
        made.add(which[part], values[part])
    for group in (None, 0, 1):
        own = values if group is None else values[which == group]
        found = made.as_json(group)
        assert found["mean"] == pytest.approx(own.mean())
        assert found["max"] == own.max()
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            assert found[name] == pytest.approx(np.quantile(own, share, method="inverted_cdf"), rel=0.003)


def test_a_spread_of_nothing_and_of_what_never_ends() -> None:
    made = Spread(2)
    made.add(np.array([0, 0, 0]), np.array([0.0, 1.0, np.inf]))
    assert made.as_json(1) == dict.fromkeys(("mean", "p50", "p95", "max"))
    assert made.as_json(0) == {"mean": None, "p50": pytest.approx(1.0, rel=0.003), "p95": None, "max": None}


def test_a_round_without_anybody(tmp_path: Path) -> None:
    """As semi_sync may have."""
    made, steps = simulated(tiny(tmp_path, *named("semi_sync"), "time.policy.period_s=0.001"))
    assert not any(len(step.ended.attempts) for step in steps)
    totals = Totals(made.plan, 8)
    for step in steps:
        totals.add(step, intervals.pauses(step.ended, made.population.availability))
    found = totals.as_json(True)
    assert (found["attempts"], found["utilisation"], found["waste"]["share"]) == (0, None, None)
    assert [level["region"]["rounds_without"] for level in found["levels"]] == [1.0] * LEVELS


# The regions of a model.


def elements(plan: Plan, level: int) -> set[tuple[str, int]]:
    """Every trained number that a level holds, by its place in the state."""
    state = plan.initial_state(
        {name: np.zeros(shape, np.float32) for name, shape in plan.anatomy.shapes.items()}
    )
    holding, found = plan.holding(level), set()
    for name, key in holding.keys.items():
        if key not in plan.measured:
            places = np.arange(state[key].size).reshape(state[key].shape)[holding.where[name]]
            found |= {(key, int(place)) for place in places.ravel()}
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("method=scalefl",),
        ("method=scalefl", "options.channels=random"),
        ("method=decoupled", WIDTHS),
        ("method=scalefl", "model.norm=per_level"),
        (
            "method=nefl",
            "levels.pairs=[{width: 0.5, keep: [0, 2]}, {width: 0.7, keep: [0, 1]}, {width: 1.0}]",
        ),
        ("method=fjord", WIDTHS),
    ],
    ids=" ".join,
)
def test_regions_are_what_levels_hold(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = tiny(tmp_path, *words)
    plan = experiment.make_plan(config, datasets.describe(config.data))
    made, held = Regions.of(plan), [elements(plan, level) for level in range(1, LEVELS + 1)]
    everything = set().union(*held)
    sets = Counter(tuple(one in level for level in held) for one in everything)
    assert {tuple(row): int(n) for row, n in zip(made.held.tolist(), made.params, strict=True)} == dict(sets)
    for level in range(1, LEVELS + 1):
        smaller = held[level - 2] if level > 1 else set()
        assert int(made.beyond(level).sum()) == len(held[level - 1] - smaller)
