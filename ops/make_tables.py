"""Makes the tables that are shipped in ``cluster_fl/timing/tables`` from the published ones.

python -m ops.make_tables FOLDER
    FOLDER holds availability_flash_1000, phone_inference_latency, mobile_bandwidth_50k,
    android_model_to_ai_benchmark and flash_user_network_speed, each as .csv.gz

Nobody needs to run it: the tables are part of the package, and the README beside them says where they come from.
"""

from __future__ import annotations

import csv
import gzip
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cluster_fl.timing import tables

TARGET = Path(tables.__file__).parent
ACCESS = ("4G", "5G", "wifi4", "wifi5", "wifi6")
QUANTILES = 250

Rows = list[dict[str, str]]


def main(folder: Path) -> None:
    """Writes the tables, and prints how phones' speed and bandwidth go together."""
    latency, tests = read(folder, "phone_inference_latency"), read(folder, "mobile_bandwidth_50k")
    latency = [row for row in latency if float(row["resnet_ms"]) > 0]
    codes = {
        row["android_model"].lower(): row["ai_benchmark_model"]
        for row in read(folder, "android_model_to_ai_benchmark")
    }
    matched = np.array(list(matches(latency, tests, codes)))
    rho = spearmanr(-matched[:, 0], matched[:, 1]).statistic
    print(f"{len(matched)} tests of {len(np.unique(matched[:, 0]))} speeds, rank correlation {rho:.3f}")
    save(
        "phones",
        phones(latency, tests, read(folder, "flash_user_network_speed")) | {"joint": joint(*matched.T)},
    )
    save("availability", availability(read(folder, "availability_flash_1000")))


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(TARGET / f"{name}.npz", allow_pickle=False, **arrays)


def read(folder: Path, name: str) -> Rows:
    """The rows of a published table."""
    with gzip.open(folder / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def phones(latency: Rows, tests: Rows, users: Rows) -> dict[str, np.ndarray]:
    """The marginals: equally likely values, rising, in tenths of ms and Mbit/s and in hundredths."""
    down = [[float(test["bandwidth_mbps"]) for test in tests if test["access"] == kind] for kind in ACCESS]
    shares = [float(user["up_mean"]) / float(user["down_mean"]) for user in users]
    return {
        "latency": tenths([float(row["resnet_ms"]) for row in latency]),
        "down": np.stack([tenths(rates) for rates in down]),
        "up_share": np.round(np.sort(shares) * 100).astype(np.uint16),
    }


def tenths(values: list[float]) -> np.ndarray:
    """The quantiles at (i + 1/2) / QUANTILES, in tenths: as many equally likely values."""
    quantiles = np.quantile(values, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    return np.round(quantiles * 10).astype(np.uint16)


def matches(latency: Rows, tests: Rows, codes: dict[str, str]) -> Iterator[tuple[float, float]]:
    """(ms, Mbit/s) of every bandwidth test of a phone whose latency is known: by its name, or its code's."""
    known: dict[str, list[float]] = defaultdict(list)
    for row in latency:
        known[plain(row["phone_model"])].append(float(row["resnet_ms"]))
    for test in tests:
        names = plain(f"{test['brand']} {test['model']}"), plain(codes.get(test["model"].lower(), ""))
        name = next((name for name in names if name in known), None)
        if name is not None:
            yield float(np.median(known[name])), float(test["bandwidth_mbps"])


def plain(name: str) -> str:
    """A phone's name in lower case, its brand in front once."""
    words = re.sub(r"[^a-z0-9+]+", " ", name.lower()).split()
    return " ".join(words[words[:1] == words[1:2] :])


def joint(latency: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
    """For each rank of speed, slowest first, the rank of the bandwidth; equal ones in any order (seeded)."""
    any_order = np.random.default_rng(0).random((2, len(latency)))
    rank = np.empty(len(latency), dtype=np.uint16)
    rank[np.lexsort((any_order[1], bandwidth))] = np.arange(len(latency))
    return rank[np.lexsort((any_order[0], -latency))]


def availability(rows: Rows) -> dict[str, np.ndarray]:
    """Intervals a user, and the steps from each moment (start, end, start, ...) to the next, which compress best."""
    users = {row["user"]: row for row in rows}
    counts = dict.fromkeys(users, 0)
    intervals = [row for row in rows if row["ready_start_s"]]
    for row in intervals:
        counts[row["user"]] += 1
    moments = [int(row[key]) for row in intervals for key in ("ready_start_s", "ready_end_s")]
    return {
        "intervals": np.array(list(counts.values()), dtype=np.int32),
        "steps": np.diff(np.array(moments, dtype=np.int32), prepend=np.int32(0)),
        "trace_start": np.array([int(row["trace_start_s"]) for row in users.values()], dtype=np.int32),
        "trace_end": np.array([int(row["trace_end_s"]) for row in users.values()], dtype=np.int32),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
