"""Alerts and dashboard ask for series that the server has, in a language that Prometheus reads."""

import json
import re

import pytest
import yaml

from serving.telemetry import Metrics
from tests.support.promql import MONITORING, RULES, check, labels_of, selectors

DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "serving.json").read_text())


def test_a_wrong_name_or_label_is_noticed():
    check("sum by (model) (rate(har_predictions_total[5m]))")
    for wrong in ("har_nothing > 0", "rate(har_prediction_total[5m])", 'har_ready{status="200"}', "sum by (le) (up)"):
        with pytest.raises(AssertionError):
            check(wrong)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_ask_for_what_there_is(rule):
    check(rule["expr"])
    if "alert" in rule:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used <= labels_of(selectors(rule["expr"]))


def test_what_must_be_told_is_told():
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    assert {"HarErrors", "HarSaturated", "HarClassMixDrifts", "HarAbstains", "HarDown"} <= alerts
    played = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    fired = {test["alertname"] for group in played for test in group["alert_rule_test"] if test["exp_alerts"]}
    assert fired == alerts, "an alert that alerts_test.yml never lets fire"


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_panels_ask_for_what_there_is(panel):
    for target in panel["targets"]:
        check(target["expr"])
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert label in labels_of(selectors(target["expr"]))


def test_the_dashboard_is_whole():
    source = yaml.safe_load((MONITORING / "grafana" / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels lie over one another"
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    shown = " ".join([*targets, *(rule["expr"] for rule in RULES)])
    families = {family.name for family in Metrics().registry.collect()}
    assert not [name for name in families if name not in shown], "measured and never looked at"
