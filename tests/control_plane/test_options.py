"""Options that cannot work are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from control_plane.options import ControlPlaneOptions, split_address
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


def test_each_control_plane_has_a_name_of_its_own() -> None:
    assert ControlPlaneOptions().control_plane_id != ControlPlaneOptions().control_plane_id


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(ControlPlaneOptions(consul_token="secret"))
