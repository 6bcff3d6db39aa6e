"""`make test-k8s`: applies deploy/k8s to a real API server, as its README says, and looks at what becomes of it.

The control plane is real (tests/deploy/cluster.py), and so are the custom resource definitions of cert-manager, KEDA,
External Secrets and the Prometheus operator. Its node is a name: no container runs, the test says that they do. So it
shows that every object is taken without a warning, that admission lets every pod in under `restricted`, that selectors,
ports, scalers and budgets meet what they are meant for, and that the next release can be applied; not that a probe
answers, or that a network policy stops a packet.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.deploy import cluster, kustomize
from tests.deploy.steps import Failed, require, say
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
SET_UP = "app.kubernetes.io/component=set-up"
NAME = "app.kubernetes.io/name"

Object = dict[str, Any]


class Overlay:
    """One of deploy/k8s/overlays, applied."""

    def __init__(self, kubernetes: cluster.Cluster, name: str) -> None:
        self.kubernetes = kubernetes
        self.name = name
        self.path = K8S / "overlays" / name
        self.objects = kustomize.render(self.path)

    def of_kind(self, *kinds: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] in kinds]

    async def apply(self) -> collections.Counter[str]:
        """How many objects were created, configured, unchanged."""
        told = await self.kubernetes.kubectl("apply", "-k", str(self.path))
        return collections.Counter(line.split()[-1] for line in told.splitlines())

    def replicas(self) -> dict[str, int]:
        """How many pods each workload is meant to have, the scalers' minimum counted in."""
        found = {
            one["metadata"]["name"]: one["spec"].get("replicas", 1)
            for one in self.of_kind("Deployment", "StatefulSet")
        }
        found |= dict.fromkeys((one["metadata"]["name"] for one in self.of_kind("Job")), 1)
        return found | {
            one["metadata"]["name"]: one["spec"]["minReplicas"]
            for one in self.of_kind("HorizontalPodAutoscaler")
        }

    async def pods(self) -> dict[str, list[Object]]:
        """By workload, those that are not on their way out."""
        found: dict[str, list[Object]] = {}
        for pod in await self.kubernetes.list("pods"):
            if "deletionTimestamp" not in pod["metadata"]:
                found.setdefault(pod["metadata"]["labels"][NAME], []).append(pod)
        return found

    async def is_applied(self) -> None:
        """Once as it is, and once again, which changes nothing."""
        first = await self.apply()
        require(
            first.total() == len(self.objects), f"{self.name}: {first}, not {len(self.objects)}"
        )
        require(set(first) <= {"created", "unchanged"}, f"{self.name}: {first}")
        before = await self._specs()
        await self.apply()
        after = await self._specs()
        changed = [key for key in before if before[key] != after[key]]
        require(not changed, f"{self.name}, applied again, changes {changed}")
        say(f"{self.name}: {first.total()} objects are taken, and taken again without a change")

    async def _specs(self) -> dict[tuple[str, str, str], Object]:
        """What was asked for, without what controllers say of it; replicas are the scalers'."""
        told = json.loads(await self.kubernetes.kubectl("get", "-k", str(self.path), "-o", "json"))
        kept = ("spec", "data", "rules")
        found = {
            kustomize.key(one): {name: one[name] for name in kept if name in one}
            for one in told["items"]
        }
        for one in found.values():
            one.get("spec", {}).pop("replicas", None)
        return found

    async def gets_its_pods(self) -> None:
        """Each workload's controller makes all pods that it is meant to have: admission refuses none."""
        wanted = self.replicas()

        async def made() -> bool:
            found = {name: len(pods) for name, pods in (await self.pods()).items()}
            assert found == wanted, f"pods: {found}, not {wanted}"
            return True

        await eventually(made, within_seconds=90, every_seconds=1, what="every pod")
        say(f"{self.name}: {sum(wanted.values())} pods are let in, under `restricted`")

    async def rolls_out(self) -> None:
        """Every Deployment and StatefulSet is available and every Job done, once pods are said to be ready."""

        async def done() -> bool:
            await self.kubernetes.play_node()
            for one in [
                *await self.kubernetes.list("deployments"),
                *await self.kubernetes.list("statefulsets"),
            ]:
                name, status, spec = one["metadata"]["name"], one["status"], one["spec"]
                assert status.get("observedGeneration") == one["metadata"]["generation"], name
                ready = (status.get("updatedReplicas"), status.get("availableReplicas"))
                assert ready == (spec["replicas"], spec["replicas"]), f"{name}: {status}"
                assert status["replicas"] == spec["replicas"], f"{name}: {status}"
            for one in await self.kubernetes.list("jobs"):
                assert one["status"].get("succeeded") == 1, one["metadata"]["name"]
            return True

        await eventually(done, within_seconds=120, every_seconds=1, what="the roll-out")
        say(f"{self.name}: rolled out")

    async def services_lead_to_pods(self) -> None:
        """Every port of every Service leads to a port that a container of each of its pods names."""
        pods = await self.pods()

        async def led() -> bool:
            slices = await self.kubernetes.list("endpointslices")
            for service in self.of_kind("Service"):
                name = service["metadata"]["name"]
                found = [
                    one
                    for one in slices
                    if one["metadata"]["labels"]["kubernetes.io/service-name"] == name
                ]
                (container,) = pods[name][0]["spec"]["containers"]
                named = {port["name"]: port["containerPort"] for port in container["ports"]}
                wanted = {
                    port["name"]: named.get(port["targetPort"]) for port in service["spec"]["ports"]
                }
                for one in found:
                    ports = {port["name"]: port["port"] for port in one["ports"] or ()}
                    assert ports == wanted, f"{name}: {ports}, not {wanted}"
                ready = {
                    address
                    for one in found
                    for endpoint in one["endpoints"] or ()
                    if endpoint["conditions"]["ready"]
                    for address in endpoint["addresses"]
                }
                assert ready == {pod["status"]["podIP"] for pod in pods[name]}, name
            return True

        await eventually(led, within_seconds=60, every_seconds=1, what="every endpoint")
        say(f"{self.name}: every Service leads to its pods, each port to one that is named")

    async def evicts_one_at_a_time(self) -> None:
        """As a drained node does it: the first goes, the second has to wait until another one is there."""
        for budget in self.of_kind("PodDisruptionBudget"):
            name = budget["metadata"]["name"]

            async def counted(name: str = name) -> bool:
                (found,) = [
                    one
                    for one in await self.kubernetes.list("poddisruptionbudgets")
                    if one["metadata"]["name"] == name
                ]
                status, wanted = found["status"], self.replicas()[name]
                assert status["expectedPods"] == status["currentHealthy"] == wanted, status
                assert status["disruptionsAllowed"] == 1, status
                return True

            await eventually(counted, within_seconds=60, every_seconds=0.5, what="its budget")
            first, *others = (await self.pods())[name]
            await self._evict(first)
            for other in others[:1]:
                try:
                    await self._evict(other)
                except cluster.Refused as error:
                    require("disruption budget" in str(error), str(error))
                else:
                    raise Failed(f"{name}: two pods were evicted at once")
        say(f"{self.name}: a node may be drained, and takes one pod of each service at a time")
        await self.rolls_out()

    async def _evict(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": cluster.NAMESPACE},
        }
        path = f"/api/v1/namespaces/{cluster.NAMESPACE}/pods/{name}/eviction"
        await self.kubernetes.call("POST", path, eviction)

    async def takes_the_next_release(self) -> None:
        """With other images: Jobs of the release before are in the way until they are deleted, as the README says."""
        text = await self.kubernetes.kubectl("kustomize", str(self.path))
        text = re.sub(r"image: (framewire-\w+)", r"image: \1:next", text)
        try:
            await self.kubernetes.kubectl("apply", "-f", "-", given=text)
        except cluster.Refused as error:
            others = [
                line
                for line in re.findall(r'^The (\S+ "\S+") is invalid', str(error), re.MULTILINE)
                if not line.startswith("Job ")
            ]
            require("field is immutable" in str(error) and not others, str(error))
        else:
            raise Failed("a Job's template was changed")
        (command,) = re.findall(r"^kubectl (delete job .+?) +#", _readme(), re.MULTILINE)
        await self.kubernetes.kubectl(*command.split())
        await self.kubernetes.kubectl("apply", "-f", "-", given=text)
        await self.rolls_out()
        for name, pods in (await self.pods()).items():
            images = {one["image"] for pod in pods for one in pod["spec"]["containers"]}
            ours = {image for image in images if image.startswith("framewire-")}
            require(all(image.endswith(":next") for image in ours), f"{name} runs {images}")
        say(f"{self.name}: the next release is rolled out by the commands of the README")

    async def is_deleted(self) -> None:
        await self.kubernetes.kubectl("delete", "namespace", cluster.NAMESPACE, "--wait=false")

        async def gone() -> bool:
            await self.kubernetes.play_node()
            namespaces = (await self.kubernetes.call("GET", "/api/v1/namespaces"))["items"]
            return all(one["metadata"]["name"] != cluster.NAMESPACE for one in namespaces)

        await eventually(gone, within_seconds=100, every_seconds=1, what="the end of the namespace")


def _readme() -> str:
    return (K8S / "README.md").read_text()


async def refuses_what_is_wrong(kubernetes: cluster.Cluster, overlay: Overlay) -> None:
    """What all of this could not see, if it were not so: another pod is not let in, a misspelt field not taken."""
    (job,) = [one for one in overlay.of_kind("Job") if one["metadata"]["name"] == "migrate-credits"]
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "stranger", "namespace": cluster.NAMESPACE},
        "spec": json.loads(json.dumps(job["spec"]["template"]["spec"])),
    }
    dry = ("create", "--dry-run=server", "-f", "-")
    await kubernetes.kubectl(*dry, given=yaml.safe_dump(pod))
    container = pod["spec"]["containers"][0]
    kept, container["securityContext"] = container["securityContext"], {"privileged": True}
    for wrong, said in (
        ("privileged", 'violates PodSecurity "restricted'),
        ("misspelt", "unknown"),
    ):
        if wrong == "misspelt":
            container["securityContext"], container["volumeMount"] = kept, []
        try:
            await kubernetes.kubectl(*dry, given=yaml.safe_dump(pod))
        except cluster.Refused as error:
            require(said in str(error), str(error))
        else:
            raise Failed(f"a {wrong} pod is let in")
    say("a privileged pod and a misspelt field are refused")


async def makes_its_secrets(kubernetes: cluster.Cluster, overlay: Overlay) -> None:
    """secrets.sh, and then every Secret that a pod mounts is there."""
    with tempfile.TemporaryDirectory(prefix="framewire-k8s-secrets-") as place:
        environment = kubernetes.environment | {"FRAMEWIRE_SECRETS": f"{place}/secrets"}
        process = await asyncio.create_subprocess_exec(
            overlay.path / "secrets.sh",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        told, _ = await process.communicate()
        require(process.returncode == 0, told.decode())
    made = {one["metadata"]["name"] for one in await kubernetes.list("secrets")}
    mounted = {
        volume["secret"]["secretName"]
        for one in overlay.of_kind("Deployment", "StatefulSet", "Job")
        for volume in one["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume and not volume["secret"].get("optional")
    }
    require(made == mounted, f"made: {sorted(made)}, mounted: {sorted(mounted)}")
    say(f"{overlay.name}: secrets.sh makes the {len(made)} Secrets that are mounted")


async def check(kubernetes: cluster.Cluster) -> None:
    version = await kubernetes.call("GET", "/version")
    say(f"the API server answers: {version['gitVersion']}")
    for file in sorted(cluster.CUSTOM_RESOURCES.glob("*.yaml")):
        await kubernetes.kubectl("apply", "--server-side", "-f", str(file))
    await kubernetes.kubectl("wait", "--for=condition=Established", "crd", "--all")
    for name in ("prod", "dev"):
        overlay = Overlay(kubernetes, name)
        if name == "dev":
            await makes_its_secrets(kubernetes, overlay)
        await overlay.is_applied()
        await overlay.gets_its_pods()
        await overlay.rolls_out()
        await overlay.services_lead_to_pods()
        if name == "prod":
            await overlay.evicts_one_at_a_time()
            await refuses_what_is_wrong(kubernetes, overlay)
        await overlay.takes_the_next_release()
        await overlay.is_deleted()


async def main() -> None:
    async with cluster.started() as kubernetes:
        await check(kubernetes)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (Failed, AssertionError, cluster.Refused) as error:
        sys.exit(f"test-k8s: {error}")
    say("test-k8s: passed")
