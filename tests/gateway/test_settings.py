from __future__ import annotations

import datetime as dt

import pytest

from gateway.errors import SettingsError
from gateway.settings import parse_settings
from tests.edge_policies import P256
from tests.gateway.test_kong import KONG

MINIMAL: dict[str, object] = {"upstreams": {"u": {}}}
TLS = {"certificate": "{vault://env/a}", "key": "{vault://env/b}"}


def upstream(**settings: object) -> dict[str, object]:
    return {"upstreams": {"u": settings}}


def test_defaults_and_everything_are_accepted() -> None:
    assert parse_settings({}).vault == "env"
    assert parse_settings(MINIMAL).upstreams["u"].targets == ()
    assert len(parse_settings(KONG).upstreams["inventory"].targets) == 2


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "Input should be an object"),
        ([], "Input should be an object"),
        (MINIMAL | {"surprise": 1}, "surprise: Extra inputs are not permitted"),
        (MINIMAL | {"services": {}}, "services: Extra inputs are not permitted"),
        (MINIMAL | {"prometheus": dt.date(2026, 1, 1)}, "prometheus: "),
        (upstream(targets=[{"address": "nowhere"}]), "upstreams.u.targets.0.address: expected host:port"),
        (upstream(targets=[{"address": "a:70000"}]), "expected host:port"),
        (upstream(targets=[{"address": "a:1", "weight": "1"}]), "weight: Input should be a valid integer"),
        (upstream(targets=[{"address": "a:1"}, {"address": "a:1"}]), "upstreams.u: a target is there twice"),
        (upstream(client_certificate=TLS), "upstreams.u: client_certificate needs host_header"),
        (upstream(client_certificate=TLS | {"key": P256}, host_header="a"), "upstreams.u.client_certificate.key: "),
        (MINIMAL | {"proto_directory": "relative"}, "proto_directory: "),
        (MINIMAL | {"vault": "env/"}, "vault: "),
    ],
)
def test_what_is_wrong_is_said_with_its_path(document: object, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(document)
    assert message in str(caught.value)


def test_a_secret_that_is_refused_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(upstream(client_certificate=TLS | {"key": "hunter2"}, host_header="a"))
    assert "hunter2" not in str(caught.value)
