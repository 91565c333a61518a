"""docs/metrics.md and the Grafana dashboard name the metrics that there are, with their labels, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from control_plane.metrics import FAMILIES as OF_CONTROL_PLANES
from mesh_client.core.metric import Kind
from mesh_client.core.process_metrics import FAMILIES as OF_SERVICES

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {family.name: family for family in (*OF_SERVICES, *OF_CONTROL_PLANES)}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "grpc-mesh.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]

ADDED_BY_PROMETHEUS = {"le", "instance", "job"}
_SUFFIX = re.compile(r"_(bucket|sum|count)$")
_NAME = re.compile(r"\bgrpc_mesh_\w+")


def test_every_metric_is_documented_as_it_is_and_no_other() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(grpc_mesh_\w+)` \| (\w+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    documented = {name: (kind, re.findall(r"`(\w+)`", labels), what) for name, kind, labels, what in rows}
    assert documented == {
        family.name: (family.kind.value, list(family.labels), family.help) for family in FAMILIES.values()
    }
    assert {_family(name) for name in _NAME.findall(text)} == FAMILIES.keys()


def _family(name: str) -> str:
    """The metric that a sample's name belongs to."""
    stem = _SUFFIX.sub("", name)
    return stem if stem in FAMILIES and FAMILIES[stem].kind is Kind.HISTOGRAM else name


def test_no_label_is_one_that_prometheus_adds_itself() -> None:
    for family in FAMILIES.values():
        assert not set(family.labels) & ADDED_BY_PROMETHEUS, family.name


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel.get("targets", ())]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    assert {_family(name) for expression in expressions() for name in _NAME.findall(expression)} == FAMILIES.keys()


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_of_the_dashboard_uses_labels_that_its_metrics_have(expression: str) -> None:
    names = {_family(name) for name in _NAME.findall(expression)}
    labels = {label for name in names for label in FAMILIES[name].labels} | ADDED_BY_PROMETHEUS
    grouped = {each.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for each in group.split(",")}
    matched = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", expression))
    assert (grouped | matched) - {""} <= labels
    for name in names:
        counted = FAMILIES[name].kind is not Kind.GAUGE
        assert counted == bool(re.search(rf"(rate|increase)\({name}", expression)), name
        assert (FAMILIES[name].kind is Kind.HISTOGRAM) == (f"{name}_bucket" in expression)
    assert expression.count("(") == expression.count(")")


def test_legends_name_labels_that_the_expression_keeps() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            kept = {
                each.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for each in group.split(",")
            }
            if not kept:
                kept = {label for name in _NAME.findall(target["expr"]) for label in FAMILIES[_family(name)].labels}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept | ADDED_BY_PROMETHEUS, panel[
                "title"
            ]


def test_panels_have_titles_and_places_of_their_own_and_the_chosen_source() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
