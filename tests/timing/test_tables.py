"""The shipped tables against the percentiles that were published with their sources, and against the sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cluster_fl.timing import tables
from ops import make_tables
from tests.conftest import REPOSITORY

PERCENTILES = np.array([1, 5, 10, 25, 50, 75, 90, 95, 99]) / 100


def test_latency_of_978_phones() -> None:
    found = tables.quantile(tables.phones().latency, PERCENTILES)
    assert found == pytest.approx([49, 60, 69, 96, 172, 309, 476, 559, 1650], rel=0.01)


@pytest.mark.parametrize(
    ("row", "mean", "percentiles"),
    [
        (0, 52.6, [0.2, 1.1, 2.4, 8.9, 26.1, 57.6, 110, 241, 448]),
        (1, 305.7, [1.0, 10.4, 42, 151, 313, 414, 564, 621, 874]),
        (2, 55.3, [0.2, 2.0, 5.3, 17.8, 43, 74.7, 106, 127, 356]),
        (3, 227.3, [3.1, 24.8, 52, 103, 178, 337, 452, 553, 700]),
        (4, 371.9, [3.4, 32, 66, 116, 333, 543, 769, 909, 1094]),
    ],
    ids=["4G", "5G", "wifi4", "wifi5", "wifi6"],
)
def test_download_rates_by_access(row: int, mean: float, percentiles: list[float]) -> None:
    rates = tables.phones().down[row]
    assert tables.quantile(rates, PERCENTILES) == pytest.approx(percentiles, rel=0.01, abs=0.06)
    assert rates.mean() == pytest.approx(mean, rel=0.005)


def test_uplink_of_19_users() -> None:
    """FLASH's median user sends 0.71 times as fast as it receives; the extremes are 665 / 6,708 and 5,141 / 3,473."""
    shares = tables.phones().up_share
    assert len(shares) == 19
    assert np.median(shares) == 0.71
    assert (shares[0], shares[-1]) == (0.10, 1.48)


def test_marginals_rise_and_are_positive() -> None:
    phones = tables.phones()
    for values in (phones.latency, *phones.down, phones.up_share):
        assert (np.diff(values) >= 0).all()
        assert values[0] > 0


def test_joint_ranks_are_a_permutation_with_the_measured_correlation() -> None:
    joint = tables.phones().joint
    assert np.array_equal(np.sort(joint), np.arange(1148))
    assert spearmanr(np.arange(1148), joint).statistic == pytest.approx(0.265, abs=0.0005)


def test_quantiles_by_hand() -> None:
    """Of four values, the quantiles at 1/8, 3/8, 5/8 and 7/8 are the values; between them it is linear."""
    ranks = np.array([1e-9, 1 / 8, 1 / 4, 3 / 8, 5 / 8, 3 / 4, 7 / 8, 1 - 1e-9])
    found = tables.quantile(np.array([1.0, 3.0, 4.0, 8.0]), ranks)
    assert found.tolist() == [1, 1, 2, 3, 4, 6, 8, 8]


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
def test_the_quantile_function_keeps_the_values(values: list[float]) -> None:
    """Evaluated at as many even ranks as there are values, it gives them back: the marginal is the table's."""
    ordered = np.sort(values)
    ranks = (np.arange(len(ordered)) + 0.5) / len(ordered)
    assert tables.quantile(ordered, ranks) == pytest.approx(ordered, rel=1e-9)


def test_availability_as_published() -> None:
    """710 users, 14,139 intervals; percentiles 5/25/50/75/95 of what they come to."""
    offsets, starts, ends, begin, end = tables.availability()
    assert offsets.dtype == np.int64
    assert all(array.dtype == np.float64 for array in (starts, ends, begin, end))
    assert (len(offsets), len(begin), len(end)) == (711, 710, 710)
    assert (offsets[0], offsets[-1], len(starts), len(ends)) == (0, 14_139, 14_139, 14_139)
    at = [5, 25, 50, 75, 95]
    assert np.percentile(np.diff(offsets), at) == pytest.approx([1, 5, 12, 27, 60], rel=0.002)
    assert np.percentile(ends - starts, at) == pytest.approx([0, 10, 138, 1066, 10_055], rel=0.001)
    ready = np.add.reduceat(ends - starts, offsets[:-1]) / (end - begin)
    assert np.percentile(ready, at) == pytest.approx([0.0002, 0.013, 0.055, 0.13, 0.32], rel=0.05, abs=2e-5)


def test_intervals_lie_in_their_trace_in_order() -> None:
    offsets, starts, ends, begin, end = tables.availability()
    owner = np.repeat(np.arange(len(begin)), np.diff(offsets))
    assert (starts <= ends).all()
    assert (starts >= begin[owner]).all()
    assert (ends <= end[owner]).all()
    same = owner[1:] == owner[:-1]
    assert (starts[1:][same] >= ends[:-1][same]).all()


def test_a_user_without_an_interval_has_an_empty_slice() -> None:
    row = {"ready_start_s": "", "ready_end_s": "", "trace_start_s": "5", "trace_end_s": "9"}
    made = make_tables.availability([{"user": "0", **row}])
    assert made["intervals"].tolist() == [0]
    assert made["steps"].tolist() == []


@pytest.fixture(scope="module")
def published() -> Path:
    folder = REPOSITORY.parent / "shared" / "data" / "device_traces"
    if not folder.is_dir():
        pytest.skip("needs the published tables beside the checkout (shared/data/device_traces)")
    return folder


def test_the_script_makes_the_shipped_tables(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_tables, "TARGET", tmp_path)
    make_tables.main(published)
    shipped = Path(tables.__file__).parent
    for name in ("phones.npz", "availability.npz"):
        with np.load(shipped / name) as ours, np.load(tmp_path / name) as made:
            assert sorted(ours) == sorted(made)
            for key in ours:
                assert ours[key].dtype == made[key].dtype
                assert np.array_equal(ours[key], made[key]), key


def test_the_availability_is_the_published_one_to_the_second(published: Path) -> None:
    rows = make_tables.read(published, "availability_flash_1000")
    offsets, starts, ends, begin, end = tables.availability()
    owner = np.repeat(np.arange(len(begin)), np.diff(offsets))
    assert owner.tolist() == [int(row["user"]) for row in rows]
    for ours, key in (
        (starts, "ready_start_s"),
        (ends, "ready_end_s"),
        (begin[owner], "trace_start_s"),
        (end[owner], "trace_end_s"),
    ):
        assert ours.tolist() == [float(row[key]) for row in rows]


def test_phones_are_matched_by_name_or_by_the_name_of_their_code() -> None:
    latency = [
        {"phone_model": "Xiaomi Mi 9", "resnet_ms": "100"},
        {"phone_model": "xiaomi MI-9", "resnet_ms": "110"},
        {"phone_model": "Realme 5 Pro", "resnet_ms": "200"},
        {"phone_model": "Honor X9", "resnet_ms": "300"},
    ]
    tests = [
        {"brand": "Xiaomi", "model": "MI 9", "bandwidth_mbps": "50"},
        {"brand": "realme", "model": "RMX1971", "bandwidth_mbps": "60"},
        {"brand": "vivo", "model": "vivo X9", "bandwidth_mbps": "70"},  # another maker's X9
        {"brand": "vivo", "model": "V2046A", "bandwidth_mbps": "80"},
    ]
    found = list(make_tables.matches(latency, tests, {"rmx1971": "Realme 5 Pro", "v2046a": ""}))
    assert found == [(105.0, 50.0), (200.0, 60.0)]


def test_joint_ranks_by_hand() -> None:
    """The slowest phone had the fastest network, the fastest phone the second fastest."""
    found = make_tables.joint(np.array([300.0, 50.0, 100.0]), np.array([9.0, 8.0, 1.0]))
    assert found.tolist() == [2, 0, 1]
