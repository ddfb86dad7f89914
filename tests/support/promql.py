"""Expressions in PromQL against the series that the service gives and the rules record."""

import re
from pathlib import Path

import promql_parser
import yaml
from prometheus_client.metrics import MetricWrapperBase

from serving.telemetry import Metrics

MONITORING = Path(__file__).parents[2] / "serving" / "monitoring"
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
TARGET_LABELS = {"job", "instance", "namespace", "pod"}  # added while scraping
# What the rules record, by the labels that they keep.
RECORDED = {
    rule["record"]: {label for by in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in by.split(", ")}
    for rule in RULES
    if "record" in rule
}


def given() -> dict[str, set[str]]:
    """Name of each series that there is -> its labels."""
    names = {"up": TARGET_LABELS, **RECORDED}
    for collector, series in Metrics().registry._collector_to_names.items():
        assert isinstance(collector, MetricWrapperBase)
        labels = {*collector._labelnames, *TARGET_LABELS}  # prometheus_client has no public name for them
        names |= {name: labels | ({"le"} if name.endswith("_bucket") else set()) for name in series}
    return names


GIVEN = given()


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(part: object) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            found.append(part)
        for name in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
            inner = getattr(part, name, None)
            for item in inner if isinstance(inner, list) else [inner]:
                if item is not None:
                    visit(item)

    visit(promql_parser.parse(expression.replace("$__rate_interval", "5m")))
    return found


def labels_of(asked: list[promql_parser.VectorSelector]) -> set[str]:
    """Return the labels of all series that are asked for."""
    return set().union(*(GIVEN[selector.name or ""] for selector in asked))


def check(expression: str) -> None:
    asked = selectors(expression)
    assert asked, f"{expression}: asks for nothing"
    for selector in asked:
        assert selector.name is not None and selector.name in GIVEN, f"{expression}: there is no {selector.name}"
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert labels <= GIVEN[selector.name], f"{expression}: {selector.name} has no {labels - GIVEN[selector.name]}"
    grouped = {label.strip() for by in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in by.split(",")}
    assert grouped <= labels_of(asked), expression
