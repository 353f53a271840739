"""Federated Dropout: whose channels follow from what, and that company does not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster_fl.experiment import Experiment, prepare
from cluster_fl.nesting.submodel import Submodel, index_map
from cluster_fl.rounds import Round
from tests.tiny import outcome, run_here, tiny

WIDTHS = "levels.pairs=[{width: 0.3}, {width: 0.5}, {}]"


def made(folder: Path, *overrides: str) -> Experiment:
    return prepare(tiny(folder, "method=feddropout", WIDTHS, *overrides))


def drawn(experiment: Experiment, number: int, clients: list[int], level: int = 2) -> list[Submodel]:
    round = Round(
        number, experiment.config, experiment.plan, experiment.population, {}, {}, lambda client: {}
    )
    who = replace(round, participants=np.array(clients))
    return experiment.rule.submodels(who, np.full(len(clients), level))


def test_channels_follow_from_seed_round_and_client(tmp_path: Path) -> None:
    experiment, other = made(tmp_path), made(tmp_path, "seed=1")
    together = drawn(experiment, 3, [0, 2, 5])
    assert together == [drawn(experiment, 3, [client])[0] for client in (0, 2, 5)]
    assert len({*together, *drawn(experiment, 4, [0]), *drawn(other, 3, [0])}) == 5


def test_groups_draw_together_and_as_many_as_the_level_has(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    plan = experiment.plan
    for client, submodel in enumerate(drawn(experiment, 1, list(range(8)))):
        assert submodel.shape == plan.level(2).submodel
        assert submodel.scale == 0.5
        for group, channels in zip(plan.anatomy.groups, submodel.channels, strict=True):
            chosen = list(range(channels)) if isinstance(channels, int) else list(channels)
            assert chosen == sorted(set(chosen))
            assert set(chosen) <= set(range(group.size)), client
        where = index_map(plan.anatomy, submodel)
        into, out = where["units.0.conv1.weight"], where["units.0.conv2.weight"]
        inputs, outputs = (np.arange(4)[index] for index in (into[1], out[0]))
        assert inputs.ravel().tolist() == outputs.ravel().tolist()
    assert drawn(experiment, 1, [0], level=3) == [plan.level(3).submodel]


def test_every_channel_is_drawn_about_as_often_as_any_other(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    last = len(experiment.plan.anatomy.groups) - 1
    size = experiment.plan.anatomy.groups[last].size
    draws = [s.channels[last] for number in range(100) for s in drawn(experiment, number, list(range(8)))]
    lists = [list(range(c)) if isinstance(c, int) else list(c) for c in draws]
    shares = np.bincount(np.concatenate(lists), minlength=size) / len(lists)
    assert np.abs(shares - 0.5).max() < 0.1


def test_a_level_is_served_as_planned(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    round = Round(2, experiment.config, experiment.plan, experiment.population, {}, {}, lambda client: {})
    assert experiment.rule.serve(round) == [level.submodel for level in experiment.plan.levels]


def test_the_size_of_the_cohorts_does_not_show(tmp_path: Path) -> None:
    few = ("data.partition.name=classes", "data.partition.classes=[3]", "variant=released", "rounds=2")
    digests = set()
    for size in (1, 3):
        config = tiny(tmp_path, "method=feddropout", WIDTHS, *few, f"train.cohort_size={size}")
        run_here(config, tmp_path / f"size{size}")
        digests.add(outcome(tmp_path / f"size{size}")[1]["weights_sha256"])
    assert len(digests) == 1
