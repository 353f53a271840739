"""A run's pulse: what is read from a record, and that Ray really exports it."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.events import RoundDone
from actors.metrics import METERS
from actors.session import Session, connected
from cluster_fl.config import ClusterConfig
from cluster_fl.records import RunFolder
from ops.grafana import dashboard, exported
from tests.conftest import REPOSITORY
from tests.processes import wait
from tests.tiny import lines, tiny

RECORD: dict[str, Any] = {
    "round": 4,
    "participants": [{"fate": "merged"}, {"fate": "merged"}, {"fate": "merged"}, {"fate": "late"}],
    "refused": [7],
    "retries": 2,
    "sim_time_s": 12.5,
    "wall": {"phases": {"train": 4.0, "evaluate": 1.0}, "pools": 2, "busy_s": 8.0, "store_bytes": 100},
}


def read(record: dict[str, Any]) -> dict[str, float]:
    return {meter.name.removeprefix("cluster_fl_"): meter.read(record) for meter in METERS}


def test_what_a_record_says() -> None:
    assert read(RECORD) == {
        "rounds": 5,
        "round_seconds": 5.0,
        "simulated_seconds": 12.5,
        "pools": 2,
        "pool_utilisation": 0.8,
        "clients_per_second": 0.5,
        "clients_trained": 2,
        "retries": 2,
        "refused": 1,
        "store_bytes": 100,
    }


def test_a_round_without_anybody_has_no_pace() -> None:
    empty = RECORD | {"participants": [], "refused": []}
    empty["wall"] = {"phases": {}, "pools": 2, "busy_s": 0.0, "store_bytes": 0}
    found = read(empty)
    assert (found["pool_utilisation"], found["clients_per_second"], found["clients_trained"]) == (0, 0, 0)


def test_the_dashboard_is_the_one_of_the_code() -> None:
    file = REPOSITORY / "ops" / "launch" / "grafana.json"
    assert json.loads(file.read_text()) == dashboard()
    shown = [panel["targets"][0]["expr"] for panel in dashboard()["panels"]]
    assert all(exported(meter) in expression for meter, expression in zip(METERS, shown, strict=True))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # How often processes tell their numbers; ten seconds otherwise.
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with connected(ClusterConfig(pools=1)):
            yield


def served() -> dict[str, float]:
    """What this node's Prometheus endpoint says of the runs, by name."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_cluster_fl_") and 'run="run"' in line:
            found[line.partition("{")[0]] = float(line.rpartition(" ")[2])
    return found


@pytest.mark.slow
def test_ray_exports_a_runs_pulse(tmp_path: Path) -> None:
    config = tiny(tmp_path, "cluster.pools=1")
    session = Session(config, RunFolder(tmp_path / "run"), resume=False)
    records = [event.record for event in session.run() if isinstance(event, RoundDone)]
    assert records == lines(tmp_path / "run")
    expected = {}
    for meter in METERS:
        values = [meter.read(record) for record in records]
        expected[exported(meter)] = sum(values) if meter.adds else values[-1]
    # A counter that nothing was added to is not exported.
    expected = {name: value for name, value in expected.items() if value or not name.endswith("_total")}
    wait(lambda: served().keys() >= expected.keys() and served()["ray_cluster_fl_rounds"] == 3)
    for name, value in served().items():
        assert math.isclose(value, expected[name], rel_tol=1e-6), name
