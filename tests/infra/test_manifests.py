"""The manifests, as far as they can be checked without a cluster: form, versions, secrets, shell syntax."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants

INFRA = Path(__file__).parent.parent.parent / "infra"
# How long `ray start --block` waits for its node to be left after SIGTERM; seconds.
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
SCHEMAS = Path(__file__).parent / "schemas"
PINS = dict(
    line.split("==") for line in (INFRA.parent / "constraints.txt").read_text().splitlines() if line.count("==") == 1
)


def load(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def cluster(name: str) -> Any:
    """The RayCluster of a manifest."""
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def containers(name: str) -> list[Any]:
    found = cluster(name)
    groups = [found["headGroupSpec"], *found["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def problem(manifest: Any, schema: str) -> str | None:
    """What the schema of the software that reads the manifest has against it."""
    rules = json.loads((SCHEMAS / f"{schema}.json").read_text())
    checker = jsonschema.validators.validator_for(rules)(rules)
    found = jsonschema.exceptions.best_match(checker.iter_errors(manifest))
    return None if found is None else f"{found.json_path}: {found.message}"


@pytest.mark.parametrize("name", ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml", "services/compose.yaml"])
def test_schemas(name: str) -> None:
    assert problem(load(name), "compose" if "compose" in name else "kuberay") is None


def test_the_schemas_find_mistakes() -> None:
    job = load("kuberay/rayjob.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 8
    assert "'replica' was unexpected" in (problem(job, "kuberay") or "")
    services = load("services/compose.yaml")
    services["services"]["mlflow"]["ports"] = "5000"
    assert "'5000' is not of type 'array'" in (problem(services, "compose") or "")


@pytest.mark.parametrize("name", ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"])
def test_clusters(name: str) -> None:
    found = cluster(name)
    assert found["rayVersion"] == PINS["ray"]
    assert found["authOptions"] == {"mode": "token"}, "the submitter and the operator need the token as well"
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in found["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert gpus == container["resources"]["requests"]["nvidia.com/gpu"] == group["rayStartParams"]["num-gpus"]
    for group in (found["headGroupSpec"], *found["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings"
        assert pod["securityContext"]["runAsNonRoot"] is True
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"])
def test_a_pod_that_is_taken_away_has_time_for_a_checkpoint(name: str) -> None:
    """Ray reads the variable (tests/orchestrator/test_links.py shows what follows), and waits less than Kubernetes."""
    assert float(os.environ.get(DRAIN, "30")) == ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
    for group in cluster(name)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            (seconds,) = (int(entry["value"]) for entry in container["env"] if entry["name"] == DRAIN)
            assert 240 <= seconds <= pod["terminationGracePeriodSeconds"] - 10


def test_the_job_asks_for_what_its_cluster_has() -> None:
    spec = load("kuberay/rayjob.yaml")["spec"]
    workers = int(re.findall(r"workers=(\d+)", spec["entrypoint"])[0])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert workers == group["replicas"] * int(group["rayStartParams"]["num-gpus"])
    assert spec["backoffLimit"] > 0 and "--continue" in spec["entrypoint"], "a job that is started again goes on"


def test_no_secret_is_written_down() -> None:
    for name in ("kuberay/rayjob.yaml", "kuberay/raycluster.yaml"):
        for container in containers(name):
            given = {entry["name"] for entry in container.get("env", ()) if "value" in entry}
            assert given <= {DRAIN}
    services = load("services/compose.yaml")["services"]
    for service in services.values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|KEY", name):
                assert value.startswith("${")
    required = re.findall(r"\$\{(\w+):\?", (INFRA / "services/compose.yaml").read_text())
    lines = (INFRA / "services/env.example").read_text().splitlines()
    example = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    assert sorted(example) == sorted(required), "what is empty is refused"
    assert not any(example.values())


def test_services_are_for_this_machine() -> None:
    services = load("services/compose.yaml")["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    for service in services.values():
        assert ("image" in service) != ("build" in service)
        assert ":" in service.get("image", ":") and not service.get("image", "").endswith(":latest")
        assert set(service.get("depends_on", {})) <= set(services)


def test_dockerfiles_pin_what_the_runs_use() -> None:
    image = (INFRA / "docker/Dockerfile").read_text()
    torch = re.findall(r"torch==([\d.]+)", image)
    assert torch == re.findall(r'"torch==([\d.]+)"', (INFRA.parent / "pyproject.toml").read_text())
    assert image.count("-c constraints.txt") == 2
    server = (INFRA / "services/Dockerfile.mlflow").read_text()
    for package in ("mlflow", "boto3"):
        assert f"{package}=={PINS[package]}" in server
    for text in (image, server):
        assert re.search(r"^USER 1000$", text.split("FROM ")[-1], re.MULTILINE)


def test_the_image_gets_every_room() -> None:
    kept = (INFRA.parent / ".dockerignore").read_text().splitlines()
    rooms = re.findall(r'^"longstride\.(\w+)" = "', (INFRA.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(rooms) == 6
    for path in (*rooms, "configs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        assert f"!{path}" in kept
