"""Write the Grafana dashboards of the chart: `python scripts/dashboards.py`, or `--check` that they are up to date.

Each has a file of its own: dashboard_fleet.py, …. Grafana's JSON model:
https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from dashboard_compare import COMPARE
from dashboard_fleet import FLEET
from dashboard_job import JOB
from dashboard_panels import Dashboard, Panel
from dashboard_sweep import SWEEP

FOLDER = Path(__file__).parents[1] / "charts" / "finetune-operator" / "files" / "dashboards"
DASHBOARDS = {"fleet": FLEET, "job": JOB, "sweep": SWEEP, "compare": COMPARE}
COLUMNS = 24
#: Label -> title of its column.
_TITLES = {"name": "Job", "trial": "Trial", "cost_label": "Label", "currency": "Currency"}
_TITLES |= {"alertname": "Alert", "severity": "Severity"}
Json = dict[str, Any]


def model(dashboard: Dashboard) -> Json:
    """Grafana's JSON model of `dashboard`."""
    numbers = count(1)
    panels: list[Json] = []
    y = 0
    for title, row in dashboard.rows.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        panels.append({"id": next(numbers), "type": "row", "title": title, "gridPos": place, "panels": []})
        y += 1
        x, tallest = 0, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            height = {"stat": 4, "table": 6}.get(panel.kind, 8)
            tallest = max(tallest, height)
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            panels.append({"id": next(numbers), **_panel(panel), "gridPos": place})
            x += panel.width
        y += tallest
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["finetune"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "links": [
            {"title": title, "type": "link", "url": f"/d/{uid}", "keepTime": True, "includeVars": True}
            for title, uid in dashboard.links
        ],
        "annotations": {"list": [_mark(*mark) for mark in dashboard.marks]},
        "templating": {"list": [_datasource_variable(), *(_variable(*variable) for variable in dashboard.variables)]},
        "panels": panels,
    }


def _datasource_variable() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _mark(name: str, color: str, expr: str) -> Json:
    return {
        "name": name,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "enable": True,
        "expr": expr,
        "step": "60s",
        "iconColor": color,
        "titleFormat": name,
    }


def _variable(name: str, label: str, query: str, several: bool) -> Json:
    variable: Json = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "values"},
        "refresh": 2,
        "sort": 1,
        "multi": several,
        "includeAll": several,
    }
    return variable | ({"allValue": ".*", "current": {"text": "All", "value": "$__all"}} if several else {})


def _panel(panel: Panel) -> Json:
    is_table = panel.kind == "table"
    targets = [
        {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend}
        | ({"instant": is_table, "format": "table"} if panel.kind in ("table", "xychart") else {})
        for number, (legend, expr) in enumerate(panel.queries.items())
    ]
    made = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": _drawing(panel)},
            "overrides": [
                *(_override(column, "unit", unit) for column, unit in panel.columns.items()),
                *(
                    _override(column, "links", [{"title": title, "url": url}])
                    for column, (title, url) in panel.links.items()
                ),
                *(_override(legend, "color", _fixed(color)) for legend, color in panel.colors.items()),
            ],
        },
    }
    if is_table:
        made["transformations"] = _join(panel)
    if panel.kind == "xychart":
        right, up = panel.queries
        made["transformations"] = [
            *_join(panel),
            {"id": "partitionByValues", "options": {"fields": [_TITLES[panel.series]], "keepFields": False}},
        ]
        axes = {"x": _named(right), "y": _named(up)}
        made["options"] = {"mapping": "auto", "series": [axes], "legend": {"showLegend": True, "placement": "bottom"}}
    if panel.kind == "stat":
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
        made["fieldConfig"] = {"defaults": {"unit": panel.unit}, "overrides": []}
    return made


def _override(name: str, key: str, value: Any) -> Json:
    """Return what one series, or one column of a table, has for itself."""
    return {"matcher": {"id": "byName", "options": name}, "properties": [{"id": key, "value": value}]}


def _named(field: str) -> Json:
    return {"matcher": {"id": "byName", "options": field}}


def _fixed(color: str) -> Json:
    return {"mode": "fixed", "fixedColor": color}


def _drawing(panel: Panel) -> Json:
    if panel.kind == "xychart":
        return {"show": "lines", "lineWidth": 2}
    if panel.kind != "timeseries":
        return {}
    custom: Json = {"lineWidth": 2, "fillOpacity": 15 if panel.stack else 0, "showPoints": "never"}
    if panel.stack:
        custom["stacking"] = {"mode": "normal"}
    if panel.bars:
        custom |= {"drawStyle": "bars", "fillOpacity": 80}
    if panel.from_zero and not panel.log_scale:
        custom["axisSoftMin"] = 0
    if panel.log_scale:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    return custom


def _join(panel: Panel) -> list[Json]:
    """One row for equal labels: the queries joined, their values named by the legends, everything else left out."""
    letters = {f"Value #{chr(ord('A') + number)}": legend for number, legend in enumerate(panel.queries)}
    hidden = dict.fromkeys(
        ("Time", "__name__", "container", "endpoint", "instance", "job", "pod", "service", "sweep"), True
    )
    return [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {"excludeByName": hidden, "renameByName": letters | _TITLES},
        },
    ]


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    for name, dashboard in DASHBOARDS.items():
        path = FOLDER / f"{name}.json"
        text = json.dumps(model(dashboard), indent=1) + "\n"
        if check and (not path.exists() or path.read_text() != text):
            sys.stderr.write(f"{path} is stale: run python scripts/dashboards.py\n")
            return 1
        if not check:
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
