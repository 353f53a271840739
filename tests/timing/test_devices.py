"""The population of devices, by each source."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cluster_fl.errors import UserError
from cluster_fl.timing import devices, sources, tables
from cluster_fl.timing.devices import Devices
from cluster_fl.timing.schema import DevicesConfig

KEYS = ["gflops", "down_mbps", "up_mbps", "memory_mb", "memory_gbps"]
FIELDS = ("flops", "down", "up", "latency", "memory", "memory_bandwidth")


def make(source: str, clients: int = 5, seed: int = 0, **given: Any) -> Devices:
    return devices.make(DevicesConfig(source=source, **given), seed, clients, None, 0)


def by_level(config: DevicesConfig, levels: list[int], count: int) -> Devices:
    return devices.make(config, 0, len(levels), np.array(levels), count)


def refusal(key: str, value: object, call: Callable[[], Devices]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert (caught.value.key, caught.value.value) == (f"time.devices.{key}", value)
    line = str(caught.value)
    assert "\n" not in line
    return line


class TestLevels:
    def test_defaults_are_the_two_phones_of_flash_and_geometric_between(self) -> None:
        found = by_level(DevicesConfig(), [1, 2, 3, 4, 1], 4)
        assert found.flops[[0, 3, 4]].tolist() == [0.63 * 1e9, 5.77 * 1e9, 0.63 * 1e9]
        ratios = found.flops[1:4] / found.flops[:3]
        assert ratios == pytest.approx([(5.77 / 0.63) ** (1 / 3)] * 3)
        assert found.down.tolist() == [26.1 * 1e6] * 5
        assert found.up.tolist() == [6.1 * 1e6] * 5
        assert found.latency.tolist() == [0.05] * 5
        assert np.isinf(found.memory).all()
        assert np.isinf(found.memory_bandwidth).all()

    def test_a_single_level_is_the_fast_phone(self) -> None:
        assert by_level(DevicesConfig(), [1, 1], 1).flops.tolist() == [5.77 * 1e9] * 2

    def test_given_profiles_go_to_their_levels(self) -> None:
        config = DevicesConfig(
            gflops=[1, 2],
            down_mbps=[3, 4],
            up_mbps=[5, 6],
            memory_mb=[7, 8],
            memory_gbps=[9, 10],
            latency_s=0.25,
        )
        found = by_level(config, [2, 1], 2)
        assert found.flops.tolist() == [2e9, 1e9]
        assert found.down.tolist() == [4e6, 3e6]
        assert found.up.tolist() == [6e6, 5e6]
        assert found.memory.tolist() == [8e6, 7e6]
        assert found.memory_bandwidth.tolist() == [10e9, 9e9]
        assert found.latency.tolist() == [0.25, 0.25]

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [-1.0, 2.0], [], [1.0, math.nan]])
    def test_a_profile_is_one_positive_number_a_level(self, key: str, values: list[float]) -> None:
        config = DevicesConfig(**{key: values})
        assert "must be 2 positive numbers, one a level, smallest level first." in refusal(
            key, values, lambda: by_level(config, [1, 2], 2)
        )

    def test_a_level_without_clients_has_its_profile_all_the_same(self) -> None:
        found = by_level(DevicesConfig(gflops=[1, 2, 4]), [2, 1, 1], 3)
        assert found.flops.tolist() == [2e9, 1e9, 1e9]
        default = by_level(DevicesConfig(), [2, 1], 3)
        assert default.flops / 1e9 == pytest.approx([(0.63 * 5.77) ** 0.5, 0.63])

    def test_somebody_must_say_the_levels(self) -> None:
        with pytest.raises(ValueError, match="each client's level"):
            make("levels")


class TestValues:
    def test_nothing_given_is_the_middle_phone_for_all(self) -> None:
        found = make("values", 2)
        assert [getattr(found, name).tolist() for name in FIELDS] == [
            [1.76 * 1e9] * 2,
            [26.1 * 1e6] * 2,
            [6.1 * 1e6] * 2,
            [0.05] * 2,
            [math.inf] * 2,
            [math.inf] * 2,
        ]

    def test_one_for_all_or_one_a_client(self) -> None:
        found = make("values", 3, gflops=[1, 2, 3], down_mbps=[8], memory_mb=[512])
        assert found.flops.tolist() == [1e9, 2e9, 3e9]
        assert found.down.tolist() == [8e6] * 3
        assert found.memory.tolist() == [512e6] * 3

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize("values", [[], [1.0, 2.0], [0.0], [-1.0], [math.nan], [1.0, 2.0, 0.0]])
    def test_other_lengths_and_values(self, key: str, values: list[float]) -> None:
        line = refusal(key, values, lambda: make("values", 3, **{key: values}))
        assert "must be one positive number for all clients, or 3, one a client." in line

    def test_a_long_list_is_not_repeated(self) -> None:
        line = refusal("gflops", "400 values, the least -1", lambda: make("values", 500, gflops=[-1.0] * 400))
        assert len(line) < 150


class TestDistributions:
    def test_lognormal(self) -> None:
        """The median is the first number; a share of 84.1 % lies below the median times e^sigma."""
        found = make("lognormal", 100_000, gflops=[2.0, 0.6], up_mbps=[6.1, 0.0], memory_mb=[900, 0.2])
        assert np.median(found.flops) == pytest.approx(2e9, rel=0.01)
        assert np.mean(found.flops < 2e9 * math.exp(0.6)) == pytest.approx(0.8413, abs=0.003)
        assert np.std(np.log(found.memory)) == pytest.approx(0.2, rel=0.01)
        assert found.up.tolist() == [6.1 * 1e6] * 100_000
        assert found.down.tolist() == [26.1 * 1e6] * 100_000

    def test_uniform(self) -> None:
        found = make("uniform", 100_000, down_mbps=[10, 30])
        assert found.down.min() >= 10e6
        assert found.down.max() <= 30e6
        assert np.quantile(found.down, [0.25, 0.5, 0.75]) == pytest.approx([15e6, 20e6, 25e6], rel=0.01)

    def test_columns_are_independent(self) -> None:
        found = make("uniform", 20_000, **{key: [1, 2] for key in KEYS})
        columns = [found.flops, found.down, found.up, found.memory, found.memory_bandwidth]
        correlation = spearmanr(np.stack(columns, axis=1)).statistic
        assert np.abs(correlation - np.eye(5)).max() < 0.03

    @pytest.mark.parametrize(
        ("source", "pair"),
        [
            *(("lognormal", pair) for pair in ([1.0], [1.0, 2.0, 3.0], [0.0, 1.0], [1.0, -0.1], [1.0, 11.0])),
            *(("lognormal", pair) for pair in ([math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0])),
            *(
                ("uniform", pair)
                for pair in ([1.0], [0.0, 1.0], [2.0, 1.0], [1.0, math.inf], [1.0, math.nan])
            ),
        ],
    )
    @pytest.mark.parametrize("key", KEYS)
    def test_parameters(self, source: str, pair: list[float], key: str) -> None:
        line = refusal(key, pair, lambda: make(source, **{key: pair}))
        assert ("must be [median, sigma]" if source == "lognormal" else "must be [low, high]") in line

    @pytest.mark.parametrize("source", ["lognormal", "uniform"])
    def test_something_must_be_drawn(self, source: str) -> None:
        assert "give time.devices.gflops" in refusal("source", source, lambda: make(source))

    def test_the_most_extreme_lognormal_is_a_number(self) -> None:
        """No draw is beyond 8.3 standard deviations."""
        assert (
            0
            < 1e-3 * math.exp(-8.3 * sources.MOST_SIGMA)
            < 1e12 * math.exp(8.3 * sources.MOST_SIGMA)
            < math.inf
        )


class TestPhones:
    clients = 200_000

    @pytest.fixture(scope="class")
    def found(self) -> Devices:
        return make("phones", self.clients)

    def test_speed_is_that_of_the_measured_phones_around_the_middle_one_of_flash(
        self, found: Devices
    ) -> None:
        """Percentiles of the latency are 60, 96, 172, 309 and 559 ms at 5, 25, 50, 75 and 95 %."""
        expected = 1.76e9 * 172 / np.array([559, 309, 172, 96, 60])
        assert np.percentile(found.flops, [5, 25, 50, 75, 95]) == pytest.approx(expected, rel=0.02)
        assert found.flops.max() / found.flops.min() < 120

    def test_download_is_an_equal_mix_of_five_kinds_of_access(self, found: Devices) -> None:
        """Percentiles 5, 25, 50, 75 and 95 of the 50,000 tests."""
        expected = np.array([3.4, 36.3, 108.7, 332.8, 638.7]) * 1e6
        assert np.percentile(found.down, [5, 25, 50, 75, 95]) == pytest.approx(expected, rel=0.03)

    def test_upload_is_a_share_of_the_download(self, found: Devices) -> None:
        share = found.up / found.down
        assert share.min() >= 0.1 - 1e-9
        assert share.max() <= 1.48 + 1e-9
        assert np.median(share) == pytest.approx(0.71, abs=0.01)
        assert abs(spearmanr(share, found.down).statistic) < 0.02

    def test_fast_phones_have_faster_networks_as_in_the_tests(self, found: Devices) -> None:
        assert spearmanr(found.flops, found.down).statistic == pytest.approx(0.265, abs=0.01)

    def test_what_the_tables_do_not_say_can_be_given(self) -> None:
        found = make("phones", 2, memory_mb=[512], memory_gbps=[4, 8], latency_s=0.3, utilisation=0.5)
        assert found.memory.tolist() == [512e6] * 2
        assert found.memory_bandwidth.tolist() == [4e9, 8e9]
        assert found.latency.tolist() == [0.3] * 2
        assert (found.flops == make("phones", 2).flops * 0.5).all()

    @pytest.mark.parametrize("key", KEYS[:3])
    def test_what_the_tables_say_cannot(self, key: str) -> None:
        line = refusal(key, [1.0], lambda: make("phones", **{key: [1.0]}))
        assert "must be left out: the phones decide it." in line

    def test_every_speed_is_possible_and_no_other(self, found: Devices) -> None:
        latency = tables.phones().latency
        slowest, fastest = 1.76e9 * np.median(latency) / latency[[-1, 0]]
        assert found.flops.min() == pytest.approx(slowest, rel=0.1)
        assert found.flops.max() == pytest.approx(fastest, rel=1e-12)


def fedscale_file(folder: Path, entries: int = 3) -> str:
    path = folder / "capacity"
    content = {k: {"computation": 10.0 * 2**k, "communication": 1000.0 * (k + 1)} for k in range(entries)}
    path.write_bytes(pickle.dumps(content))
    return str(path)


class TestFedScale:
    def test_entries_are_drawn_whole(self, tmp_path: Path) -> None:
        """10, 20 and 40 ms: the median one is the middle phone. 1, 2 and 3 Mbit/s, in both directions."""
        found = make("fedscale", 3000, file=fedscale_file(tmp_path))
        pairs, counts = np.unique(np.stack([found.flops, found.down]), axis=1, return_counts=True)
        assert pairs[0] == pytest.approx([0.88e9, 1.76e9, 3.52e9])
        assert pairs[1].tolist() == [3e6, 2e6, 1e6]
        assert counts == pytest.approx([1000] * 3, abs=100)
        assert (found.up == found.down).all()

    @pytest.mark.parametrize("key", KEYS[:3])
    def test_the_file_decides(self, tmp_path: Path, key: str) -> None:
        file = fedscale_file(tmp_path)
        line = refusal(key, [1.0], lambda: make("fedscale", file=file, **{key: [1.0]}))
        assert "must be left out: the file decides it." in line

    def test_memory_can_be_given(self, tmp_path: Path) -> None:
        assert make("fedscale", 2, file=fedscale_file(tmp_path), memory_mb=[5]).memory.tolist() == [5e6] * 2


def csv_file(folder: Path, rows: int, header: str = "gflops,down_mbps,up_mbps,memory_mb,latency_s") -> str:
    path = folder / f"{rows}.csv"
    columns = header.count(",") + 1
    lines = [",".join(str(10**c * (row + 1)) for c in range(columns)) for row in range(rows)]
    path.write_text("\n".join([header, *lines]))
    return str(path)


class TestCsv:
    def test_row_i_is_client_i(self, tmp_path: Path) -> None:
        found = make("csv", 3, file=csv_file(tmp_path, 3), utilisation=0.5)
        assert found.flops.tolist() == [0.5e9, 1e9, 1.5e9]
        assert found.down.tolist() == [10e6, 20e6, 30e6]
        assert found.up.tolist() == [100e6, 200e6, 300e6]
        assert found.memory.tolist() == [1000e6, 2000e6, 3000e6]
        assert found.latency.tolist() == [10_000, 20_000, 30_000]
        assert np.isinf(found.memory_bandwidth).all()

    def test_otherwise_rows_are_drawn_whole(self, tmp_path: Path) -> None:
        found = make("csv", 3000, file=csv_file(tmp_path, 3))
        row = found.flops / 1e9
        assert np.bincount(row.astype(int), minlength=4)[1:] == pytest.approx([1000] * 3, abs=100)
        assert (found.down == row * 10e6).all()
        assert (found.latency == row * 10_000).all()

    def test_what_the_file_does_not_say_can_be_given(self, tmp_path: Path) -> None:
        file = csv_file(tmp_path, 2, "gflops,down_mbps,up_mbps")
        found = make("csv", 2, file=file, memory_mb=[7, 8], latency_s=0.5)
        assert found.memory.tolist() == [7e6, 8e6]
        assert found.latency.tolist() == [0.5, 0.5]

    @pytest.mark.parametrize("key", ["gflops", "down_mbps", "up_mbps", "memory_mb"])
    def test_what_it_says_cannot(self, tmp_path: Path, key: str) -> None:
        file = csv_file(tmp_path, 2)
        line = refusal(key, [1.0], lambda: make("csv", 2, file=file, **{key: [1.0]}))
        assert "must be left out: the file decides it." in line

    def test_latency_is_said_once(self, tmp_path: Path) -> None:
        file = csv_file(tmp_path, 2)
        line = refusal("latency_s", 0.5, lambda: make("csv", 2, file=file, latency_s=0.5))
        assert "must be left out: the file decides it." in line

    @pytest.mark.parametrize("source", ["csv", "fedscale"])
    def test_a_file_is_named(self, source: str) -> None:
        assert f"must name the file, since time.devices.source is {source}." in refusal(
            "file", None, lambda: make(source)
        )


GIVEN: dict[str, dict[str, Any]] = {
    "levels": {},
    "values": {"gflops": [3.0]},
    "lognormal": {key: [5.0, 0.5] for key in KEYS},
    "uniform": {key: [1.0, 9.0] for key in KEYS},
    "phones": {},
    "fedscale": {},
    "csv": {},
}


@pytest.mark.parametrize("source", GIVEN)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), few=st.integers(1, 40), more=st.integers(1, 40))
def test_a_device_depends_on_the_seed_and_its_client_alone(
    tmp_path: Path, source: str, seed: int, few: int, more: int
) -> None:
    files = {"fedscale": fedscale_file(tmp_path), "csv": csv_file(tmp_path, 1000)}
    config = DevicesConfig(source=source, file=files.get(source), **GIVEN[source])
    level_of = np.arange(few + more) % 3 + 1
    small, large = (devices.make(config, seed, n, level_of[:n], 3) for n in (few, few + more))
    for name in FIELDS:
        a, b = getattr(small, name), getattr(large, name)
        assert a.dtype == b.dtype == np.float64
        assert (a.shape, b.shape) == ((few,), (few + more,))
        assert np.array_equal(a, b[:few])
        assert (a > 0).all()


@pytest.mark.parametrize("source", ["lognormal", "uniform", "phones", "fedscale", "csv"])
def test_another_seed_makes_other_devices(tmp_path: Path, source: str) -> None:
    files = {"fedscale": fedscale_file(tmp_path), "csv": csv_file(tmp_path, 1000)}
    given = GIVEN[source] | ({"file": files[source]} if source in files else {})
    assert (make(source, 50, 0, **given).flops != make(source, 50, 1, **given).flops).any()


def test_a_million_equal_devices_take_no_memory() -> None:
    found = make("values", 10**6, gflops=[2])
    assert all(getattr(found, name).strides == (0,) for name in FIELDS)
    assert by_level(DevicesConfig(), [1, 2], 2).up.strides == (0,)


@pytest.mark.parametrize("source", ["values", "uniform", "csv"])
def test_devices_are_read_only(tmp_path: Path, source: str) -> None:
    given = GIVEN[source] | ({"file": csv_file(tmp_path, 5)} if source == "csv" else {})
    found = make(source, **given)
    for name in FIELDS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(found, name)[0] = 1.0


@pytest.mark.parametrize("source", ["values", "lognormal", "uniform"])
def test_utilisation_scales_the_speed_alone(source: str) -> None:
    whole, part = make(source, **GIVEN[source]), make(source, utilisation=0.25, **GIVEN[source])
    assert (part.flops == whole.flops * 0.25).all()
    assert all((getattr(part, name) == getattr(whole, name)).all() for name in FIELDS[1:])
