"""The simulated clock against hand-calculated times of a phone that trains ScaleFL's ResNet110."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_fl.errors import UserError
from cluster_fl.timing.clock import Devices, client_seconds, synchronous
from cluster_fl.timing.schema import DevicesConfig

MACS, SAMPLES = 253_000_000, 500 * 5  # ResNet110 on 32 x 32; a client's 500 samples, five epochs


def one_device(**profile: float) -> Devices:
    """A device for which everything is instant but what ``profile`` says."""
    flops, down, up = (np.array([profile.get(name, np.inf)]) for name in ("flops", "down", "up"))
    return Devices(flops, down, up, profile.get("latency", 0.0))


def seconds(devices: Devices, macs: int = 0, payload: int = 0, samples: int = 0, busy: float = 0.0) -> float:
    """``payload`` goes both ways."""
    who, sent = np.array([0]), np.array([payload])
    (result,) = client_seconds(devices, who, np.array([macs]), sent, sent, np.array([samples]), busy)
    return float(result)


@pytest.mark.parametrize(("gflops", "expected"), [(5.77, 658), (1.76, 2156), (0.63, 6024)])
def test_compute(gflops: float, expected: int) -> None:
    """3 passes x 2 operations x 253 MMAC x 2500 samples = 3.795e12 operations."""
    found = seconds(one_device(flops=gflops * 1e9), macs=MACS, samples=SAMPLES)
    assert found == pytest.approx(3.795e12 / (gflops * 1e9), rel=1e-12)
    assert round(found) == expected


def test_transfer() -> None:
    """1.73 million float32 are 55.36 Mbit: 9.1 s up at 6.1 Mbit/s, 2.1 s down at 26.1 Mbit/s."""
    payload = 1_730_000 * 4
    assert seconds(one_device(up=6.1e6), payload=payload) == pytest.approx(55.36 / 6.1, rel=1e-12)
    assert round(seconds(one_device(up=6.1e6), payload=payload), 1) == 9.1
    assert round(seconds(one_device(down=26.1e6), payload=payload), 1) == 2.1


def test_parts_add_up() -> None:
    alone = [
        seconds(one_device(**{key: value}), MACS, 4_000_000, SAMPLES)
        for key, value in [("flops", 2e9), ("down", 2e7), ("up", 5e6), ("latency", 0.05)]
    ]
    together = seconds(one_device(flops=2e9, down=2e7, up=5e6, latency=0.05), MACS, 4_000_000, SAMPLES)
    assert together == pytest.approx(sum(alone), rel=1e-12)
    assert alone == pytest.approx([1897.5, 1.6, 6.4, 0.05], rel=1e-12)


def test_each_participant_has_its_own_device_and_work() -> None:
    devices = Devices(
        np.array([1e9, 2e9, 4e9]), np.array([1e6, 2e6, 4e6]), np.array([1e6, 1e6, 8e6]), latency=0.5
    )
    found = client_seconds(
        devices,
        np.array([2, 0]),
        macs=np.array([10**9, 10**8]),
        down=np.array([10**6, 10**5]),
        up=np.array([2 * 10**6, 10**4]),
        samples=np.array([4, 10]),
    )
    # 0.5 + 8/4 + 24/4 + 16/8 and 0.5 + 0.8/1 + 6/1 + 0.08/1
    assert found == pytest.approx([10.5, 7.38], rel=1e-12)


@pytest.mark.parametrize(("busy", "factor"), [(0.0, 1.0), (0.25, 4 / 3), (0.5, 2.0), (0.75, 4.0)])
def test_other_work_slows_computing_and_nothing_else(busy: float, factor: float) -> None:
    phone = one_device(flops=2e9, down=2e7, up=5e6, latency=0.05)
    assert seconds(one_device(flops=2e9), MACS, 0, SAMPLES, busy) == pytest.approx(1897.5 * factor, rel=1e-12)
    assert seconds(phone, 0, 4_000_000, SAMPLES, busy) == seconds(phone, 0, 4_000_000, SAMPLES)


def test_each_participant_is_as_busy_as_its_own_device() -> None:
    devices, zero = Devices(np.full(2, 6e9), np.ones(2), np.ones(2), 0.0), np.zeros(2)
    macs, samples = np.full(2, 10**9), np.full(2, 2)
    found = client_seconds(devices, np.array([1, 0]), macs, zero, zero, samples, np.array([0.5, 0.75]))
    assert found.tolist() == [4.0, 8.0]


def test_defaults_are_the_two_phones_of_flash_and_geometric_between() -> None:
    devices = Devices.by_level(DevicesConfig(), np.array([1, 2, 3, 4, 1]), 4)
    assert devices.flops[[0, 3, 4]] / 1e9 == pytest.approx([0.63, 5.77, 0.63])
    ratios = devices.flops[1:4] / devices.flops[:3]
    assert ratios == pytest.approx([(5.77 / 0.63) ** (1 / 3)] * 3)
    assert devices.down == pytest.approx([26.1e6] * 5)
    assert devices.up == pytest.approx([6.1e6] * 5)


def test_a_single_level_is_the_fast_phone() -> None:
    assert Devices.by_level(DevicesConfig(), np.array([1, 1]), 1).flops / 1e9 == pytest.approx([5.77, 5.77])


def test_given_profiles_go_to_their_levels() -> None:
    config = DevicesConfig(gflops=[1, 2], down_mbps=[3, 4], up_mbps=[5, 6], latency_s=0.25)
    devices = Devices.by_level(config, np.array([2, 1]), 2)
    assert devices.flops.tolist() == [2e9, 1e9]
    assert devices.down.tolist() == [4e6, 3e6]
    assert devices.up.tolist() == [6e6, 5e6]
    assert devices.latency == 0.25


@pytest.mark.parametrize("key", ["gflops", "down_mbps", "up_mbps"])
@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [-1.0, 2.0], []])
def test_a_profile_is_one_positive_number_a_level(key: str, values: list[float]) -> None:
    config = DevicesConfig()
    setattr(config, key, values)
    with pytest.raises(UserError, match=rf"^time\.devices\.{key}=.*must be 2 positive numbers") as caught:
        Devices.by_level(config, np.array([1, 2]), 2)
    assert (caught.value.key, caught.value.value) == (f"time.devices.{key}", values)


def test_a_profile_is_a_number() -> None:
    with pytest.raises(UserError, match=r"time\.devices\.gflops"):
        Devices.by_level(DevicesConfig(gflops=[1.0, float("nan")]), np.array([1, 2]), 2)


def test_a_level_without_clients_has_its_profile_all_the_same() -> None:
    """Nobody affords the largest of three levels: the others keep the devices of three."""
    devices = Devices.by_level(DevicesConfig(gflops=[1, 2, 4]), np.array([2, 1, 1]), 3)
    assert devices.flops.tolist() == [2e9, 1e9, 1e9]
    default = Devices.by_level(DevicesConfig(), np.array([2, 1]), 3)
    assert default.flops / 1e9 == pytest.approx([(0.63 * 5.77) ** 0.5, 0.63])


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=20))
def test_a_synchronous_round_is_as_long_as_its_slowest_client(times: list[float]) -> None:
    assert synchronous(np.array(times)) == max(times)


def test_a_round_without_participants_takes_no_time() -> None:
    assert synchronous(np.zeros(0)) == 0.0
