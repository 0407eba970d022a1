"""The files that put workers on a cluster fit the schemas of what reads them, and ask for no more than they need."""

from __future__ import annotations

import copy
import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from autoq.spec import load_spec
from autoq.workers.session import check_address

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workers" / "cluster"
# Fields of the kind RayCluster, by https://ray-project.github.io/kuberay/reference/api (ray.io/v1).
RAY_CLUSTER = {
    "spec": {
        *("rayVersion", "headGroupSpec", "workerGroupSpecs", "authOptions", "enableInTreeAutoscaling"),
        *("autoscalerOptions", "suspend", "headServiceAnnotations", "gcsFaultToleranceOptions", "managedBy"),
    },
    "headGroupSpec": {
        "template",
        "rayStartParams",
        "serviceType",
        "headService",
        "enableIngress",
        "resources",
        "labels",
    },
    "workerGroupSpecs": {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts"),
        *("suspend", "idleTimeoutSeconds", "scaleStrategy", "resources", "labels"),
    },
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Every pod template of the manifests, with the name of its group."""
    (cluster,) = documents("kuberay.yaml")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    found = [(group.get("groupName", "head"), group["template"]) for group in groups]
    kinds = ("Deployment", "StatefulSet")
    return found + [
        (d["metadata"]["name"], d["spec"]["template"]) for d in documents("kubernetes.yaml") if d["kind"] in kinds
    ]


def test_ray_reads_the_launcher_s_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents("ray-cluster.yaml")
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["max_workers"] == config["min_workers"] == len(config["provider"]["worker_ips"])
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert "ray start" not in line or "RAY_AUTH_MODE=token" in line, "a cluster without a token lets anybody in"


def test_ray_start_knows_every_option() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    lines = [
        line for key in ("head", "worker") for line in documents("ray-cluster.yaml")[0][f"{key}_start_ray_commands"]
    ]
    used = {word.partition("=")[0] for line in lines for word in shlex.split(line) if word.startswith("--")}
    assert used
    assert used <= known


def test_the_ray_cluster_has_only_known_fields_and_a_token() -> None:
    (cluster,) = documents("kuberay.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert set(spec) <= RAY_CLUSTER["spec"]
    assert set(spec["headGroupSpec"]) <= RAY_CLUSTER["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= RAY_CLUSTER["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["authOptions"] == {"mode": "token"}
    # What the image has is what the file says.
    assert spec["rayVersion"] == importlib.metadata.version("ray")


@pytest.mark.parametrize(("name", "template"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_pod_is_valid_and_confined(name: str, template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, "1.33", strict=True)
    for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
        confined = container["securityContext"]
        assert confined["runAsNonRoot"] is True
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"], (
            f"{name}: without a limit one worker takes its neighbours down"
        )


@pytest.mark.parametrize("document", documents("kubernetes.yaml"), ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_every_object_of_the_server_is_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, "1.33", strict=True)


def test_the_objects_of_the_server_name_each_other() -> None:
    found = {(d["kind"], d["metadata"]["name"]): d["spec"] for d in documents("kubernetes.yaml")}
    server = found["Deployment", "autoq"]["template"]["spec"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in server["volumes"]}
    assert all(("PersistentVolumeClaim", claim) in found for claim in claims)
    for name in ("autoq", "autoq-db"):
        template = found["Deployment" if name == "autoq" else "StatefulSet", name]["template"]
        assert found["Service", name]["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = server["containers"]
    ports = [port["containerPort"] for port in container["ports"]]
    assert [port["targetPort"] for port in found["Service", "autoq"]["ports"]] == ports
    assert str(ports[0]) == container["args"][container["args"].index("--port") + 1]
    host = container["args"][container["args"].index("--allow-host") + 1]
    assert [rule["host"] for rule in found["Ingress", "autoq"]["rules"]] == [host]
    secrets = [variable.get("valueFrom", {}).get("secretKeyRef") for variable in container["env"]]
    assert {secret["name"] for secret in secrets if secret} == {
        "autoq-db",
        documents("kuberay.yaml")[0]["metadata"]["name"],
    }


def test_the_server_is_started_with_options_that_there_are() -> None:
    import typer

    from autoq.cli import app

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    (server,) = (d for d in documents("kubernetes.yaml") if d["kind"] == "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "serve"
    assert {word for word in container["args"] if word.startswith("--")} <= known


def test_the_image_installs_extras_that_there_are() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (listed,) = re.findall(r"'/src\[([\w,-]+)\]'", text)
    assert set(listed.split(",")) <= set(extras)
    copied = {
        word.removeprefix("/src/")
        for line in re.findall(r"^COPY (?!--)(.+)$", text, re.M)
        for word in line.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    assert "USER 1000" in text
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f'TORCH="torch=={pinned["torch"]}"' in text


def test_the_shipped_spec_has_an_address_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoq.workers.session import find_address

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    address = load_spec("cluster").workers.address
    assert address is not None
    assert check_address(find_address(address)) == ("10.0.0.5", 6379)
