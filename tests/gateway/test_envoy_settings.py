from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway.envoy_settings import EnvoySettings, socket_path, split_address

TLS = {"certificate": "/a/crt", "key": "/a/key", "roots": "/b/roots"}


def test_addresses_are_taken_apart() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    assert socket_path("unix:/run/admin") == "/run/admin"
    assert socket_path("127.0.0.1:80") is None


def test_directories_are_those_of_the_files() -> None:
    settings = EnvoySettings.model_validate({"directory": "/d", "upstream_tls": TLS})
    assert settings.upstream_tls is not None
    assert (settings.upstream_tls.directory, settings.upstream_tls.roots_directory) == ("/a", "/b")


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"directory": "relative"}, "directory", "absolute path"),
        ({"directory": "/a/../b"}, "directory", "absolute path"),
        ({"directory": "/a/"}, "directory", "absolute path"),
        ({"listen": "localhost:80"}, "listen", "ip:port"),
        ({"listen": "0.0.0.0:65536"}, "listen", "ip:port"),
        ({"admin": "unix:admin"}, "admin", "absolute path"),
        ({"admin": "example.com:80"}, "admin", "ip:port"),
        ({"upstream_tls": {**TLS, "key": "/c/key"}}, "upstream_tls.key", "directory of the certificate"),
        ({"upstream_tls": {**TLS, "trust_domain": "Not One"}}, "upstream_tls.trust_domain", "DNS name"),
        ({"trusted_hops": -1}, "trusted_hops", "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, object], field: str, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        EnvoySettings.model_validate({"directory": "/d", **changes})
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == field
    assert expected in error["msg"]
