"""The Kubernetes manifests, against their schemas, each other and the settings."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.deployments import (
    CLIENTS_WAIT_S,
    KUBERNETES,
    MARGIN_S,
    PIP,
    SECRETS,
    image_environment,
    kustomization,
    manifests,
    missing,
    settings_of,
    yaml_documents,
)


def test_the_kustomization_names_every_manifest() -> None:
    files = {path.name for path in KUBERNETES.glob("*.yaml")}
    assert {*kustomization()["resources"], "kustomization.yaml"} == files


def test_the_kustomization_has_no_secret_and_needs_one() -> None:
    """A password that all the world knows is none; one that is forgotten stops the deployment."""
    assert not [
        kind for path in KUBERNETES.glob("*.yaml") for kind in kinds(path) if kind == "Secret"
    ]
    (generated,) = kustomization()["secretGenerator"]
    assert generated["envs"] == ["secrets.env"]
    assert (KUBERNETES / ".gitignore").read_text().split() == ["secrets.env"]
    assert "literals" not in generated
    (image,) = kustomization()["images"]
    # A tag that stays the same replaces no pods.
    assert image["newTag"] != "latest"
    container = manifests()["Deployment", "bandsync"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == image["name"]


def kinds(path: Path) -> list[str]:
    return [document["kind"] for document in yaml_documents(path)]


def test_kubectl_renders_the_manifests_read_here(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder, ignore=shutil.ignore_patterns("secrets.env"))
    made = [shutil.which("kubectl") or "", "kustomize", str(folder)]
    assert "secrets.env" in subprocess.run(made, capture_output=True, text=True, check=False).stderr
    (folder / "secrets.env").write_text(SECRETS)
    result = subprocess.run(made, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (tmp_path / "made.yaml").write_text(result.stdout)
    documents = yaml_documents(tmp_path / "made.yaml")
    names = {(each["kind"], each["metadata"]["name"]) for each in documents}
    bare = {(kind, re.sub(r"-[a-z0-9]{10}$", "", name)) for kind, name in names}
    assert bare == set(manifests())
    # References contain the hashes of the generated names.
    (name,) = [name for kind, name in names if kind == "Secret"]
    stateful = next(each for each in documents if each["kind"] == "StatefulSet")
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        assert variable["valueFrom"]["secretKeyRef"]["name"] == name


@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_manifests_are_what_kubernetes_accepts(version: str) -> None:
    try:
        import kubernetes_validate
    except ImportError:
        missing(f"no kubernetes-validate: {PIP}")
    for document in manifests().values():
        kubernetes_validate.validate(document, version, strict=True)


def test_manifests_agree_with_each_other_and_with_the_server() -> None:
    found = manifests()
    deployment = found["Deployment", "bandsync"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    given = dict(image_environment())
    for source in container["envFrom"]:
        ((kind, reference),) = source.items()
        key = {"configMapRef": ("ConfigMap", "data"), "secretRef": ("Secret", "stringData")}[kind]
        given |= found[key[0], reference["name"]][key[1]]
    assert {entry["name"] for entry in container["env"]} == {"SERVER_ID"}
    settings = settings_of(given | {"SERVER_ID": "bandsync-7d9c"})
    # A Service of the same namespace would otherwise be a setting: REDIS_PORT=tcp://10.0.0.1:6379.
    assert pod["enableServiceLinks"] is False

    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = settings.drain_timeout_ms / 1000
    assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + MARGIN_S
    assert container["readinessProbe"]["httpGet"]["path"] == "/api/health"
    # That of the liveness has to be good while it drains.
    assert container["livenessProbe"]["httpGet"]["path"] == "/api/storage/status"
    # A hanging server gets less time than a draining one.
    assert container["livenessProbe"]["terminationGracePeriodSeconds"] < drain_s
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port}

    labels = deployment["template"]["metadata"]["labels"]
    for each in (
        deployment["selector"],
        found["PodDisruptionBudget", "bandsync"]["spec"]["selector"],
    ):
        assert each["matchLabels"] == labels
    service = found["Service", "bandsync"]["spec"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] in ports
    (rule,) = found["Ingress", "bandsync"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": "bandsync", "port": {"name": "http"}}
    said = found["Ingress", "bandsync"]["metadata"]["annotations"]
    assert said["nginx.org/max-fails"] == "0"
    for wait in ("nginx.org/proxy-read-timeout", "nginx.ingress.kubernetes.io/proxy-read-timeout"):
        assert settings.ping_interval_ms / 1000 < int(said[wait].rstrip("s")) < CLIENTS_WAIT_S

    policy = found["NetworkPolicy", "bandsync-redis"]["spec"]
    ((rule,),) = [policy["ingress"]]
    assert rule["from"] == [{"podSelector": {"matchLabels": labels}}]

    redis = found["StatefulSet", "bandsync-redis"]["spec"]
    labels = redis["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    service = found["Service", "bandsync-redis"]["spec"]
    assert redis["selector"]["matchLabels"] == service["selector"] == labels
    assert settings.redis_host == "bandsync-redis" == redis["serviceName"]
    (container,) = redis["template"]["spec"]["containers"]
    assert rule["ports"] == [{"port": container["ports"][0]["name"]}]
    for variable in container["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        assert reference["key"] in found["Secret", reference["name"]]["stringData"]
    assert container["ports"][0]["containerPort"] == service["ports"][0]["port"]
    assert service["ports"][0]["port"] == settings.redis_port
    (claim,) = redis["volumeClaimTemplates"]
    (mount,) = container["volumeMounts"]
    assert claim["metadata"]["name"] == mount["name"]
    assert container["args"][container["args"].index("--dir") + 1] == mount["mountPath"]
