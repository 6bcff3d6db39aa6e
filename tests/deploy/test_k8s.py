"""deploy/k8s: base and the production overlay, held against schemas, settings, the design's arrows and our rules."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests import monitoring
from tests.deploy import kustomize, test_compose

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
WAYS = ("base", "overlays/prod", "overlays/dev")
SERVERS = {"postgres", "nats", "s3", "simulator"}
"""In the cluster with overlays/dev alone."""
VERSIONS = ("1.34", "1.37")
SERVICES = test_compose.SERVICES
SCHEMAS = {
    "ScaledObject": "scaledobject_v1alpha1",
    "ServiceMonitor": "servicemonitor_v1",
    "PrometheusRule": "prometheusrule_v1",
    "ExternalSecret": "externalsecret_v1",
    "Certificate": "certificate_v1",
    "Issuer": "issuer_v1",
}
ARROWS = {
    ("gateway", "credits", 7700), ("gateway", "storage", 7700), ("gateway", "generator", 7700),
    ("credits", "generator", 7700), ("generator", "storage", 7700),
    *((name, "postgres", 5432) for name in SERVICES),
    *((name, "nats", 4222) for name in SERVICES),
    ("generator", "nats", 8222), ("storage", "s3", 9000),
}  # fmt: skip
"""Who may open connections to whom; the table that the NetworkPolicies are held against."""


@functools.cache
def rendered(way: str) -> list[dict[str, Any]]:
    return kustomize.render(K8S / way)


def of_kind(way: str, kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in rendered(way) if one["kind"] == kind}


def workloads(way: str) -> list[dict[str, Any]]:
    return [one for one in rendered(way) if one["kind"] in ("Deployment", "Job", "StatefulSet")]


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod(workload).get("initContainers", ()), *pod(workload)["containers"]]


if KUBECTL := shutil.which("kubectl"):

    @pytest.mark.parametrize("way", WAYS)
    def test_the_real_kustomize_makes_the_same(way: str) -> None:
        done = subprocess.run(
            [KUBECTL, "kustomize", K8S / way], capture_output=True, text=True, check=True
        )
        real = {kustomize.key(one): one for one in yaml.safe_load_all(done.stdout)}
        ours = {kustomize.key(one): one for one in rendered(way)}
        assert real.keys() == ours.keys()
        assert [key for key in real if real[key] != ours[key]] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_every_object_is_what_its_schema_says(way: str, version: str) -> None:
    for one in rendered(way):
        if name := SCHEMAS.get(one["kind"]):
            schema = json.loads(
                (Path(__file__).parent / "crd-schemas" / f"{name}.json").read_text()
            )
            jsonschema.validate(one, schema)
        else:
            kubernetes_validate.validate(one, version, strict=True)


def test_a_real_api_server_of_the_oldest_version_is_asked() -> None:
    """By `make test-k8s`."""
    modules = (Path(__file__).parent / "kubernetes" / "go.mod").read_text()
    assert re.search(rf"\bk8s\.io/kubernetes v{re.escape(VERSIONS[0])}\.\d+\b", modules)
    assert f"Kubernetes {VERSIONS[0]} or newer" in (K8S / "README.md").read_text()


def test_the_schemas_see_a_misspelt_field() -> None:
    deployment = json.loads(json.dumps(of_kind("base", "Deployment")["credits"]))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.37", strict=True)


@pytest.mark.parametrize("way", WAYS)
def test_pods_are_restricted(way: str) -> None:
    namespace = of_kind(way, "Namespace")["framewire"]
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in workloads(way):
        spec = pod(workload)
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        image_s_own = 999  # Postgres's
        own = workload["metadata"]["name"] == "postgres"
        assert context["runAsUser"] == (image_s_own if own else 10001)
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all({"secret", "emptyDir"} & volume.keys() for volume in spec["volumes"])
        for container in containers(workload):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys()
            assert {"memory", "ephemeral-storage"} <= limits.keys()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_stands_by_itself(way: str, service: str) -> None:
    deployment = of_kind(way, "Deployment")[service]
    spec, template = deployment["spec"], deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    budget = of_kind(way, "PodDisruptionBudget")[service]["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    assert budget["maxUnavailable"] == 1
    found = of_kind(way, "Service")[service]["spec"]
    assert found["clusterIP"] == "None", "round robin by the clients"
    assert found["selector"].items() <= labels.items()
    (container,) = pod(deployment)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert all(port["targetPort"] in ports for port in found["ports"])
    assert {port["port"] for port in found["ports"]} == {7700, 9090}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    prefix = service.upper()
    for name, port in (
        ("LISTEN", "grpc"),
        ("HEALTH_LISTEN", "health"),
        ("METRICS_LISTEN", "metrics"),
    ):
        assert environment[f"{prefix}_{name}"] == f"0.0.0.0:{ports[port]}"
    assert environment[f"{prefix}_REFLECTION"] == "false"
    drain = 2 * float(environment[f"{prefix}_DRAIN_SECONDS"])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(deployment)["terminationGracePeriodSeconds"] > drain + pause + 5
    assert {one["topologyKey"] for one in pod(deployment)["topologySpreadConstraints"]} == {
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    }
    account = of_kind(way, "ServiceAccount")[service]
    assert account["automountServiceAccountToken"] is False
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_each_is_scaled_by_one_thing(way: str) -> None:
    scalers = dict.fromkeys(of_kind(way, "HorizontalPodAutoscaler"), "HPA")
    scaled = of_kind(way, "ScaledObject")
    assert not scalers.keys() & scaled.keys()
    assert scalers.keys() == {"gateway", "credits", "storage"}
    deployments = of_kind(way, "Deployment")
    for name, hpa in of_kind(way, "HorizontalPodAutoscaler").items():
        assert hpa["spec"]["scaleTargetRef"]["name"] == name
        assert hpa["spec"]["minReplicas"] >= (1 if way == "overlays/dev" else 2)
        assert "replicas" not in deployments[name]["spec"], "each roll-out would set it back"
    assert deployments["generator"]["spec"]["replicas"] == (1 if way == "overlays/dev" else 2)
    for scaler in scaled.values():
        assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
        assert scaler["spec"]["minReplicaCount"] == 2
        (trigger,) = scaler["spec"]["triggers"]
        assert trigger["metadata"]["query"] == "max(framewire_steps_overdue)"


@pytest.mark.parametrize("way", WAYS)
def test_environment_and_addresses_are_those_of_the_settings(way: str) -> None:
    services = of_kind(way, "Service")
    outside = {"postgres", "nats", "s3"}
    for name, deployment in of_kind(way, "Deployment").items():
        for container in containers(deployment):
            variables = {one["name"]: one.get("value", "") for one in container["env"]}
            assert variables.keys() - {"FRAMEWIRE_SECRETS_DIR"} <= test_compose.settings(name)
            for variable, value in variables.items():
                if variable.endswith("_ADDRESS"):
                    host, port = value.split(":")
                    assert int(port) in {one["port"] for one in services[host]["spec"]["ports"]}
                elif variable.endswith(("_ENDPOINT", "_MONITOR_URL")) and "PUBLIC" not in variable:
                    assert value.removeprefix("http://").split(":")[0] in outside
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert variables["FRAMEWIRE_SECRETS_DIR"] == mounts["secrets"]
            assert mounts.keys() == {volume["name"] for volume in pod(deployment)["volumes"]}


def test_services_show_each_other_certificates_in_production() -> None:
    way = "overlays/prod"
    certificates, callers = of_kind(way, "Certificate"), {"gateway", *SERVICES}
    for name, deployment in of_kind(way, "Deployment").items():
        (own,) = [
            one["secret"]["secretName"]
            for one in pod(deployment)["volumes"]
            if one["name"] == "tls"
        ]
        spec = certificates[name]["spec"]
        assert spec["secretName"] == own
        # Channels are opened to `credits:7700`, and that name is checked.
        assert name in spec["dnsNames"]
        assert {"server auth", "client auth"} <= set(spec["usages"])
        for container in containers(deployment):
            given = {
                one["name"] for one in container["env"] if one["value"].startswith("/run/tls/")
            }
            wanted = {"TLS_CERTIFICATE_FILE", "TLS_KEY_FILE", "TLS_CA_FILE"}
            if name != "gateway":
                wanted.add("TLS_CLIENT_CA_FILE")
            assert given == {f"{name.upper()}_{one}" for one in wanted}
    assert callers <= certificates.keys()


def test_reflection_is_off_in_production() -> None:
    found = of_kind("overlays/prod", "Deployment")
    for name, deployment in found.items():
        for container in containers(deployment):
            variables = {one["name"]: one.get("value", "") for one in container["env"]}
            assert variables[f"{name.upper()}_REFLECTION"] == "false"
    assert len(found) == 4


@pytest.mark.parametrize("way", WAYS)
def test_set_up_comes_before_the_services(way: str) -> None:
    jobs = of_kind(way, "Job")
    assert jobs.keys() == {"set-up-bus", *(f"migrate-{name}" for name in SERVICES)}
    for name, deployment in of_kind(way, "Deployment").items():
        (waiting,) = pod(deployment)["initContainers"]
        assert waiting["args"] == ["wait"]
        assert waiting["image"] == pod(deployment)["containers"][0]["image"]
        assert pod(jobs[f"migrate-{name}"])["containers"][0]["args"] == ["migrate"]
        (secret,) = [
            one["secret"] for one in pod(jobs[f"migrate-{name}"])["volumes"] if "secret" in one
        ]
        assert secret["secretName"] == f"{name}-owner", "the service's own role changes no table"


@pytest.mark.parametrize("way", WAYS)
def test_every_secret_that_is_mounted_comes_from_the_store(way: str) -> None:
    mounted = [
        volume["secret"]
        for workload in workloads(way)
        for volume in pod(workload)["volumes"]
        if "secret" in volume
    ]
    readme = (K8S / "README.md").read_text()
    assert all(f"| `{one['secretName']}` |" in readme for one in mounted)
    used = {one["secretName"] for one in mounted if not one.get("optional")}
    assert {one["secretName"] for one in mounted} - used == {"content-credentials"}
    if way == "overlays/dev":
        script = (K8S / "overlays" / "dev" / "secrets.sh").read_text()
        made = set(re.findall(r"^ *secret ([a-z0-9-]+) ", script, re.MULTILINE))
        assert made | {f"{name}-owner" for name in ("gateway", "credits", "generator")} == used
    if way == "overlays/prod":
        stored = of_kind(way, "ExternalSecret")
        made = {one["spec"]["secretName"] for one in of_kind(way, "Certificate").values()}
        targets = {one["spec"]["target"]["name"] for one in stored.values()}
        assert targets | made - {"framewire-authority"} == used


def test_the_servers_of_the_small_cluster_let_in_who_may_call_them() -> None:
    way = "overlays/dev"
    policies, services = of_kind(way, "NetworkPolicy"), of_kind(way, "Service")
    assert {one["metadata"]["name"] for one in workloads(way) if one["kind"] == "StatefulSet"} == (
        SERVERS
    )
    into: set[tuple[str, str, int]] = set()
    for name in SERVERS:
        ports = {port["port"] for port in services[name]["spec"]["ports"]}
        for rule in policies[name]["spec"]["ingress"]:
            assert set(_ports(rule)) <= ports
            into |= {
                (peer, name, port) for peer in _peers(rule.get("from", ())) for port in _ports(rule)
            }
    wanted = {arrow for arrow in ARROWS if arrow[1] in SERVERS - {"s3"}}
    assert {arrow for arrow in into if arrow[0] in SERVICES} == wanted | {
        ("generator", "simulator", 8099)
    }
    told = {
        one["name"]: one["value"]
        for container in containers(of_kind(way, "Deployment")["generator"])
        for one in container["env"]
    }
    for provider in ("PROVIDER", "AZURE", "RUNWAY"):
        assert told[f"GENERATOR_{provider}_BASE_URL"].startswith("http://simulator:8099/")


def test_the_policies_allow_the_arrows_and_no_others() -> None:
    policies = of_kind("base", "NetworkPolicy")
    deny = policies["default-deny"]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    out: set[tuple[str, str, int]] = set()
    into: set[tuple[str, str, int]] = set()
    for name in SERVICES:
        spec = policies[name]["spec"]
        for rule in spec["egress"]:
            out |= {(name, peer, port) for peer in _peers(rule["to"]) for port in _ports(rule)}
        for rule in spec["ingress"]:
            into |= {
                (peer, name, port) for peer in _peers(rule.get("from", ())) for port in _ports(rule)
            }
    assert out == ARROWS
    assert into == {arrow for arrow in ARROWS if arrow[1] in SERVICES}
    open_to_all = [
        (name, _ports(rule))
        for name in SERVICES
        for rule in policies[name]["spec"]["ingress"]
        if "from" not in rule
    ]
    assert open_to_all == [("gateway", [7700])]
    to_the_internet = {
        name
        for name in SERVICES
        for rule in policies[name]["spec"]["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
    }
    assert to_the_internet == {"gateway", "generator", "storage"}


def _peers(peers: Any) -> list[str]:
    return [
        next(iter(peer["podSelector"]["matchLabels"].values()))
        for peer in peers
        if "podSelector" in peer and "namespaceSelector" not in peer
    ]


def _ports(rule: dict[str, Any]) -> list[int]:
    return [port["port"] for port in rule["ports"]]


def test_the_rules_are_those_of_prometheus_and_jobs_are_called_alike() -> None:
    groups = [
        group
        for file in monitoring.RULES_FILES
        for group in yaml.safe_load(file.read_text())["groups"]
    ]
    assert of_kind("overlays/prod", "PrometheusRule")["framewire"]["spec"]["groups"] == groups
    monitors = of_kind("overlays/prod", "ServiceMonitor")
    assert monitors.keys() == set(SERVICES)
    services = of_kind("overlays/prod", "Service")
    for name, monitor in monitors.items():
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in services[name]["spec"]["ports"]}
        selector = monitor["spec"]["selector"]["matchLabels"]
        assert selector.items() <= services[name]["metadata"]["labels"].items()
        assert endpoint["relabelings"] == [
            {"targetLabel": "job", "replacement": f"framewire-{name}"}
        ]
