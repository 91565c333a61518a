"""Options that cannot work are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from control_plane.addresses import split_address
from control_plane.options import ControlPlaneOptions
from mesh_client.core.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"address": "nowhere"}, "address"),
        ({"address": ":80"}, "address"),
        ({"address": "127.0.0.1:65536"}, "address"),
        ({"address": "::1:80"}, "address"),
        ({"max_streams": 0}, "max_streams"),
        ({"debounce_quiet": -1.0}, "debounce_quiet"),
        ({"debounce_quiet": 1.0}, "debounce_quiet"),
        ({"policy_wait": 0.0}, "policy_wait"),
        ({"registry": "etcd://127.0.0.1:2379"}, "registry"),
        ({"registry": "consul://127.0.0.1:0"}, "registry"),
        ({"registry": ""}, "registry"),
        ({"enrolment_address": "nowhere"}, "address"),
        ({"enrolment_address": "127.0.0.1:1", "insecure": True}, "enrolment_address"),
        ({"address": "127.0.0.1:1", "enrolment_address": "127.0.0.1:1"}, "enrolment_address"),
        ({"address": "127.0.0.1:65535"}, "enrolment_address"),
        ({"connection_age": 0.5}, "connection_age"),
        ({"connection_age_grace": 1e9}, "connection_age_grace"),
    ],
)
def test_a_wrong_option_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ControlPlaneOptions(**fields)


@pytest.mark.parametrize("registry", ["embedded", "consul://127.0.0.1:8500", "consul://a:1,b:2"])
def test_a_registry_is_accepted(registry: str) -> None:
    assert ControlPlaneOptions(registry=registry).registry == registry


def test_addresses_are_split() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:0") == ("::1", 0)


@pytest.mark.parametrize(
    ("address", "enrolment", "expected"),
    [
        ("127.0.0.1:7070", None, "127.0.0.1:7071"),
        ("127.0.0.1:0", None, "127.0.0.1:0"),
        ("[::1]:80", None, "[::1]:81"),
        ("127.0.0.1:65535", "127.0.0.1:1", "127.0.0.1:1"),
    ],
)
def test_enrolment_is_at_the_next_port_unless_it_is_elsewhere(
    address: str, enrolment: str | None, expected: str
) -> None:
    assert ControlPlaneOptions(address=address, enrolment_address=enrolment).enrols_at == expected


def test_the_authority_lives_in_the_data_directory_and_asks_the_registry(tmp_path: Path) -> None:
    options = ControlPlaneOptions(data_dir=tmp_path, registry="consul://a:1").identity_options
    assert (options.data_dir, options.consul) == (tmp_path, "consul://a:1")
    assert ControlPlaneOptions().identity_options.consul == ""


def test_each_control_plane_has_a_name_of_its_own() -> None:
    assert ControlPlaneOptions().control_plane_id != ControlPlaneOptions().control_plane_id


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(ControlPlaneOptions(consul_token="secret"))
