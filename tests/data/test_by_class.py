"""Clients of s classes: a case worked out by hand, and what must hold for any input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from cluster_fl.data.by_class import by_class
from cluster_fl.data.partition import iid
from cluster_fl.errors import UserError


def held(labels: np.ndarray, part: np.ndarray) -> dict[int, int]:
    """Samples of each class in ``part``."""
    kinds, counts = np.unique(labels[part], return_counts=True)
    return dict(zip(kinds.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_by_hand(seed):
    """Twelve samples, so four a client; the classes 0, 1 and 2 have six, four and two of them.

    Client 0 wants four of one class: of 0, which has the most. That leaves 2, 4 and 2, and the others want two
    of two classes each: both of 1, one of 0, one of 2. Nothing is left.
    """
    labels = np.array([0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1])
    parts = by_class(labels, 3, [1, 2, 2], np.random.default_rng(seed))
    assert held(labels, parts[0]) == {0: 4}
    others = [held(labels, part) for part in parts[1:]]
    assert sorted(others, key=str) == [{0: 2, 1: 2}, {1: 2, 2: 2}]
    assert sorted(np.concatenate(parts)) == list(range(12))


def test_who_gets_what_is_random():
    labels = np.arange(200) % 10
    pairs = [
        tuple(held(labels, part))
        for s in range(3)
        for part in by_class(labels, 20, [2], np.random.default_rng(s))
    ]
    assert len(set(pairs[:20])) > 12  # of 45; each class is in four of the pairs
    assert pairs[:20] != pairs[20:40] != pairs[40:]


@given(
    kinds=st.integers(1, 8),
    each=st.integers(40, 90),
    clients=st.integers(1, 24),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_any_mix(kinds, each, clients, seed, data):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.arange(kinds * each) % kinds, rng.integers(0, kinds, 30)]))
    one = st.integers(0, kinds)
    counts = data.draw(st.one_of(st.lists(one, min_size=clients, max_size=clients), one.map(lambda s: [s])))
    try:
        parts = by_class(labels, clients, counts, np.random.default_rng(seed))
    except UserError:
        reject()  # so many IID clients that a class is gone
    size, counts = len(labels) / clients, counts * clients if len(counts) == 1 else counts
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)
    assert all(part.dtype == np.int64 for part in parts)
    # What a class has left over, it has because all who asked for it got all they wanted.
    unused = np.bincount(np.delete(labels, rows), minlength=kinds)
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            assert abs(len(part) - size) <= 1
            continue
        pieces = held(labels, part)
        assert len(pieces) == count
        for kind, samples in pieces.items():
            assert samples < size / count + 1
            assert samples > size / count - 1 or not unused[kind]


@given(
    kinds=st.integers(1, 10), per=st.integers(1, 10), clients=st.integers(1, 40), seed=st.integers(0, 2**32)
)
@settings(max_examples=80, deadline=None)
def test_equal_classes_are_asked_for_equally_often(kinds, per, clients, seed):
    per = min(per, kinds)
    each = 60 * clients
    labels = np.random.default_rng(seed).permutation(np.arange(kinds * each) % kinds)
    parts = by_class(labels, clients, [per], np.random.default_rng(seed))
    mixes = [held(labels, part) for part in parts]
    asked = np.array([sum(kind in mix for mix in mixes) for kind in range(kinds)])
    assert asked.max() - asked.min() <= 1
    assert {len(mix) for mix in mixes} == {per}
    if clients * per % kinds == 0:
        assert sum(map(len, parts)) == len(labels)
        size = len(labels) / clients / per
        assert all(abs(samples - size) <= 1 for mix in mixes for samples in mix.values())


def test_iid_clients_next_to_sorted_ones():
    labels = np.random.default_rng(0).permutation(np.arange(60_000) % 10)
    parts = by_class(labels, 100, [0] * 50 + [2] * 50, np.random.default_rng(0))
    mixes = [held(labels, part) for part in parts]
    assert {len(part) for part in parts[:50]} == {600}
    assert all(len(mix) == 10 and max(mix.values()) < 100 for mix in mixes[:50])
    assert all(len(mix) == 2 and min(mix.values()) > 280 for mix in mixes[50:])
    assert max(len(part) for part in parts) <= 602
    assert len(np.unique(np.concatenate(parts))) > 0.99 * len(labels)


def test_classes_of_other_sizes_are_asked_for_as_often_as_they_can_give():
    labels = np.repeat(np.arange(6), [1722, 1544, 1406, 1777, 1906, 1944])  # UCI HAR's
    parts = by_class(labels, 30, [2], np.random.default_rng(0))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= len(labels) / 30 + 2
    assert min(sizes) >= 0.93 * len(labels) / 30
    assert sum(sizes) >= 0.98 * len(labels)


def test_a_lone_sorted_client_gets_what_the_iid_ones_leave():
    labels = np.arange(1000) % 10
    parts = by_class(labels, 10, [1] + [0] * 9, np.random.default_rng(0))
    assert {len(part) for part in parts[1:]} == {100}
    (samples,) = held(labels, parts[0]).values()
    assert samples == max(np.bincount(np.delete(labels, np.concatenate(parts[1:]))))


def test_iid_alone_is_iid():
    labels = np.arange(101) % 7
    ours = by_class(labels, 9, [0], np.random.default_rng(4))
    theirs = iid(labels, 9, np.random.default_rng(4))
    assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]


def test_all_classes_and_labels_with_gaps():
    labels = np.repeat([2, 5, 9], 20)
    parts = by_class(labels, 4, [3], np.random.default_rng(0))
    assert [held(labels, part) for part in parts] == [{2: 5, 5: 5, 9: 5}] * 4


@pytest.mark.parametrize(
    ("clients", "classes", "line"),
    [
        (4, [1, 2], "data.partition.classes=2 values: must be one value, or one per client (4)."),
        (4, [], "data.partition.classes=0 values: must be one value, or one per client (4)."),
        (2, [1, 4], "data.partition.classes=4: must be at most 3, the number of classes."),
        (20, [3], "data.partition.classes=3: too many: class 0 has no sample left for one of 20 clients."),
    ],
)
def test_wrong_classes(clients, classes, line):
    with pytest.raises(UserError) as caught:
        by_class(np.arange(30) % 3, clients, classes, np.random.default_rng(0))
    assert str(caught.value) == line
