"""The compose files, as Docker Compose reads them."""

import re
from pathlib import Path

import pytest

from tests.support.deployments import (
    HAPROXY_CFG,
    MARGIN_S,
    NGINX_CONF,
    image_environment,
    instructions,
    seconds,
    settings_of,
)
from tests.support.servers import Message


def test_the_servers_of_compose(compose: Message) -> None:
    services = compose["services"]
    names = ["bandsync-1", "bandsync-2"]
    for name in names:
        service = services[name]
        given = {key: text for key, text in service["environment"].items() if text}
        settings = settings_of(image_environment() | given)
        assert settings.server_id == name
        assert settings.redis_host == "redis"
        grace_s = seconds(service["stop_grace_period"])
        assert grace_s >= settings.drain_timeout_ms / 1000 + MARGIN_S
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    # Builds of one image at a time: the second finds that it exists already, and fails.
    assert len({services[name]["image"] for name in names}) == 1
    (build,) = [services[name]["build"] for name in names if "build" in services[name]]
    assert (Path(build["context"]) / build["dockerfile"]).is_file()


def check_balancer(services: Message, image: str, mounts: dict[Path, str]) -> None:
    """It finds the servers under the names of its file, also while they are down."""
    service = services["balancer"]
    assert service["image"].startswith(f"{image}:")
    networks = {name: each["networks"]["default"] for name, each in services.items()}
    addresses = {name: each["ipv4_address"] for name, each in networks.items() if each}
    assert dict(entry.split("=", 1) for entry in service["extra_hosts"]) == addresses
    assert {Path(each["source"]): each["target"] for each in service["volumes"]} == mounts
    assert all(each["read_only"] for each in service["volumes"])
    (path,) = mounts
    text = path.read_text()
    named = re.findall(r"^\s+server .*?(bandsync-\d:\d+)", text, re.MULTILINE)
    assert set(named) == {f"{name}:{image_environment()['PORT']}" for name in addresses}
    (published,) = service["ports"]
    (port,) = re.findall(r"^\s+(?:listen |bind :)(\d+);?$", text, re.MULTILINE)
    assert published["target"] == int(port)
    assert published["published"] == "8080"
    # A stop that waits for those who play would let nobody in until it is killed.
    assert service["stop_signal"] == "SIGTERM"
    # Its writable folders belong to its user.
    uid, gid = service["user"].split(":")
    for place in service.get("tmpfs", []):
        assert place.endswith(f":uid={uid},gid={gid}")


def test_the_balancer_of_compose_is_nginx(compose: Message) -> None:
    services = compose["services"]
    check_balancer(services, "nginx", {NGINX_CONF: "/etc/nginx/nginx.conf"})
    # Its temporary files and its pid, as the image is built.
    places = {place.partition(":")[0] for place in services["balancer"]["tmpfs"]}
    assert places == {"/var/cache/nginx", "/run"}


def test_second_compose_file_replaces_nginx_with_haproxy(
    compose: Message, compose_haproxy: Message
) -> None:
    services = compose_haproxy["services"]
    check_balancer(services, "haproxy", {HAPROXY_CFG: "/usr/local/etc/haproxy/haproxy.cfg"})
    assert "tmpfs" not in services["balancer"]
    # And nothing else in another's.
    replaced = {**compose["services"], "balancer": services["balancer"]}
    assert {**compose, "services": replaced} == compose_haproxy


@pytest.mark.parametrize("balancer_of", ["compose", "compose_haproxy"])
def test_compose_services_are_confined(balancer_of: str, request: pytest.FixtureRequest) -> None:
    services = request.getfixturevalue(balancer_of)["services"]
    assert set(services) == {"balancer", "bandsync-1", "bandsync-2", "redis"}
    image = dict(instructions())
    for name, service in services.items():
        user = service.get("user") or (image["USER"] if service["image"] == "bandsync" else "")
        assert int(user.partition(":")[0]) > 0, name
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}
        assert int(service["mem_limit"]) > 0
        assert not service.get("privileged")
