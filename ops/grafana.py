"""The Grafana dashboard of a run's metrics: ``python -m ops.grafana > ops/launch/grafana.json``.

One panel for each meter of :mod:`actors.metrics`, so that none is missing and none is made up; import it into
the Grafana that reads the Prometheus of the cluster.
"""

from __future__ import annotations

import json
from typing import Any

from actors.metrics import METERS, Meter

# By the end of a meter's name; Grafana's own names of units.
UNITS = {"seconds": "s", "utilisation": "percentunit", "bytes": "bytes"}
WIDTH, HEIGHT, ACROSS = 12, 7, 2


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON model. Its variables: the Prometheus to ask, and the runs to show."""
    return {
        "uid": "cluster-fl",
        "title": "cluster-fl",
        "tags": ["cluster-fl", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _runs()]},
        "panels": [_panel(number, meter) for number, meter in enumerate(METERS)],
    }


def exported(meter: Meter) -> str:
    """A meter's name as Prometheus has it."""
    return f"ray_{meter.name}{'_total' if meter.adds else ''}"


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    query = f"label_values({exported(METERS[0])}, run)"
    return {
        "name": "run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": query, "refId": "runs"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, meter: Meter) -> dict[str, Any]:
    # Of what only grows, the pace; a restarted driver begins at 0, which `rate` knows.
    shown = f'{exported(meter)}{{run=~"$run"}}'
    expression = f"rate({shown}[5m])" if meter.adds else shown
    unit = next((unit for end, unit in UNITS.items() if meter.name.endswith(end)), "short")
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": meter.about.rstrip(".") + (" (a second, over 5 minutes)" if meter.adds else ""),
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "gridPos": {
            "x": number % ACROSS * WIDTH,
            "y": number // ACROSS * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "expr": expression, "legendFormat": "{{run}}"}],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
