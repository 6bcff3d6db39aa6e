"""A control plane of Kubernetes on loopback: the real etcd, API server and controller manager. Its node is a name.

tests/deploy/kubernetes/build.sh builds them. Whoever uses it plays the node: see `Cluster.play_node`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from services.local import places
from tests.waiting import eventually

PROGRAMS = Path(__file__).parents[2] / ".framewire" / "k8s"
CUSTOM_RESOURCES = PROGRAMS / "crds"
COMMAND_SECONDS = 120.0
END_SECONDS = 20.0
NAMESPACE = "framewire"
NODE = "node"
PLACES = {
    "pods": "/api/v1",
    "secrets": "/api/v1",
    "deployments": "/apis/apps/v1",
    "statefulsets": "/apis/apps/v1",
    "jobs": "/apis/batch/v1",
    "poddisruptionbudgets": "/apis/policy/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
}
"""Kinds that tests look at, and where the API server has them."""


class Refused(Exception):
    """What the API server, or kubectl before it, said."""


class Cluster:
    """The running control plane, by kubectl as an administrator."""

    def __init__(self, directory: Path, server: str, token: str) -> None:
        self.kubeconfig = directory / "kubeconfig"
        self._addresses = 0
        self._server = server
        self._token = token
        entry = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "clusters": [
                {"name": "test", "cluster": {"server": server, "insecure-skip-tls-verify": True}}
            ],
        }
        places.write_private(self.kubeconfig, json.dumps(entry))

    @property
    def environment(self) -> dict[str, str]:
        """For scripts that call kubectl by its name."""
        path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": path}

    async def kubectl(self, *arguments: str, given: str = "") -> str:
        """What it printed; raises Refused when it failed, and when it warned."""
        process = await asyncio.create_subprocess_exec(
            PROGRAMS / "kubectl",
            *arguments,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(COMMAND_SECONDS):
            out, err = await process.communicate(given.encode())
        if process.returncode or b"Warning" in err:
            raise Refused(f"kubectl {' '.join(arguments)}: {err.decode().strip()}")
        return out.decode()

    async def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """A request to the API server, which is much quicker than kubectl; raises Refused."""

        def send() -> dict[str, Any]:
            kind = "strategic-merge-patch+json" if method == "PATCH" else "json"
            request = urllib.request.Request(
                self._server + path,
                None if body is None else json.dumps(body).encode(),
                {"Authorization": f"Bearer {self._token}", "Content-Type": f"application/{kind}"},
                method=method,
            )
            context = ssl._create_unverified_context()
            try:
                with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                raise Refused(f"{method} {path}: {error.read().decode()}") from error

        return await asyncio.to_thread(send)

    async def list(self, kind: str) -> list[dict[str, Any]]:
        """The objects of a kind in our namespace."""
        return (await self.call("GET", f"{PLACES[kind]}/namespaces/{NAMESPACE}/{kind}"))["items"]

    async def play_node(self) -> None:
        """As a scheduler and a kubelet would, once: pods get the one node, an address, and are ready; Jobs have done
        their work; what is to end has ended."""
        for pod in await self.list("pods"):
            path = f"{PLACES['pods']}/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}"
            with contextlib.suppress(Refused):  # deleted meanwhile
                if "deletionTimestamp" in pod["metadata"]:
                    await self.call("DELETE", path, {"gracePeriodSeconds": 0})
                elif pod["status"].get("phase") == "Pending":
                    await self._run(pod, path)

    async def _run(self, pod: dict[str, Any], path: str) -> None:
        if not pod["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
            name = {"name": pod["metadata"]["name"]}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": name, "target": target}
            await self.call("POST", f"{path}/binding", binding)
        self._addresses += 1
        address = f"10.1.{self._addresses // 250}.{self._addresses % 250 + 1}"
        is_job = pod["metadata"]["ownerReferences"][0]["kind"] == "Job"
        status = {
            "phase": "Succeeded" if is_job else "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "False" if is_job else "True"}],
        }
        await self.call("PATCH", f"{path}/status", {"status": status})


def _signing_key(directory: Path) -> Path:
    """Of the tokens of service accounts."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path = directory / "service-accounts.pem"
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    places.write_private(path, pem.decode())
    return path


@contextlib.asynccontextmanager
async def _running(name: str, directory: Path, *arguments: str) -> AsyncIterator[None]:
    """A program of the control plane; its end within the block is an error, with the last of its log."""
    log = directory / f"{name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            PROGRAMS / name, *arguments, stdout=output, stderr=output, cwd=directory
        )
    try:
        yield
    except BaseException:
        print(f"{name}: exit code {process.returncode}\n{log.read_text()[-3000:]}", flush=True)
        raise
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), END_SECONDS)
            except TimeoutError:
                process.kill()


def _arguments(
    directory: Path, key: Path, kubeconfig: Path, api: int
) -> dict[str, tuple[str, ...]]:
    """Of each program, in the order in which they start."""
    host = places.HOST
    etcd, peers, manager = (
        f"{host}:{places.free_port(name)}" for name in ("etcd", "etcd-peers", "controllers")
    )
    certificates = f"--cert-dir={directory / 'certificates'}"
    return {
        "etcd": (
            f"--data-dir={directory / 'etcd'}",
            "--unsafe-no-fsync",  # nothing here outlives the test
            f"--listen-client-urls=http://{etcd}",
            f"--advertise-client-urls=http://{etcd}",
            f"--listen-peer-urls=http://{peers}",
            f"--initial-advertise-peer-urls=http://{peers}",
            f"--initial-cluster=default=http://{peers}",
        ),
        "kube-apiserver": (
            f"--etcd-servers=http://{etcd}",
            f"--bind-address={host}",
            f"--secure-port={api}",
            certificates,
            "--endpoint-reconciler-type=none",  # it wants an address that is no loopback
            "--service-cluster-ip-range=10.96.0.0/16",
            f"--service-account-issuer=https://{host}:{api}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--token-auth-file={directory / 'tokens'}",
            "--authorization-mode=RBAC",
            "--allow-privileged",  # as clusters have it: what keeps such pods out is Pod Security
        ),
        "kube-controller-manager": (
            f"--kubeconfig={kubeconfig}",
            f"--bind-address={host}",
            f"--secure-port={manager.split(':')[1]}",
            certificates,
            f"--service-account-private-key-file={key}",
            "--leader-elect=false",
            # Our node sends no signs of life.
            "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller",
            "--horizontal-pod-autoscaler-sync-period=1s",
        ),
    }


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Cluster]:
    """A cluster without nodes, empty; gone at the end."""
    api, token = places.free_port("kube-apiserver"), secrets.token_hex(16)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="framewire-k8s-")))
        cluster = Cluster(directory, f"https://{places.HOST}:{api}", token)
        places.write_private(directory / "tokens", f"{token},admin,admin,system:masters\n")

        async def ready() -> bool:
            try:
                return await cluster.kubectl("get", "--raw=/readyz") == "ok"
            except Refused as error:
                raise AssertionError(str(error)) from error

        key = _signing_key(directory)
        for name, arguments in _arguments(directory, key, cluster.kubeconfig, api).items():
            await stack.enter_async_context(_running(name, directory, *arguments))
            if name == "kube-apiserver":
                await eventually(
                    ready, within_seconds=180, every_seconds=0.5, what="the API server"
                )
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
        await cluster.call("POST", "/api/v1/nodes", node)
        yield cluster
