"""The dashboards' form: generated, complete, and drawn where they say."""

import subprocess
import sys
from typing import Any

import pytest

from finetune_operator.observability.metrics import PHASES
from support.docs.chart import (
    ROOT,
    find,
    objects,
    values_of,
)
from support.docs.dashboards import (
    FOLDER,
    filled,
    load,
    panels,
)
from support.server.client import Object

NAMES = ("fleet", "job", "sweep", "compare")
EVERY_DASHBOARD = pytest.mark.parametrize("name", NAMES)


def test_the_files_are_what_the_script_writes() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "scripts" / "dashboards.py", "--check"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)


@EVERY_DASHBOARD
def test_every_panel_says_what_it_shows_in_which_unit(name: str) -> None:
    for panel in panels(load(name)):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] not in ("", "none"), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        assert all(target["legendFormat"] for target in panel["targets"])


@EVERY_DASHBOARD
def test_columns_may_have_units_of_their_own(name: str) -> None:
    for panel in panels(load(name)):
        legends = {target["legendFormat"] for target in panel["targets"]}
        units = own(panel, "unit")
        assert set(units) <= legends
        assert bool(units) == (panel["type"] == "table")
        assert not {"", "none", panel["fieldConfig"]["defaults"]["unit"]} & set(units.values())


def test_every_phase_has_a_color() -> None:
    (panel,) = (panel for panel in panels(load("fleet")) if panel["title"] == "Jobs by phase")
    colors = {phase: color["fixedColor"] for phase, color in own(panel, "color").items()}
    assert set(PHASES) <= set(colors)
    assert len(set(colors.values())) == len(colors)


def own(panel: Object, key: str) -> dict[str, Any]:
    """By column or series: what the panel sets for it alone."""
    overrides = panel["fieldConfig"]["overrides"]
    found = [(o["matcher"], each) for o in overrides for each in o["properties"] if each["id"] == key]
    assert all(matcher["id"] == "byName" for matcher, _ in found)
    return {matcher["options"]: each["value"] for matcher, each in found}


@EVERY_DASHBOARD
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(name)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in load(name)["panels"]]
    assert len(ids) == len(set(ids))


@EVERY_DASHBOARD
def test_every_variable_is_used_and_every_one_used_is_there(name: str) -> None:
    dashboard = load(name)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    exprs = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    for expr in exprs:
        filled(expr, dict.fromkeys(variables, "x"))
    used = {variable for variable in variables if any(f"${variable}" in expr for expr in exprs)}
    assert used | {"datasource"} == variables


@EVERY_DASHBOARD
def test_the_chart_ships_the_dashboard_where_grafana_looks(name: str) -> None:
    found = find(objects(values_of("monitoring")), "ConfigMap", f"tune-finetune-operator-dashboard-{name}")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == {"grafana_folder": "Fine-tuning"}
    (file,) = found["data"]
    assert file == f"finetune-{name}.json"
    assert found["data"][file].strip() == (FOLDER / f"{name}.json").read_text().strip()
    assert len(found["data"][file]) < 900_000


def test_the_dashboards_link_to_each_other() -> None:
    uids = {name: load(name)["uid"] for name in NAMES}
    links = {name: [link["url"] for link in load(name)["links"]] for name in NAMES}
    assert links["fleet"] == [f"/d/{uids[name]}" for name in NAMES[1:]]
    assert links["job"] == links["sweep"] == links["compare"] == [f"/d/{uids['fleet']}"]


def test_a_job_of_the_fleet_opens_its_own_dashboard() -> None:
    places = {("fleet", "Jobs"), ("fleet", "Finished jobs"), ("compare", "Finished jobs")}
    tables = [panel for name, title in places for panel in panels(load(name)) if panel["title"] == title]
    assert len(tables) == 3
    for table in tables:
        (link,) = own(table, "links")["Job"]
        assert link["url"].startswith(f"/d/{load('job')['uid']}?var-namespace=${{__data.fields.namespace}}&var-job=")
    names = {variable["name"] for variable in load("job")["templating"]["list"]}
    assert {"namespace", "job"} <= names


def test_attempts_have_numbers_and_leave_marks() -> None:
    dashboard = load("job")
    legends = [target["legendFormat"] for panel in panels(dashboard) for target in panel["targets"]]
    assert any("attempt {{attempt}}" in legend for legend in legends)
    assert not any("{{pod}}" in legend for legend in legends)
    marks = dashboard["annotations"]["list"]
    assert [mark["name"] for mark in marks] == ["New attempt", "Checkpoint", "Preemption in the namespace"]
    for mark in marks:
        filled(mark["expr"], {"namespace": "x", "job": "y"})


@EVERY_DASHBOARD
def test_a_table_joins_rows_by_labels_that_its_queries_share(name: str) -> None:
    """Grafana's merge makes one row of those whose labels are all equal: no scrape's label may be among them."""
    for panel in panels(load(name)):
        if panel["type"] in ("table", "xychart"):
            assert all(" by (" in target["expr"] for target in panel["targets"]), panel["title"]


def test_jobs_are_compared_by_step() -> None:
    charts = [panel for panel in panels(load("compare")) if panel["type"] == "xychart"]
    assert len(charts) == 2
    for chart in charts:
        right, up = (target["legendFormat"] for target in chart["targets"])
        (series,) = chart["options"]["series"]
        assert (series["x"]["matcher"]["options"], series["y"]["matcher"]["options"]) == (right, up)
        assert right == "Step"
        merge, named, parts = chart["transformations"]
        assert named["options"]["renameByName"] | {"name": "Job"} == named["options"]["renameByName"]
        assert (merge["id"], parts["options"]["fields"]) == ("merge", ["Job"])
