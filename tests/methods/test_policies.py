"""Every method under every round policy: it runs, and its bits follow from configuration and seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cluster_fl import experiment, methods
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.extraction import extract, load, read
from cluster_fl.nesting.plan import Holding, Plan, State
from cluster_fl.records import weights_sha256
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.timing.fitting import training_bytes
from cluster_fl.timing.schema import ASYNCHRONOUS
from cluster_fl.training.program import Context, Trained
from tests.methods.common import UnrulyPools, small
from tests.tiny import attempts_of, lines, outcome, round_of, run_here, stopped_after, worker_of

# Some 20 samples a client, three units; devices of different speed and with other work, some of which get lost.
LITTLE = (
    "model.name=resnet8",
    "rounds=4",
    "clients.per_round=3",
    "data.held_out=1317",
    "train.epochs=2",
    "train.batch_size=20",
    "evaluate.every=4",
    "evaluate.clients=1",
    "time.load.shares=[0,0.5]",
    "time.load.stay=0.3",
    "time.stragglers.name=lognormal",
    "time.dropout=0.1",
)
NEEDS = {"inclusivefl": ("levels.pairs=[{depth: 1}, {depth: 2}, {}]",)}

# S stands for what a client takes in the first round, the median over all.
DEADLINE = ("time.policy.name=deadline", "time.policy.deadline_s=S")
SYNCHRONOUS = {
    "drop": DEADLINE,
    "partial": (*DEADLINE, "time.policy.late=partial"),
    "smaller": (*DEADLINE, "time.policy.late=smaller"),
    "over_select": ("time.policy.name=over_select", "time.policy.factor=1.5"),
    "tiers": ("time.policy.name=tiers", "time.policy.tiers=2"),
}
BUFFERED = {
    "semi_sync": (
        "time.policy.name=semi_sync",
        "time.policy.period_s=S",
        "time.policy.concurrency=4",
    ),
    "fedbuff": ("time.policy.name=fedbuff", "time.policy.buffer=2", "time.policy.concurrency=4"),
    "fedasync": ("time.policy.name=fedasync", "time.policy.concurrency=4"),
}
POLICIES = SYNCHRONOUS | BUFFERED
# They need all clients of a round to start from the same weights.
TOGETHER = ("feddf", "hermes")


def combinations() -> list[tuple[str, str]]:
    """All pairs of a method and a policy that make sense."""
    return [
        (method, policy)
        for method, policy in itertools.product(methods.NAMES, POLICIES)
        if policy in SYNCHRONOUS or method not in TOGETHER
    ]


def covering() -> list[tuple[str, str]]:
    """One policy a method, so that each policy has at least two methods."""
    any_kind, together = itertools.cycle(POLICIES), itertools.cycle(SYNCHRONOUS)
    return [(method, next(together if method in TOGETHER else any_kind)) for method in methods.NAMES]


@pytest.fixture(autouse=True)
def plans_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a method does not depend on the clock, and takes longer than a run."""
    monkeypatch.setattr(experiment, "make_plan", _planned)


KNOWN: dict[str, Plan] = {}
make_plan = experiment.make_plan


def _planned(config: Config, shape: tuple[tuple[int, int, int], int]) -> Plan:
    key = f"{config.method} {config.options} {config.model} {config.levels} {config.clients} {config.train}"
    if key not in KNOWN:
        KNOWN[key] = make_plan(config, shape)
    return KNOWN[key]


def little(folder: Path, method: str, *overrides: str) -> Config:
    needs = (*LITTLE, *NEEDS.get(method, ()))
    if any("=S" in one for one in overrides):
        made = prepare(small(folder, method, *needs))
        pace = np.median(attempts_of(made, round_of(made, clients=range(6))).finish)
        overrides = tuple(one.replace("=S", f"={pace}") for one in overrides)
    return small(folder, method, *needs, *overrides)


def interrupted(config: Config, path: Path, rounds: int) -> None:
    """A run of several workers that is stopped and resumed."""
    stopped_after(config, path, rounds, partial(UnrulyPools, count=3))
    run_here(config, path, partial(UnrulyPools, count=2, seed=1), resume=True)


def everyone(path: Path) -> list[dict[str, Any]]:
    """All participants of a run, each with its round."""
    return [one | {"round": line["round"]} for line in lines(path) for one in line["participants"]]


def check(method: str, policy: str, folder: Path) -> None:
    config = little(folder, method, *POLICIES[policy])
    run_here(config, folder / "here")
    interrupted(config, folder / "unruly", rounds=2)
    assert outcome(folder / "unruly") == outcome(folder / "here")
    begun = [(one["client"], one["version"]) for one in everyone(folder / "here")]
    assert len(set(begun)) == len(begun)
    merged = [one for one in everyone(folder / "here") if one["fate"] == "merged"]
    assert merged
    if policy in BUFFERED:
        assert any(one["version"] < one["round"] for one in merged)
        assert list((folder / "here/checkpoints/round-00003").glob("start-*"))


def test_the_covering_pairs_cover() -> None:
    pairs, every = covering(), set(combinations())
    assert len(every) == 19 * 8 - 2 * 3
    assert set(pairs) <= every
    assert len(set(pairs)) == len(pairs)
    assert [method for method, _ in pairs] == list(methods.NAMES)
    assert all(sum(own == policy for _, own in pairs) >= 2 for policy in POLICIES)


@pytest.mark.parametrize(("method", "policy"), covering())
def test_bits(method: str, policy: str, tmp_path: Path) -> None:
    """Of several workers that finish in any order, get lost and do things twice, in a run that was interrupted."""
    check(method, policy, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "policy"), sorted(set(combinations()) - set(covering())))
def test_bits_of_all_others(method: str, policy: str, tmp_path: Path) -> None:
    check(method, policy, tmp_path)


@pytest.mark.parametrize("method", TOGETHER)
@pytest.mark.parametrize("policy", ASYNCHRONOUS)
def test_who_needs_all_to_start_together_says_so(method: str, policy: str, tmp_path: Path) -> None:
    config = little(
        tmp_path, method, f"time.policy.name={policy}", "time.policy.buffer=2", "time.policy.period_s=1"
    )
    with pytest.raises(
        UserError, match=f"{method} needs all clients .* to start from the same weights"
    ) as caught:
        run_here(config, tmp_path / "run")
    assert (caught.value.key, caught.value.value) == ("time.policy.name", policy)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# At the edges.


def unmoved(config: Config, path: Path) -> None:
    """Whatever happens in it, a run of rounds in which nobody counts ends where it began."""
    made = prepare(config)
    run_here(config, path)
    records, summary = outcome(path)
    assert summary["weights_sha256"] == weights_sha256(made.initial_state())
    assert [line["train_loss"] for line in records] == [None] * config.rounds
    times = [0.0] + [line["sim_time_s"] for line in records]
    assert all(one < other for one, other in itertools.pairwise(times))
    assert summary["bytes_down"] == sum(line["bytes_down"] for line in records) > 0
    assert summary["bytes_up"] == sum(line["bytes_up"] for line in records)
    assert "merged" not in {one["fate"] for one in everyone(path)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_in_which_everybody_is_lost(policy: str, tmp_path: Path) -> None:
    config = little(tmp_path, "fedopt", *POLICIES[policy], "time.dropout=1", "rounds=3")
    unmoved(config, tmp_path / "run")
    assert {one["fate"] for one in everyone(tmp_path / "run")} <= {"lost", "late"}


def test_a_deadline_that_nobody_could_meet_is_refused(tmp_path: Path) -> None:
    """Before anything is written; one that an idle device would meet is not, also where none is idle."""
    busy = ("time.load.shares=[0.5]", "time.stragglers.name=none", "time.policy.name=deadline")
    fastest = prepare(little(tmp_path, "nefl", "time.stragglers.name=none")).clock.fastest()
    config = little(tmp_path, "nefl", *busy, f"time.policy.deadline_s={fastest * 0.99}")
    with pytest.raises(UserError, match=r"is met by nobody: the fastest client needs .* s\.$") as caught:
        run_here(config, tmp_path / "run")
    assert caught.value.key == "time.policy.deadline_s"
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    unmoved(little(tmp_path, "nefl", *busy, f"time.policy.deadline_s={fastest * 1.01}"), tmp_path / "run")
    assert "late" in {one["fate"] for one in everyone(tmp_path / "run")}


def test_a_tier_that_never_comes_has_empty_rounds(tmp_path: Path) -> None:
    """They take no time, and the other tier's go on."""
    tiers = ("time.policy.name=tiers", "time.policy.tiers=2", "time.dropout=0")
    there = sorted(prepare(little(tmp_path, "fedavg", *tiers)).clock.fastest_first[:3].tolist())
    traces = tmp_path / "traces.csv"
    rows = [f"{client},0,9" if client in there else f"{client},," for client in range(6)]
    traces.write_text("\n".join(["user,start_s,end_s", *rows]))
    source = ("time.availability.source=csv", f"time.availability.file={traces}", "rounds=6")
    run_here(little(tmp_path, "fedavg", *tiers, *source), tmp_path / "run")
    asked, time = set(), 0.0
    for line in lines(tmp_path / "run"):
        clients = [one["client"] for one in line["participants"]]
        assert (line["sim_time_s"] > time) == bool(clients)
        asked.add(tuple(clients))
        time = line["sim_time_s"]
    assert asked == {(), tuple(there)}


def test_a_share_that_is_never_reached_abandons_every_round(tmp_path: Path) -> None:
    """Those who were in time have worked for nothing."""
    config = little(tmp_path, "scaffold", *DEADLINE, "time.policy.min_share=1")
    unmoved(config, tmp_path / "run")
    assert {one["fate"] for one in everyone(tmp_path / "run")} == {"abandoned", "late", "lost"}


@pytest.mark.parametrize(
    "policy",
    [
        ("time.policy.name=over_select", "time.policy.factor=1"),
        ("time.policy.name=tiers", "time.policy.tiers=1"),
        ("time.policy.name=semi_sync", "time.policy.period_s=0.3"),
        ("time.policy.name=fedbuff", "time.policy.buffer=1"),
        ("time.policy.name=fedasync", "time.policy.max_staleness=0"),
    ],
)
def test_a_single_client(policy: tuple[str, ...], tmp_path: Path) -> None:
    few = ("clients.count=1", "clients.per_round=1", "levels.ratios=null", "levels.pairs=[{}]")
    alone = (*few, "time.dropout=0", *policy)
    run_here(little(tmp_path, "fedavg", *alone), tmp_path / "run")
    assert {one["client"] for one in everyone(tmp_path / "run")} == {0}
    assert any(one["fate"] == "merged" for one in everyone(tmp_path / "run"))


@pytest.mark.parametrize("policy", ["partial", "fedbuff", "fedasync"])
@pytest.mark.parametrize("method", ["nestfl", "scaffold"])
def test_without_epochs_nothing_moves(method: str, policy: str, tmp_path: Path) -> None:
    """Clients take part, and have nothing to say."""
    config = little(tmp_path, method, *POLICIES[policy], "train.epochs=0", "rounds=3")
    run_here(config, tmp_path / "run")
    _, summary = outcome(tmp_path / "run")
    assert summary["weights_sha256"] == weights_sha256(prepare(config).initial_state())
    assert any(one["fate"] == "merged" for one in everyone(tmp_path / "run"))


@pytest.mark.parametrize("policy", ["smaller", "fedbuff", "fedasync"])
def test_a_client_without_samples_has_nothing_to_say(policy: str, tmp_path: Path) -> None:
    """It may arrive first, and moves nothing: of six clients two have no samples."""
    few = ("data.held_out=1428", "rounds=6", "time.dropout=0")
    config = little(tmp_path, "fedavg", *POLICIES[policy], *few, "checkpoint.keep=99")
    samples = prepare(config).population.samples
    assert sorted(samples.tolist()) == [0, 0, 2, 2, 2, 3]
    run_here(config, tmp_path / "run")
    states, silent = states_of(prepare(config), tmp_path / "run"), 0
    for line in lines(tmp_path / "run"):
        merged = [one["client"] for one in line["participants"] if one["fate"] == "merged"]
        if not samples[merged].any():
            silent += bool(merged)
            before, after = (weights_sha256(states[line["round"] + step]) for step in (0, 1))
            assert before == after
    assert silent or policy != "fedasync"


# Policies that come to the same.

# Operations and bytes take no time: only the round trip does, which all have in common.
EQUAL = (
    *("rounds=3", "evaluate.every=1", "time.load.shares=[0]", "time.stragglers.name=none", "time.dropout=0"),
    "time.devices.source=values",
    *(f"time.devices.{key}=[1e290]" for key in ("gflops", "down_mbps", "up_mbps")),
)


@pytest.mark.parametrize("method", ["fedavg", "scalefl", "nefl", "fedrolex", "scaffold"])
def test_a_buffer_of_all_equally_fast_clients_is_a_round(method: str, tmp_path: Path) -> None:
    """Bit for bit: weights, what clients keep, accuracies, and the clock."""
    buffered = ("time.policy.name=fedbuff", "time.policy.buffer=3")
    run_here(little(tmp_path, method, *EQUAL), tmp_path / "wait")
    run_here(little(tmp_path, method, *EQUAL, *buffered), tmp_path / "fedbuff")
    found, expected = outcome(tmp_path / "fedbuff"), outcome(tmp_path / "wait")
    assert found[1]["weights_sha256"] == expected[1]["weights_sha256"]
    assert found == expected
    assert all(len(line["participants"]) == 3 for line in found[0])
    assert found[1]["sim_time_s"] == pytest.approx(3 * 0.05, rel=1e-12)


def test_nestfl_as_well_where_all_sizes_are_in_use(tmp_path: Path) -> None:
    """In a round its chain has the sizes in use, in asynchronous runs all. Memory decides who has which."""
    all_six = (*EQUAL, "clients.per_round=6")
    plan = prepare(little(tmp_path, "nestfl", *all_six)).plan
    needs = [training_bytes(level.cost, 20, False) / 1e6 for level in plan.levels]
    memory = f"time.devices.memory_mb={[needs[client % 3] for client in range(6)]}"
    buffered = ("time.policy.name=fedbuff", "time.policy.buffer=6")
    run_here(little(tmp_path, "nestfl", *all_six, memory), tmp_path / "wait")
    run_here(little(tmp_path, "nestfl", *all_six, memory, *buffered), tmp_path / "fedbuff")
    assert outcome(tmp_path / "fedbuff") == outcome(tmp_path / "wait")
    levels = [one["level"] for one in lines(tmp_path / "wait")[0]["participants"]]
    assert levels == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("method", ["scalefl", "nestfl"])
def test_nobody_too_many_and_no_deadline_is_waiting_for_all(method: str, tmp_path: Path) -> None:
    few = "rounds=2"
    run_here(little(tmp_path, method, few), tmp_path / "wait")
    for policy, own in (
        ("over_select", "time.policy.factor=1"),
        ("deadline", "time.policy.deadline_s=.inf"),
        ("deadline", "time.policy.deadline_s=1e9"),
    ):
        path = tmp_path / own
        run_here(little(tmp_path, method, few, f"time.policy.name={policy}", own), path)
        assert outcome(path) == outcome(tmp_path / "wait")


# What a merge is, by hand.


def states_of(made: Experiment, path: Path) -> dict[int, State]:
    """The weights after so many rounds."""
    saved = {int(p.name[-5:]): load_file(p / "state.safetensors") for p in path.glob("checkpoints/round-*")}
    return {0: made.initial_state()} | saved


def trained(made: Experiment, one: Mapping[str, Any], start: State) -> tuple[Holding, State, Trained]:
    """What a participant of a record has trained: weights by tensor name."""
    client, level = one["client"], made.plan.level(one["level"])
    holding = made.plan.holding(level.number)
    model = extract(made.plan.model.build(), made.plan.anatomy, level.submodel)
    model = model.to(memory_format=torch.channels_last)
    load(model, holding.gather(start))
    context = Context(
        worker=worker_of(made),
        round=one["version"],
        client=client,
        level=level,
        submodel=level.submodel,
        holding=holding,
        received=holding.gather(start),
        state=start,
        personal={},
        generator=torch_generator(made.config.seed, Purpose.TRAIN, one["version"], client),
        epochs=made.config.train.epochs,
    )
    done = made.program.train(model.train(), context)
    return holding, read(model), done


KEEP = ("rounds=6", "checkpoint.keep=99", "evaluate.every=6")


@pytest.mark.parametrize("method", ["scalefl", "heterofl"])
def test_a_merge_of_a_buffer_by_hand(method: str, tmp_path: Path) -> None:
    """Each update by its age, counted from the weights that it began with; each element by its own contributors."""
    made = prepare(little(tmp_path, method, *KEEP, *BUFFERED["fedbuff"], "time.policy.buffer=3"))
    run_here(made.config, tmp_path / "run")
    states, ages, contributors = states_of(made, tmp_path / "run"), set(), set()
    assert sorted(states) == list(range(7))
    for line in lines(tmp_path / "run"):
        number = line["round"]
        total = {key: np.zeros(array.shape) for key, array in states[0].items()}
        counts = {key: np.zeros(array.shape) for key, array in states[0].items()}
        for one in line["participants"]:
            if one["fate"] != "merged":
                continue
            start, age = states[one["version"]], number - one["version"]
            holding, after, done = trained(made, one, start)
            for name, key in holding.keys.items():
                at, share = holding.where[name], done.coverage.get(name, np.ones(()))
                total[key][at] += (after[name].astype(float) - start[key][at]) * share / np.sqrt(1 + age)
                counts[key][at] += share
            ages.add(age)
        for key, before in states[number].items():
            moved = before + total[key] / np.maximum(counts[key], 1)
            assert states[number + 1][key] == pytest.approx(moved, abs=1e-6)
            untouched = counts[key] == 0
            assert states[number + 1][key][untouched].tobytes() == before[untouched].tobytes()
            contributors |= set(np.unique(counts[key]).tolist())
    assert {0, 1} <= ages
    assert {1.0, 2.0, 3.0} <= contributors


@pytest.mark.parametrize("concurrency", [1, 3])
def test_mixing_in_all_of_a_client_is_its_model(concurrency: int, tmp_path: Path) -> None:
    """FedAsync with a share of 1, whatever its age: w + 1 (w_client - w), up to rounding."""
    whole = ("time.policy.mixing=1", "time.policy.staleness=constant")
    policy = ("time.policy.name=fedasync", f"time.policy.concurrency={concurrency}", *whole)
    made = prepare(little(tmp_path, "fedavg", *KEEP, *policy))
    assert len(made.plan.levels) == 1
    run_here(made.config, tmp_path / "run")
    states, ages = states_of(made, tmp_path / "run"), set()
    for line in lines(tmp_path / "run"):
        for one in line["participants"]:
            if one["fate"] == "merged":
                _, after, _ = trained(made, one, states[one["version"]])
                ages.add(line["round"] - one["version"])
                for key, expected in after.items():
                    found = states[line["round"] + 1][key]
                    # Updates are multiples of 2^-40, and what is stored has 24 bits.
                    involved = (states[line["round"]][key], states[one["version"]][key], expected)
                    limit = 2.0**-24 * np.sum(np.abs(involved), axis=0) + 2.0**-39
                    assert (np.abs(found - expected) <= limit).all()
    assert (max(ages) > 0) == (concurrency > 1)


@pytest.mark.parametrize("mixing", [0.25, 0.6])
def test_mixing_in_a_share_of_a_client(mixing: float, tmp_path: Path) -> None:
    """w + mixing (1 + t)^-1/2 (w_client - w), where w may have moved since the client began."""
    policy = ("time.policy.name=fedasync", "time.policy.concurrency=3", f"time.policy.mixing={mixing}")
    made = prepare(little(tmp_path, "fedavg", *KEEP, *policy))
    run_here(made.config, tmp_path / "run")
    states, seen = states_of(made, tmp_path / "run"), 0
    for line in lines(tmp_path / "run"):
        before, after = (states[line["round"] + step] for step in (0, 1))
        for one in line["participants"]:
            if one["fate"] == "merged":
                share = mixing * (1 + line["round"] - one["version"]) ** -0.5
                _, own, _ = trained(made, one, states[one["version"]])
                for key, array in own.items():
                    assert after[key] == pytest.approx((1 - share) * before[key] + share * array, abs=1e-6)
                seen += 1
    assert seen == 6
