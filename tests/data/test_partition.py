"""Partitions: the published procedure's exact numbers, and what must hold for any input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl.config import DataConfig, PartitionConfig
from cluster_fl.data.datasets import Dataset
from cluster_fl.data.dirichlet import dirichlet
from cluster_fl.data.partition import Shares, iid, natural, partition, separate, shards
from cluster_fl.errors import UserError

RELEASED, PAPER = (50_000, 50_000, 10_000), (45_000, 5_000, 10_000)
RELEASED_FIRST, PAPER_FIRST = [34100, 38730, 36980, 9420, 16850], [6060, 9870, 23490, 36220, 44690]

# ScaleFL's released procedure on labels i mod 10 over the pool, RandomState(1). Per case: sizes of the parts,
# alpha, clients; then the first ten clients' training, held-out and test sizes, client 0's training classes,
# and sha1 over the JSON of all clients' sorted training rows.
ORACLE = [
    (
        RELEASED,
        100,
        100,
        [476, 521, 471, 507, 493, 500, 542, 504, 520, 528],
        [521, 503, 491, 507, 493, 463, 485, 531, 508, 462],
        [101, 84, 74, 86, 109, 97, 110, 105, 102, 106],
        [46, 42, 45, 39, 62, 45, 40, 55, 53, 49],
        "51f6a8262df25d7970e2c28ff4e7c35614939b19",
    ),
    (
        RELEASED,
        100,
        50,
        [991, 1025, 961, 1005, 1015, 988, 1053, 1001, 1020, 1002],
        [1021, 1025, 910, 995, 970, 939, 1025, 1078, 1021, 978],
        [187, 166, 202, 202, 203, 191, 199, 201, 219, 207],
        [93, 95, 100, 92, 113, 94, 90, 106, 105, 103],
        "48e177876e27fd18a08284abd353d626fe8a2807",
    ),
    (
        RELEASED,
        1,
        100,
        [496, 529, 523, 511, 520, 330, 339, 606, 545, 663],
        [493, 567, 529, 516, 511, 305, 358, 561, 493, 631],
        [94, 86, 109, 83, 107, 53, 74, 127, 94, 147],
        [30, 17, 69, 4, 45, 31, 33, 74, 137, 56],
        "53ab85646469cce8ed1cde22074385750b2c3efa",
    ),
    (
        RELEASED,
        1,
        50,
        [964, 1109, 1063, 1022, 1058, 644, 688, 1156, 1054, 1303],
        [1024, 1033, 1048, 1027, 1029, 587, 707, 1192, 1005, 1310],
        [184, 200, 203, 194, 197, 133, 148, 246, 205, 267],
        [57, 33, 138, 6, 92, 57, 76, 134, 260, 111],
        "b193343cba016e48b4ac99d478728f296905a343",
    ),
    (
        PAPER,
        100,
        100,
        [463, 438, 436, 448, 467, 489, 428, 416, 475, 434],
        [55, 40, 39, 60, 53, 52, 52, 52, 60, 49],
        [107, 99, 98, 89, 79, 111, 103, 92, 96, 120],
        [46, 45, 44, 61, 40, 45, 46, 43, 49, 44],
        "ea5d7bb4745189dbe0b2780b827ac29cb1da941d",
    ),
    (
        PAPER,
        100,
        50,
        [938, 880, 874, 882, 894, 983, 883, 850, 964, 897],
        [99, 99, 93, 113, 102, 104, 105, 89, 90, 108],
        [221, 172, 182, 192, 208, 218, 174, 180, 210, 196],
        [95, 96, 88, 112, 84, 99, 99, 86, 87, 92],
        "bdaab5f8cecdecc7871fd7f99a627925f4dbfbf7",
    ),
    (
        PAPER,
        1,
        100,
        [313, 324, 458, 545, 470, 512, 456, 506, 411, 499],
        [39, 30, 51, 51, 64, 55, 52, 69, 40, 61],
        [62, 83, 108, 118, 91, 103, 95, 107, 111, 116],
        [40, 43, 6, 58, 30, 1, 9, 1, 32, 93],
        "a205c8c8dd026115f7e340bce109ae85a3662b6d",
    ),
    (
        PAPER,
        1,
        50,
        [622, 659, 932, 1055, 939, 1006, 916, 1048, 864, 1004],
        [71, 67, 100, 130, 99, 99, 106, 112, 106, 112],
        [136, 141, 188, 228, 213, 224, 198, 223, 174, 228],
        [81, 90, 11, 106, 64, 3, 15, 3, 58, 191],
        "63f8b3f468c0c883fc0e4c736f6e3c80f71ab28e",
    ),
]


def labelled(labels: np.ndarray, train_count: int) -> Dataset:
    inputs = np.zeros((len(labels), 2, 2, 1), dtype=np.uint8)
    return Dataset("toy", inputs, labels, train_count, int(labels.max()) + 1, 255.0, (0.0,), (1.0,), 0, False)


def spread(name: str, **options: object) -> DataConfig:
    own = {key: options.pop(key) for key in ("held_out", "public", "public_name") if key in options}
    return DataConfig(**own, partition=PartitionConfig(name=name, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ORACLE, ids=lambda c: f"{c[0][0]}-alpha{c[1]}-clients{c[2]}")
def test_dirichlet_is_the_published_procedure(case):
    sizes, alpha, clients, train, held_out, test, classes, digest = case
    labels = np.arange(sum(sizes)) % 10
    shares = separate(dirichlet(labels, clients, alpha, np.random.RandomState(1)), sizes[:2])
    assert [len(part) for part in shares.train[:10]] == train
    assert [len(part) for part in shares.held_out[:10]] == held_out
    assert [len(part) for part in shares.test[:10]] == test
    assert np.bincount(labels[shares.train[0]], minlength=10).tolist() == classes
    assert shares.train[0][:5].tolist() == (RELEASED_FIRST if sizes is RELEASED else PAPER_FIRST)
    text = json.dumps([np.sort(part).tolist() for part in shares.train])
    assert hashlib.sha1(text.encode()).hexdigest() == digest
    assert sorted(np.concatenate(shares.train)) == list(range(sizes[0]))


@given(
    samples=st.integers(200, 600),
    clients=st.integers(1, 37),
    classes=st.integers(1, 12),
    name=st.sampled_from(["iid", "dirichlet", "shards"]),
    held_out=st.integers(0, 50),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_every_row_is_dealt_once_into_the_part_it_came_from(samples, clients, classes, name, held_out, seed):
    labels = np.random.default_rng(seed).integers(0, classes, samples)
    labels[labels == classes // 2] = 0  # a class without samples, when there are two or more
    train_count = samples * 3 // 4
    dataset = labelled(labels, train_count)
    shares = partition(dataset, spread(name, alpha=5.0, held_out=held_out), clients, seed)
    train, held, test = (np.concatenate(part) for part in (shares.train, shares.held_out, shares.test))
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(train_count))
    assert np.array_equal(np.sort(test), np.arange(train_count, samples))
    assert len(held) == held_out
    assert {len(shares.train), len(shares.held_out), len(shares.test)} == {clients}
    assert all(part.dtype == np.int64 for part in (*shares.train, *shares.held_out, *shares.test))


# sha256 of every part's rows, from before there were public samples: none of them may move the partition.
PINNED = {
    "iid": "2b7ca6724fcf5c997f920f701b1bd9e659310240779e0294778e617ef0fe8fdc",
    "dirichlet": "481db75b82983f2dffe12fdf9cdc3649d1dfc052bba2c7729de835c7c687ae7a",
    "shards": "51afa6eec6b763bcf816a8b027da831a5715d475abf1a22cee95caa0edb5c8f5",
}


@pytest.mark.parametrize("name", PINNED)
def test_without_public_samples_nothing_moves(name):
    dataset = labelled(np.arange(1000) % 10, 800)
    shares = partition(dataset, spread(name, held_out=100), 20, 3)
    digest = hashlib.sha256()
    for rows in (*shares.train, *shares.held_out, *shares.test):
        digest.update(rows.tobytes() + b"|")
    assert digest.hexdigest() == PINNED[name]
    assert shares.public.dtype == np.int64
    assert shares.public.tolist() == []


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "classes", "natural"])
def test_public_samples_are_nobody_elses(name):
    labels = np.arange(1000) % 10
    dataset = dataclasses.replace(labelled(labels, 800), groups=labels * 3)
    shares, without = (
        partition(dataset, spread(name, held_out=100, public=public), 10, 3) for public in (150, 0)
    )
    rows = np.concatenate([*shares.train, *shares.held_out, *shares.test, shares.public])
    assert len(np.unique(rows)) == len(rows)
    assert len(shares.public) == 150
    assert shares.public.max() < 800
    assert np.all(np.diff(shares.public) > 0)
    assert np.bincount(labels[shares.public], minlength=10).min() > 5  # at random
    if name != "classes":  # which may leave some over
        assert len(rows) == 1000
        held = [sorted(np.concatenate(of.held_out)) for of in (shares, without)]
        assert held[0] == held[1]  # an evaluation during a run does not change with what is public
    assert not np.array_equal(
        partition(dataset, spread(name, public=150), 10, 4).public, shares.public
    )  # the seed decides


def test_foreign_samples_are_public_and_the_rest_is_as_without():
    labels = np.concatenate([np.arange(500) % 10, np.full(30, -1)])
    dataset = dataclasses.replace(labelled(labels, 400), foreign_count=30)
    assert dataset.test_count == 100
    config = spread("dirichlet", held_out=40, public=30, public_name="cifar100")
    shares = partition(dataset, config, 10, 0)
    without = partition(labelled(labels[:500], 400), spread("dirichlet", held_out=40), 10, 0)
    assert shares.public.tolist() == list(range(500, 530))
    for part in ("train", "held_out", "test"):
        for own, other in zip(getattr(shares, part), getattr(without, part), strict=True):
            assert np.array_equal(own, other)


@given(
    groups=st.lists(st.integers(0, 12), min_size=30, max_size=120),
    clients=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_natural_deals_whole_groups(groups, clients, seed):
    groups = np.array([*groups, *range(6)])
    parts = natural(groups, clients, np.random.default_rng(seed))
    owners = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == len(set(groups.tolist()))
    assert sorted(np.concatenate(parts)) == list(range(len(groups)))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_natural_keeps_each_groups_training_and_test_rows():
    groups = np.array([7, 7, 7, 5, 5, 9, 9, 7, 5, 9, 9])
    dataset = dataclasses.replace(labelled(np.zeros(11, dtype=np.int64), 7), groups=groups)
    shares = partition(dataset, spread("natural"), 3, 0)
    found = {
        tuple(np.unique(groups[np.concatenate([train, test])])): (sorted(train), sorted(test))
        for train, test in zip(shares.train, shares.test, strict=True)
    }
    assert found == {(7,): ([0, 1, 2], [7]), (5,): ([3, 4], [8]), (9,): ([5, 6], [9, 10])}
    orders = [tuple(partition(dataset, spread("natural"), 3, seed).train[0]) for seed in range(20)]
    assert len(set(orders)) == 3  # which client is which group is random


@pytest.mark.parametrize(
    ("clients", "groups", "line"),
    [
        (4, [1, 1, 2, 3], "clients.count=4: must be at most 3, the groups that data.partition.name=natural deals out."),
        (2, None, "data.partition.name=natural: needs samples that come in groups, and those of toy do not."),
    ],
)  # fmt: skip
def test_natural_without_enough_groups(clients, groups, line):
    groups = None if groups is None else np.array(groups * 25)
    dataset = dataclasses.replace(labelled(np.arange(100) % 10, 80), groups=groups)
    with pytest.raises(UserError) as caught:
        partition(dataset, spread("natural"), clients, 0)
    assert str(caught.value) == line


@given(samples=st.integers(1, 400), clients=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_iid_sizes_differ_by_at_most_one(samples, clients, seed):
    sizes = [len(part) for part in iid(np.zeros(samples), clients, np.random.default_rng(seed))]
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("clients", [1, 3, 9, 10, 11, 19, 25, 95])
def test_dirichlet_gives_each_client_half_of_its_groups_mean(clients):
    labels = np.arange(6000) % 10
    for rng in (np.random.default_rng(3), np.random.RandomState(3)):
        parts = dirichlet(labels, clients, 0.5, rng)
        for first in range(0, clients, 10):
            sizes = [len(part) for part in parts[first : first + 10]]
            assert min(sizes) >= int(0.5 * sum(sizes) / len(sizes))
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(6000))


def test_a_clients_parts_share_one_class_mix():
    labels = np.arange(60_000) % 10
    shares = partition(labelled(labels, 50_000), spread("dirichlet", alpha=0.3, held_out=10_000), 10, 0)
    for parts in zip(shares.train, shares.held_out, shares.test, strict=True):
        mixes = [np.bincount(labels[part], minlength=10) / len(part) for part in parts]
        assert np.abs(mixes[0] - mixes[1]).max() < 0.06
        assert np.abs(mixes[0] - mixes[2]).max() < 0.06
    largest = [np.bincount(labels[part]).max() / len(part) for part in shares.train]
    assert np.mean(largest) > 0.3  # skewed: a tenth would be even


def test_shards_hold_few_classes_and_equal_sizes():
    labels = np.arange(1000) % 10
    parts = shards(labels, 20, 2, np.random.default_rng(0))
    assert {len(part) for part in parts} == {50}
    assert max(len(np.unique(labels[part])) for part in parts) <= 2
    assert any(np.any(np.diff(part) < 0) for part in parts)  # at random inside a class


def test_separate_keeps_the_order_of_the_parts():
    shares = separate([np.array([9, 2, 5, 0]), np.array([4, 3, 8, 1, 6, 7])], (4, 2))
    expected = Shares(
        (np.array([2, 0]), np.array([3, 1])),
        (np.array([5]), np.array([4])),
        (np.array([9]), np.array([8, 6, 7])),
    )
    for own, right in zip(vars(shares).values(), vars(expected).values(), strict=True):
        assert [part.tolist() for part in own] == [part.tolist() for part in right]


def test_the_seed_decides_and_the_partitions_own_seed_wins():
    dataset = labelled(np.arange(500) % 10, 400)

    def rows(seed: int, own: int | None = None) -> list[int]:
        shares = partition(dataset, spread("dirichlet", held_out=40, seed=own), 10, seed)
        return np.concatenate(shares.train).tolist()

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert rows(1, own=7) == rows(2, own=7) == rows(7)


@pytest.mark.parametrize("alpha", [0.001, 1e-300])
def test_an_impossible_skew_is_said_and_does_not_loop(alpha):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^data\.partition\.alpha=.*raise it or lower clients\.count\.$"):
        dirichlet(np.arange(50) % 2, 20, alpha, np.random.default_rng(0))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("config", "clients", "key"),
    [
        (spread("iid", held_out=400), 4, "data.held_out"),
        (spread("iid", held_out=390), 11, "clients.count"),
        (spread("iid", held_out=100, public=300), 4, "data.public"),
        (spread("iid", held_out=100, public=290), 11, "clients.count"),
        (spread("classes", classes=[2, 3]), 3, "data.partition.classes"),
        (spread("classes", classes=[11]), 3, "data.partition.classes"),
        (spread("dirichlet"), 401, "clients.count"),
        (spread("shards", shards_per_client=6), 100, "data.partition.shards_per_client"),
    ],
)
def test_too_few_samples_name_the_key(config, clients, key):
    with pytest.raises(UserError) as caught:
        partition(labelled(np.arange(500) % 10, 400), config, clients, 0)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
