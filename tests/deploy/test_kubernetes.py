"""Kubernetes: what each kustomization makes, by schema and against the code."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.promql import MONITORING, check

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = sorted(path.parent for path in (ROOT / "kubernetes").rglob("kustomization.yaml"))
PARTS = ("train/base", "serving/monitoring")  # of others; the rest is applied as it is
RUNNABLE = [path for path in KUSTOMIZATIONS if not str(path).endswith(PARTS)]


def test_kubernetes_alerts_are_the_same():
    rule = yaml.safe_load((ROOT / "kubernetes/serving/monitoring/prometheusrule.yaml").read_text())
    assert rule["spec"]["groups"] == yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]


def resources(folder):
    """What a kustomization names, patched as it says (RFC 6902), images aside."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[dict[str, Any]] = []
    for entry in (*kustomization.get("resources", ()), *kustomization.get("components", ())):
        path = folder / entry
        assert path.exists(), path
        found += resources(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", ()):
        hit = [item for item in found if item["kind"] == patch["target"]["kind"]]
        assert hit, f"{folder}: no {patch['target']['kind']} to patch"
        operations = yaml.safe_load(patch["patch"])
        if isinstance(operations, dict):
            assert operations["$patch"] == "delete"
            found = [item for item in found if item not in hit]
        else:
            for item, operation in itertools.product(hit, operations):
                apply(item, operation)
    return found


def apply(item, operation):
    """One operation of a JSON patch."""
    *path, last = operation["path"].strip("/").split("/")
    for key in path:
        item = item[int(key)] if isinstance(item, list) else item[key]
    if isinstance(item, list):
        assert last == "-"
        item.append(operation["value"])
    else:
        assert operation["op"] == "add" or last in item
        item[last] = operation["value"]


# Debian's kubectl (1.20) is too old for these files. The other tests assemble the manifests by `resources`.
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl: `resources` isn't compared with kustomize")
@pytest.mark.parametrize("folder", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_kustomize_makes_the_same_of_it(folder):
    """But for names of images and labels, which are its own business."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def plain(items):
        named = (json.dumps(item | {"metadata": item["metadata"]["name"]}, sort_keys=True) for item in items)
        return sorted(re.sub(r'("image": "clip-har-jax-\w+):[^"]+', r"\1", item) for item in named)

    assert plain(yaml.safe_load_all(done.stdout)) == plain(resources(folder))


@pytest.mark.parametrize("folder", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_pods_are_locked(folder):
    """The restricted level of Kubernetes's pod security standards; and read-only, without account, bounded."""
    for pod in pods(resources(folder)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001  # of the images
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            home = next(item["value"] for item in container["env"] if item["name"] == "HOME")
            assert home in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_one_autoscaler_scales_by_what_is_measured():
    base, production = (resources(ROOT / "kubernetes/serving" / name) for name in ("base", "production"))
    assert "HorizontalPodAutoscaler" in {item["kind"] for item in base}
    assert "HorizontalPodAutoscaler" not in {item["kind"] for item in production}
    (scaled,) = (item for item in production if item["kind"] == "ScaledObject")
    (deployment,) = (item for item in production if item["kind"] == "Deployment")
    assert scaled["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"], "applying it again would undo what the autoscaler did"
    waits = next(trigger["metadata"] for trigger in scaled["spec"]["triggers"] if trigger["type"] == "prometheus")
    check(waits["query"])
    (service,) = (item for item in production if item["kind"] == "Service")
    assert set(re.findall(r'job="([^"]+)"', waits["query"])) == {service["metadata"]["name"]}


def test_the_network_lets_in_what_asks_and_out_what_is_needed():
    (policy,) = (item for item in resources(ROOT / "kubernetes/serving/base") if item["kind"] == "NetworkPolicy")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] and rule["ports"] for rule in policy["spec"]["ingress"])
    assert all(rule["to"] and rule["ports"] for rule in policy["spec"]["egress"])
    (monitor,) = (
        item for item in resources(ROOT / "kubernetes/serving/production") if item["kind"] == "ServiceMonitor"
    )
    (service,) = (item for item in resources(ROOT / "kubernetes/serving/base") if item["kind"] == "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kubernetes_follows_its_schemas(folder):
    for item in resources(folder):
        if item["apiVersion"].split("/")[0] in (
            "jobset.x-k8s.io",
            "keda.sh",
            "monitoring.coreos.com",
            "serving.kserve.io",
        ):
            assert item["metadata"]["name"]  # defined outside Kubernetes; their pods are checked below
        else:
            kubernetes_validate.validate(item, "1.31", strict=True)
    for pod in pods(resources(folder)):
        workload = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(workload, "1.31", strict=True)


def pods(node):
    """Each pod's spec, wherever it stands."""
    if isinstance(node, list):
        for item in node:
            yield from pods(item)
    elif isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)


def test_pods_run_what_there_is():
    """Their commands are scripts of the image, with flags that the scripts know."""
    for folder in KUSTOMIZATIONS:
        for pod in pods(resources(folder)):
            for container in (*pod.get("initContainers", ()), *pod["containers"]):
                assert container["image"] in ("clip-har-jax-train", "clip-har-jax-server")
                script, *arguments = container.get("args", ["serving/__main__.py"])
                assert (ROOT / script).is_file(), script
                text = (ROOT / script).read_text() + (ROOT / "clip_har_jax/cli.py").read_text()
                for flag in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
                    if not flag.startswith("--config."):
                        name = "_timeout_s" if flag.endswith("_timeout_s") else flag
                        assert name in text, f"{script} has no {flag}"
                for argument in arguments:
                    if argument.startswith("--config=configs/"):
                        assert (ROOT / argument.removeprefix("--config=")).is_file()


def test_the_grace_is_long_enough():
    from serving.settings import Settings

    for pod in pods(resources(ROOT / "kubernetes/serving/base")):
        sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > sleep + Settings.model_fields["drain_timeout_s"].default
    for folder in ("train/base", "auto_train"):
        for pod in pods(resources(ROOT / "kubernetes" / folder)):
            assert pod["terminationGracePeriodSeconds"] >= 300


def test_the_probes_ask_for_what_needs_no_key():
    from serving.security import PUBLIC

    for pod in pods(resources(ROOT / "kubernetes/serving/production")):
        server = pod["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server[probe]["httpGet"]["path"] in PUBLIC
