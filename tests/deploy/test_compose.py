"""docker-compose.yml, Dockerfile and their files, read without Docker."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import monitoring

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "credits", "generator", "storage")
SERVERS = ("postgres", "nats", "s3")
MONITORING = ("prometheus", "grafana")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PARTS: dict[str, dict[str, Any]] = COMPOSE["services"]
NATS = (ROOT / "deploy" / "nats" / "nats.conf").read_text()


def settings(service: str) -> set[str]:
    """The variables that a service reads, in capitals."""
    cls = importlib.import_module(f"services.{service}.config").Settings
    return {f"{service}_{field}".upper() for field in cls.model_fields}


def required(service: str) -> set[str]:
    """Those without which it does not start."""
    cls = importlib.import_module(f"services.{service}.config").Settings
    fields = cls.model_fields.items()
    return {f"{service}_{name}".upper() for name, field in fields if field.is_required()}


def secret_names(part: dict[str, Any]) -> list[str]:
    """File names under /run/secrets."""
    given = part.get("secrets", [])
    return [one if isinstance(one, str) else one["target"] for one in given]


def service_of(name: str) -> str:
    return name.removeprefix("migrate-")


def with_settings() -> list[str]:
    return [name for name in PARTS if service_of(name) in (*SERVICES, "simulator")]


@pytest.mark.parametrize("name", with_settings())
def test_every_variable_and_secret_is_a_setting(name: str) -> None:
    service, part = service_of(name), PARTS[name]
    variables = set(part["environment"]) - {"FRAMEWIRE_SECRETS_DIR"}
    assert variables <= settings(service), "compose sets what the service does not read"
    if service == "simulator":
        return
    files = {file.upper() for file in secret_names(part)}
    assert all(file == file.lower() for file in secret_names(part))
    assert files <= settings(service), "a secret file is named as no setting is"
    assert required(service) <= files | variables, "a required setting is not given"
    assert not variables & files


def test_every_service_has_its_set_up_step_and_waits_for_it() -> None:
    for service in SERVICES:
        waits = PARTS[service]["depends_on"]
        assert waits[f"migrate-{service}"]["condition"] == "service_completed_successfully"
        assert PARTS[f"migrate-{service}"]["command"] == ["migrate"]
        assert f"{service}_nats_url" not in secret_names(PARTS[service]) or "set-up-bus" in waits
    assert PARTS["set-up-bus"]["depends_on"]["nats"]["condition"] == "service_healthy"


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_hardened(name: str) -> None:
    part = PARTS[name]
    assert part["read_only"] is True
    assert part["cap_drop"] == ["ALL"]
    assert part["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+:\d+", part["user"]), (
        "a number, which Kubernetes and `runAsNonRoot` can check"
    )
    assert (part["user"] == "0:0") == (name == "own-volumes"), (
        "one-shot, with the one capability that it needs"
    )
    assert part["logging"]["options"]["max-size"]
    assert not {"privileged", "container_name", "pid", "ipc"} & part.keys()
    assert "docker.sock" not in str(part.get("volumes"))


STAYING = [*SERVICES, "front", *SERVERS, "simulator", *MONITORING]


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_is_watched_and_comes_back(name: str) -> None:
    part = PARTS[name]
    assert part["healthcheck"]["test"]
    assert part["restart"] == "unless-stopped"


def test_one_shots_end() -> None:
    one_shots = [name for name in PARTS if name not in STAYING]
    assert sorted(one_shots) == sorted(
        ["own-volumes", "set-up-bus", *(f"migrate-{name}" for name in SERVICES)]
    )
    assert all(PARTS[name]["restart"] == "no" for name in one_shots)


def test_images_are_variables_with_pinned_defaults() -> None:
    for name, part in PARTS.items():
        default = re.fullmatch(
            r"(?:\$\{[A-Z_0-9]+:-(.+)\}|framewire-[a-z]+:\$\{FRAMEWIRE_TAG:-local\})", part["image"]
        )
        assert default, f"{name}: {part['image']}"
        assert "latest" not in part["image"]
        assert ":" in (default[1] or "own:tag"), f"{name} has no tag"
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "Dockerfile").read_text()
    assert not re.search(r"(docker\.io/|(?<![\w./]))minio/minio", text), "gone from Docker Hub"


def test_only_the_published_ports_are_on_the_host() -> None:
    published = {name: part["ports"] for name, part in PARTS.items() if "ports" in part}
    assert published.keys() == {"front", "nats", "s3", *MONITORING}
    for ports in published.values():
        for port in ports:  # a variable, on loopback unless told otherwise: it is plain text
            assert re.fullmatch(r"\$\{FRAMEWIRE_[A-Z0-9_]+:-127\.0\.0\.1:\d+\}:\d+", port)


def test_s3_has_an_inner_and_a_public_address() -> None:
    environment = PARTS["storage"]["environment"]
    assert environment["STORAGE_ENDPOINT"] == "s3:9000"
    public = environment["STORAGE_PUBLIC_ENDPOINT"].removesuffix("}").split(":-")[1]
    assert PARTS["s3"]["ports"][0].startswith(f"${{FRAMEWIRE_S3_PUBLISH:-{public}}}")


def test_the_way_out_is_for_those_who_need_it() -> None:
    assert COMPOSE["networks"]["inner"]["internal"] is True
    outside = {name for name, part in PARTS.items() if "outer" in part.get("networks", [])}
    # A port is published by a network with a way out, or not at all.
    assert outside == {"front", "gateway", "generator", "storage", "nats", "s3", *MONITORING}


def test_the_monitoring_profile_loads_what_the_repository_has() -> None:
    assert [name for name, part in PARTS.items() if "profiles" in part] == list(MONITORING)
    assert all(PARTS[name]["profiles"] == ["monitoring"] for name in MONITORING)
    mounts = {
        target: ROOT / source
        for name in MONITORING
        for source, target, *_ in (mount.split(":") for mount in PARTS[name]["volumes"])
        if source.startswith("./")
    }
    assert all(path.exists() for path in mounts.values())
    prometheus = yaml.safe_load(mounts["/etc/prometheus/prometheus.yml"].read_text())
    assert "--config.file=/etc/prometheus/prometheus.yml" in PARTS["prometheus"]["command"]
    (rules,) = prometheus["rule_files"]
    assert sorted(mounts[str(Path(rules).parent)].glob(Path(rules).name)) == monitoring.RULES_FILES
    scraped = {
        (target["names"][0], target["port"])
        for job in prometheus["scrape_configs"]
        for target in job["dns_sd_configs"]
    }
    listening = {
        (name, int(PARTS[name]["environment"][f"{name.upper()}_METRICS_LISTEN"].split(":")[1]))
        for name in SERVICES
    }
    assert scraped == listening
    provisioning = mounts["/etc/grafana/provisioning"]
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((provisioning / "dashboards" / "framewire.yaml").read_text())
    folder = boards["providers"][0]["options"]["path"]
    home = PARTS["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (mounts[folder] / Path(home).name).exists()
    assert home.startswith(f"{folder}/")


def test_no_secret_is_in_the_environment_or_in_git() -> None:
    for name, part in PARTS.items():
        for variable, value in part.get("environment", {}).items():
            is_secret = re.search(
                r"PASSWORD|SECRET_KEY|TOKEN_SECRET|API_KEY|DATABASE_URL|NATS_URL", variable
            )
            assert not is_secret or str(value).startswith("/run/secrets/"), f"{name}: {variable}"
    ignored = (ROOT / "deploy" / "compose" / ".gitignore").read_text().split()
    assert "secrets/" in ignored
    assert ".env" in ignored


def test_make_secrets_makes_every_secret_once(tmp_path: Path) -> None:
    place = tmp_path / "secrets"
    command = [ROOT / "deploy" / "compose" / "make-secrets.sh"]
    env = {"PATH": os.environ["PATH"], "FRAMEWIRE_SECRETS": str(place)}
    subprocess.run(command, env=env, check=True, capture_output=True)
    made = {file.name: file.read_text() for file in place.iterdir()}
    wanted = {Path(one["file"]).name for one in COMPOSE["secrets"].values()}
    assert wanted == COMPOSE["secrets"].keys()
    assert wanted | {"subscriber_nats_url"} == made.keys()
    used = {
        one if isinstance(one, str) else one["source"]
        for part in PARTS.values()
        for one in part.get("secrets", [])
    }
    assert used == wanted, "declared and used by nobody"
    assert all(made.values())
    assert place.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch(r"fw_[a-z0-9]{32,128}", made["operator_key"].strip())
    assert len(made["service_token_secret"]) >= 32
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert made == {file.name: file.read_text() for file in place.iterdir()}, "what is there stays"

    (place / "azure_api_key").unlink()  # made before there was one
    env |= {"FRAMEWIRE_AZURE_API_KEY": "given", "FRAMEWIRE_PROVIDER_API_KEY": "too late"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert made | {"azure_api_key": "given"} == {
        file.name: file.read_text() for file in place.iterdir()
    }


def test_what_is_offered_is_served() -> None:
    """By an account whose address and key the generator gets from compose; the simulator takes both keys."""
    access = {
        "openai_videos": ("GENERATOR_PROVIDER_BASE_URL", "provider_api_key"),
        "azure_jobs": ("GENERATOR_AZURE_BASE_URL", "azure_api_key"),
        "runway": ("GENERATOR_RUNWAY_BASE_URL", "runway_api_key"),
    }
    generator = PARTS["generator"]
    catalogue = yaml.safe_load((ROOT / "services" / "generator" / "providers.yaml").read_text())
    served: set[str] = set()
    for account in catalogue["provider_accounts"]:
        variable, key = access[account["dialect"]]
        assert "http://simulator:8099/" in generator["environment"][variable]
        secret = {"source": key, "target": f"generator_{key}"}
        assert secret in generator["secrets"]
        assert key in PARTS["simulator"]["secrets"]
        assert f"$$(cat /run/secrets/{key})" in PARTS["simulator"]["entrypoint"][-1]
        served |= account["models"].keys()
    default = re.fullmatch(
        r"\$\{FRAMEWIRE_MODELS:-(.+)\}", PARTS["gateway"]["environment"]["GATEWAY_MODELS"]
    )
    assert default
    assert set(default[1].split(",")) == served


def test_every_role_of_a_database_url_is_made(tmp_path: Path) -> None:
    script = (ROOT / "deploy" / "compose" / "postgres" / "10-databases.sh").read_text()
    loop = re.search(r"for service in (.+); do", script)
    assert loop
    assert set(loop[1].split()) == set(SERVICES)


def test_nats_acknowledges_what_is_on_disk() -> None:
    jetstream = re.search(r"^jetstream \{(.+?)^\}", NATS, re.DOTALL | re.MULTILINE)
    assert jetstream
    assert re.search(r"^\s*sync_interval: always$", jetstream[1], re.MULTILINE)
    mounts = [mount.split(":")[:2] for mount in PARTS["nats"]["volumes"]]
    assert ["./deploy/nats/nats.conf", PARTS["nats"]["command"][1]] in mounts


def test_the_image_is_lean_and_not_root() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    build, final = stages[1], stages[2]
    assert len(stages) == 3
    assert "--require-hashes" in build
    assert "--only-binary :all:" in build
    assert "pip install" not in final
    assert re.findall(r"^USER (.+)$", final, re.MULTILINE) == ["10001:10001"]
    assert "apt-get" not in final
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore, "all stays out but what is named"
    copied = re.findall(r"^COPY (?!--from)(.+)$", build, re.MULTILINE)
    sources = {word for line in copied for word in line.split()[:-1]}
    allowed = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    for source in sources:
        assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_every_service_has_its_requirements() -> None:
    for service in (*SERVICES, "simulator"):
        assert PARTS[service]["build"]["args"]["SERVICE"] == service
        assert "--hash=sha256:" in (ROOT / "requirements" / f"{service}.txt").read_text()


def test_what_the_example_names_is_read() -> None:
    example = (ROOT / "deploy" / "compose" / "env.example").read_text()
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"^# ([A-Z_0-9]+)=", example, re.MULTILINE)) == set(
        re.findall(r"\$\{([A-Z_0-9]+):-", text)
    )
    for name, value in re.findall(r"^# ([A-Z_0-9]+)=(.*)$", example, re.MULTILINE):
        assert f"${{{name}:-{value}}}" in text, f"{name} has another default"


def test_tests_in_docker_run_the_same_images() -> None:
    """FRAMEWIRE_STACK=docker and docker-compose.yml name one image for each server, changed by one variable."""
    source = (ROOT / "tests" / "containers.py").read_text()
    for server in SERVERS:
        named = re.fullmatch(r"\$\{(\w+):-(.+)\}", PARTS[server]["image"])
        assert named
        variable, image = named.groups()
        assert f'os.environ.get("{variable}", "{image}")' in source, server


def test_the_file_for_content_credentials_adds_settings_that_storage_has() -> None:
    added = yaml.safe_load(
        (ROOT / "deploy" / "compose" / "content-credentials.yml").read_text()
    )["services"]  # fmt: skip
    assert added.keys() == {"storage"}
    assert added["storage"]["environment"].keys() <= settings("storage")
    (mount,) = added["storage"]["volumes"]
    where = mount.rsplit(":", 2)[1]
    assert all(path.startswith(where) for path in added["storage"]["environment"].values())
