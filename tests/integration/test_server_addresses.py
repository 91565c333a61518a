from __future__ import annotations

import ipaddress

import pytest

from mesh_client.addresses import (
    HostPort,
    Registry,
    address_towards,
    parse_control_planes,
    parse_host_port,
    parse_registry,
)
from mesh_client.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", HostPort("127.0.0.1", 80)),
        (" orders.example:8443 ", HostPort("orders.example", 8443)),
        ("[::1]:80", HostPort("::1", 80)),
    ],
)
def test_host_and_port_are_read(text: str, expected: HostPort) -> None:
    parsed = parse_host_port(text, "address")
    assert parsed == expected
    assert str(parsed) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "host:-1",
        "host:²",
        "::1:80",
        "[host]:80",
        "a b:80",
        "0.0.0.0:80",
    ],
)
def test_what_cannot_be_called_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="^control_plane"):
        parse_host_port(text, "control_plane")


def test_a_listening_address_may_leave_the_port_open_and_stand_for_every_address() -> None:
    assert parse_host_port("0.0.0.0:0", "address", lowest_port=0).wildcard
    assert parse_host_port("[::]:0", "address", lowest_port=0).wildcard
    assert not parse_host_port("localhost:0", "address", lowest_port=0).wildcard


def test_control_planes_come_from_the_argument_else_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_CONTROL_PLANE", "a:1, b:2,a:1")
    assert parse_control_planes(None) == ("a:1", "b:2")
    assert parse_control_planes("c:3") == ("c:3",)
    assert parse_control_planes(["c:3", "d:4"]) == ("c:3", "d:4")
    monkeypatch.delenv("MESH_CONTROL_PLANE")
    assert parse_control_planes(None) == ()


def test_a_bad_control_plane_names_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="^control_plane: 'nowhere'"):
        parse_control_planes("a:1,nowhere")
    monkeypatch.setenv("MESH_CONTROL_PLANE", "nowhere")
    with pytest.raises(ConfigError, match="^MESH_CONTROL_PLANE: 'nowhere'"):
        parse_control_planes(None)


def test_registry_comes_from_the_argument_else_the_environment_else_is_the_control_plane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MESH_REGISTRY", raising=False)
    assert parse_registry(None) == Registry("control-plane")
    monkeypatch.setenv("MESH_REGISTRY", "consul://127.0.0.1:8500/")
    assert parse_registry(None) == Registry("consul", HostPort("127.0.0.1", 8500))
    assert parse_registry("none") == Registry("none")


def test_a_server_takes_the_control_planes_own_name_for_its_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REGISTRY", "embedded")
    assert parse_registry(None) == parse_registry("embedded") == Registry("control-plane")


@pytest.mark.parametrize(
    ("text", "agent"),
    [
        ("consul://10.0.0.1:8501", HostPort("10.0.0.1", 8501)),
        ("consul://consul.example", HostPort("consul.example", 8500)),
        ("consul://[::1]", HostPort("::1", 8500)),
        ("consul://[::1]:8501, 10.0.0.2", HostPort("::1", 8501)),
    ],
)
def test_a_server_registers_with_the_first_consul_agent(text: str, agent: HostPort) -> None:
    assert parse_registry(text) == Registry("consul", agent)


@pytest.mark.parametrize("registry", ["", "zookeeper", "consul://", "consul://host:99999", "consul://host:8500,"])
def test_an_unknown_registry_is_refused(registry: str) -> None:
    with pytest.raises(ConfigError, match="^registry"):
        parse_registry(registry)


def test_the_address_towards_loopback_is_loopback() -> None:
    assert ipaddress.ip_address(address_towards(HostPort("127.0.0.1", 9))).is_loopback
    assert ipaddress.ip_address(address_towards(HostPort("localhost", 9))).is_loopback


def test_no_route_is_a_mistake_that_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="advertise="):
        address_towards(HostPort("no-such-host.invalid", 9))
