from __future__ import annotations

import datetime as dt

import pytest

from gateway.errors import SettingsError
from gateway.settings import Authentication, parse_settings
from tests.gateway.test_kong import EVERYTHING, KEY, one

MINIMAL = one("a.B")
TLS = {"certificate": "{vault://env/a}", "key": "{vault://env/b}"}


def service(**settings: object) -> dict[str, object]:
    return MINIMAL | {"services": {"a.B": {"upstream": "u", **settings}}}


def upstream(**settings: object) -> dict[str, object]:
    return MINIMAL | {"upstreams": {"u": settings}}


def issuer(name: str, key: str = KEY, algorithm: str = "RS256") -> dict[str, object]:
    return {"jwt_issuers": [{"issuer": name, "algorithm": algorithm, "public_key": key}]}


def test_defaults_and_everything_are_accepted() -> None:
    assert parse_settings(MINIMAL).services["a.B"].timeout == 15.0
    everything = parse_settings(EVERYTHING)
    assert everything.services["shop.v1.OrderService"].authentication == (Authentication.JWT, Authentication.API_KEY)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "Input should be an object"),
        ([], "Input should be an object"),
        ({"services": {}, "upstreams": {}}, "services: "),
        (MINIMAL | {"surprise": 1}, "surprise: Extra inputs are not permitted"),
        (MINIMAL | {"cors": dt.date(2026, 1, 1)}, "cors: "),
        (MINIMAL | {"upstreams": {}}, "services.a.B.upstream: there is no upstream 'u'"),
        (service(timeout=0), "services.a.B.timeout: Input should be greater than 0"),
        (service(retries="1"), "services.a.B.retries: Input should be a valid integer"),
        (service(authentication=["none"]), "services.a.B.authentication.0: Input should be 'jwt' or 'api_key'"),
        (service(authentication=["jwt"]), "services.a.B.authentication: jwt needs a consumer with jwt_issuers"),
        (service(authentication=["api_key"]), "services.a.B.authentication: api_key needs a consumer with api_keys"),
        (service(rate_limit={"requests": 1, "by": "consumer"}), "a rate limit by consumer needs authentication"),
        (upstream(targets=[{"address": "nowhere"}]), "upstreams.u.targets.0.address: expected host:port"),
        (upstream(targets=[{"address": "a:70000"}]), "expected host:port"),
        (upstream(targets=[{"address": "a:1"}, {"address": "a:1"}]), "upstreams.u: a target is there twice"),
        (upstream(client_certificate=TLS), "upstreams.u: client_certificate needs host_header"),
        (upstream(client_certificate=TLS | {"key": KEY}, host_header="a"), "upstreams.u.client_certificate.key: "),
        (MINIMAL | {"cors": {"origins": []}}, "cors.origins: "),
        (MINIMAL | {"cors": {"origins": ["*"], "credentials": True}}, "cors: with credentials, name the origins"),
        (MINIMAL | {"consumers": {"a": issuer("i"), "b": issuer("i")}}, "consumers: an issuer is there twice"),
        (MINIMAL | {"consumers": {"a": issuer("i", algorithm="none")}}, "consumers.a.jwt_issuers.0.algorithm: "),
        (MINIMAL | {"consumers": {"a": issuer("i", "secret")}}, "consumers.a.jwt_issuers.0.public_key: "),
        (MINIMAL | {"consumers": {"a": {"api_keys": ["plain"]}}}, "consumers.a.api_keys.0: "),
        (MINIMAL | {"proto_directory": "relative"}, "proto_directory: "),
    ],
)
def test_what_is_wrong_is_said_with_its_path(document: object, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(document)
    assert message in str(caught.value)


def test_a_secret_that_is_refused_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(MINIMAL | {"consumers": {"a": {"api_keys": ["hunter2"]}}})
    assert "hunter2" not in str(caught.value)
